"""`OlaVlmConfig`: LLaVA's configuration plus the tasks, their tokens and the layers they are predicted from.

And, for the multi-encoder baseline, the teachers whose features the student is fed beside the image.
"""

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from transformers import LlavaConfig

from olavlm.errors import OlaError


@dataclass(frozen=True)
class TaskConfig:
    """One teacher's feature, as the student predicts it.

    ``dense`` tasks (depth, segmentation) own a learnable ``(queries, hidden)`` table: its rows are the predictors'
    queries, and inserted token *i* is the mean of the *i*-th run of ``queries / task_tokens`` rows. ``pooled`` tasks
    (generation) own a ``(task_tokens, hidden)`` table, inserted as it is; their one query is the mean of the language
    model's hidden states at those positions. With ``task_tokens == 0`` nothing is inserted and each predictor owns its
    latents.
    """

    name: str
    kind: Literal["dense", "pooled"]
    queries: int  # target tokens per image
    width: int  # width of a target token
    layers: tuple[int, ...]  # 1-based; num_hidden_layers means after the final norm
    dim: int  # inner width of the predictors
    task_tokens: int  # inserted per image
    depth_mlps: bool  # the predictors own linear_1..3, as the published depth predictors do

    @property
    def table_rows(self) -> int:
        """Rows of the task's learnable table; 0 where the predictors own their latents."""
        if self.task_tokens == 0:
            return 0
        return self.queries if self.kind == "dense" else self.task_tokens


@dataclass(frozen=True)
class EncoderConfig:
    """A teacher whose feature of every image the student is fed, as `tokens` more tokens behind those of the image."""

    name: str
    tokens: int  # per image
    width: int  # of one of them, before it is projected


