"""`OlaVlmConfig`: LLaVA's configuration plus the tasks, their tokens and the layers they are predicted from."""

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

    `image_tokens` gives LLaVA's fields on the image.

    Raises:
        OlaError: a task that cannot be built, naming the task, the key, the value and what was expected.
    """

    model_type = "ola_vlm"

    tasks: list[dict[str, Any]] | None = None
    task_token_ids: dict[str, list[int]] | None = None
    predictors_read_text: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        tasks = parse_tasks(self.tasks or [], self.llm.hidden_size, self.llm.num_hidden_layers)
        self.tasks = [asdict(task) | {"layers": list(task.layers)} for task in tasks]
        self.task_token_ids = {name: list(ids) for name, ids in (self.task_token_ids or {}).items()}
        _check_ids(tasks, self.task_token_ids, self.image_token_index)

    @property
    def llm(self) -> Any:
        """`text_config`: the language model's own configuration."""
        return self.text_config

    @property
    def task_configs(self) -> list[TaskConfig]:
        """`tasks`, typed and in order."""
        return [TaskConfig(**(task | {"layers": tuple(task["layers"])})) for task in self.tasks or []]

    @property
    def image_block(self) -> list[int]:
        """The token ids one image occupies in the sequence: image tokens, then every task's tokens in task order."""
        ids = self.task_token_ids or {}
        return [self.image_token_index] * self.image_seq_length + [
            i for task in self.task_configs for i in ids.get(task.name, [])
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


def _parse_task(given: dict[str, Any], hidden_size: int, num_layers: int) -> TaskConfig:
    """A validated `TaskConfig` with its defaults filled in."""
    if not isinstance(given, dict):
        raise OlaError(f"tasks: {given!r}; expected a list of dictionaries with the fields of a task")
    name = given.get("name")
    if not isinstance(name, str) or not name.isidentifier():
        raise OlaError(f"tasks: name {name!r}; expected a plain word such as 'depth'")
    known = [field.name for field in fields(TaskConfig)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise OlaError(f"tasks.{name}.{key}: unknown key; {hint}")
    for key in ("kind", "queries", "width"):
        if key not in given:
            raise OlaError(f"tasks.{name}.{key}: missing")
    entry: dict[str, Any] = {"layers": [], "task_tokens": 8, "depth_mlps": False, "dim": None} | given
    if entry["dim"] is None:
        wide = entry["depth_mlps"] and entry["task_tokens"]
        entry["dim"] = hidden_size if wide else entry["width"]
    for key, least in (("queries", 1), ("width", 1), ("dim", 1), ("task_tokens", 0)):
        if isinstance(entry[key], bool) or not isinstance(entry[key], int) or entry[key] < least:
            raise OlaError(f"tasks.{name}.{key}: {entry[key]!r}; expected an integer of at least {least}")
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