#: Vision towers by model type, and what LLaVA calls leaving out the token in front of the patches, if there is one.
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def image_tokens(vision_config: Any) -> dict[str, Any]:
    """What the student reads of a tower's output, as fields of `OlaVlmConfig`: every patch and nothing else.

    Raises:
        OlaError: neither CLIP nor SigLIP.
    """
    if vision_config.model_type not in TOWERS:
        raise OlaError(f"vision tower: {vision_config.model_type!r}; expected {' or '.join(TOWERS)}")
    return {
        "vision_feature_select_strategy": TOWERS[vision_config.model_type],
        "image_seq_length": (vision_config.image_size // vision_config.patch_size) ** 2,
    }


class OlaVlmConfig(LlavaConfig):  # type: ignore[no-untyped-call]
    """Configuration of `OlaVlmForConditionalGeneration`.

    Args (beyond LLaVA's):
        tasks: ordered list of dictionaries with the fields of `TaskConfig`; the order is that of the task tokens in the
            sequence. ``layers`` (default none), ``task_tokens`` (8), ``depth_mlps`` (False) and ``dim`` may be left
            out; `dim` then follows the published rule: the language model's width for predictors with depth MLPs and
            task tokens, the target's width for all others.
        task_token_ids: token ids of each task's inserted tokens, in order.
        predictors_read_text: whether predictors attend to the text after the image.
        encoders: ordered list of dictionaries with the fields of `EncoderConfig`; none for a student that is distilled
            only. The model is then called with ``encoder_features``.
        encoder_token_ids: the token id that marks each encoder's positions.

    `image_tokens` gives LLaVA's fields on the image.

    Raises:
        OlaError: a task or encoder that cannot be built, naming it, the key, the value and what was expected.
    """

    model_type = "ola_vlm"

    tasks: list[dict[str, Any]] | None = None
    task_token_ids: dict[str, list[int]] | None = None
    predictors_read_text: bool = True
    encoders: list[dict[str, Any]] | None = None
    encoder_token_ids: dict[str, int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        tasks = parse_tasks(self.tasks or [], self.llm.hidden_size, self.llm.num_hidden_layers)
        self.tasks = [asdict(task) | {"layers": list(task.layers)} for task in tasks]
        self.task_token_ids = {name: list(ids) for name, ids in (self.task_token_ids or {}).items()}
        self.encoders = [asdict(encoder) for encoder in parse_encoders(self.encoders or [])]
        self.encoder_token_ids = dict(self.encoder_token_ids or {})
        _check_ids(tasks, self.task_token_ids, self.image_token_index)
        _check_encoder_ids(self)

    @property
    def llm(self) -> Any:
        """`text_config`: the language model's own configuration."""
        return self.text_config

    @property
    def task_configs(self) -> list[TaskConfig]:
        """`tasks`, typed and in order."""
        return [TaskConfig(**(task | {"layers": tuple(task["layers"])})) for task in self.tasks or []]

    @property
    def encoder_configs(self) -> list[EncoderConfig]:
        """`encoders`, typed and in order."""
        return [EncoderConfig(**encoder) for encoder in self.encoders or []]

    @property
    def encoder_tokens(self) -> int:
        """Tokens per image of all encoders together."""
        return sum(encoder.tokens for encoder in self.encoder_configs)

    @property
    def image_block(self) -> list[int]:
        """The token ids one image occupies: image tokens, each encoder's, then every task's, in their orders."""
        ids, fed = self.task_token_ids or {}, self.encoder_token_ids or {}
        return [
            *[self.image_token_index] * self.image_seq_length,
            *(fed[encoder.name] for encoder in self.encoder_configs for _ in range(encoder.tokens)),
            *(i for task in self.task_configs for i in ids.get(task.name, [])),
        ]


def check_image_tokens(config: OlaVlmConfig) -> None:
    """The sequence has room for the patches of the vision tower, no more and no less.

    Not asked of every configuration: behind the vision tower the model runs on image features of any origin.

    Raises:
        OlaError: it has not.
    """
    vision: Any = config.vision_config
    for key, value in image_tokens(vision).items():
        if getattr(config, key) != value:
            raise OlaError(
                f"{key}: {getattr(config, key)!r}; expected {value!r} for a {vision.model_type} with images of "
                f"{vision.image_size} and patches of {vision.patch_size} pixels"
            )


def parse_tasks(entries: list[dict[str, Any]], hidden_size: int, num_layers: int) -> list[TaskConfig]:
    """Entries of `OlaVlmConfig.tasks` for a language model of that width and depth, validated, defaults filled in.

    Raises:
        OlaError: see `OlaVlmConfig`.
    """
    tasks = [_parse_task(entry, hidden_size, num_layers) for entry in entries]
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise OlaError(f"tasks: {', '.join(names)} names a task twice")
    return tasks


def parse_encoders(entries: list[dict[str, Any]]) -> list[EncoderConfig]:
    """Entries of `OlaVlmConfig.encoders`, validated.

    Raises:
        OlaError: see `OlaVlmConfig`.
    """
    encoders = []
    for given in entries:
        name = _name("encoders", given)
        _check_keys(f"encoders.{name}", given, EncoderConfig, required=("tokens", "width"))
        for key in ("tokens", "width"):
            _check_integer(f"encoders.{name}.{key}", given[key], 1)
        encoders.append(EncoderConfig(**given))
    names = [encoder.name for encoder in encoders]
    if len(set(names)) != len(names):
        raise OlaError(f"encoders: {', '.join(names)} names an encoder twice")
    return encoders


def _name(key: str, given: Any) -> str:
    """The name in an entry of `tasks` or `encoders`."""
    if not isinstance(given, dict):
        raise OlaError(f"{key}: {given!r}; expected a list of dictionaries")
    name = given.get("name")
    if not isinstance(name, str) or not name.isidentifier():
        raise OlaError(f"{key}: name {name!r}; expected a plain word such as 'depth'")
    return name


def _check_keys(where: str, given: dict[str, Any], config: type, required: tuple[str, ...]) -> None:
    """An entry has the fields of a configuration's class and no others."""
    known = [field.name for field in fields(config)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise OlaError(f"{where}.{key}: unknown key; {hint}")
    for key in required:
        if key not in given:
            raise OlaError(f"{where}.{key}: missing")


def _check_integer(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OlaError(f"{key}: {value!r}; expected an integer of at least {least}")


def _parse_task(given: dict[str, Any], hidden_size: int, num_layers: int) -> TaskConfig:
    """A validated `TaskConfig` with its defaults filled in."""
    name = _name("tasks", given)
    _check_keys(f"tasks.{name}", given, TaskConfig, required=("kind", "queries", "width"))
    entry: dict[str, Any] = {"layers": [], "task_tokens": 8, "depth_mlps": False, "dim": None} | given
    if entry["dim"] is None:
        wide = entry["depth_mlps"] and entry["task_tokens"]
        entry["dim"] = hidden_size if wide else entry["width"]
    for key, least in (("queries", 1), ("width", 1), ("dim", 1), ("task_tokens", 0)):
        _check_integer(f"tasks.{name}.{key}", entry[key], least)
    if entry["kind"] not in ("dense", "pooled"):
        raise OlaError(f"tasks.{name}.kind: {entry['kind']!r}; expected 'dense' or 'pooled'")
    if entry["kind"] == "pooled" and entry["queries"] != 1:
        raise OlaError(f"tasks.{name}.queries: {entry['queries']}; a pooled task has exactly one query")
    if entry["kind"] == "dense" and entry["task_tokens"] and entry["queries"] % entry["task_tokens"]:
        raise OlaError(
            f"tasks.{name}.task_tokens: {entry['task_tokens']} does not divide its {entry['queries']} queries"
        )
    if not isinstance(entry["depth_mlps"], bool):
        raise OlaError(f"tasks.{name}.depth_mlps: {entry['depth_mlps']!r}; expected true or false")
    layers = entry["layers"]
    if not isinstance(layers, list | tuple):
        raise OlaError(f"tasks.{name}.layers: {layers!r}; expected a list of integers")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= num_layers:
            raise OlaError(
                f"tasks.{name}.layers: {layer!r}; expected integers from 1 to {num_layers}, the number of layers"
            )
    if len(set(layers)) != len(layers):
        raise OlaError(f"tasks.{name}.layers: {layers} names a layer twice")
    return TaskConfig(**(entry | {"layers": tuple(layers)}))


def _check_ids(tasks: list[TaskConfig], ids: dict[str, list[int]], image_token: int) -> None:
    """Every inserted token has an id of its own."""
    names = [task.name for task in tasks]
    for name in ids:
        if name not in names:
            raise OlaError(f"task_token_ids.{name}: no such task; tasks: {', '.join(names) or 'none'}")
    for task in tasks:
        if len(ids.get(task.name, [])) != task.task_tokens:
            raise OlaError(
                f"task_token_ids.{task.name}: {len(ids.get(task.name, []))} ids; expected {task.task_tokens}, "
                "one for each of the task's tokens"
            )
    every = [image_token, *(i for values in ids.values() for i in values)]
    if len(set(every)) != len(every):
        raise OlaError("task_token_ids: an id is used twice, or is the image token's")


def _check_encoder_ids(config: OlaVlmConfig) -> None:
    """Every encoder has an id of its own, which nothing else of an image has."""
    names, ids = [encoder.name for encoder in config.encoder_configs], config.encoder_token_ids or {}
    if ids.keys() != set(names):
        raise OlaError(f"encoder_token_ids: {', '.join(ids) or 'none'}; encoders: {', '.join(names) or 'none'}")
    others = {config.image_token_index, *(i for of_task in (config.task_token_ids or {}).values() for i in of_task)}
    if len({*ids.values()} - others) != len(names):
        raise OlaError("encoder_token_ids: an id is used twice, or is that of the image or of a task's token")
