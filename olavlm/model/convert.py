"""From a published OLA-VLM checkpoint to the student's own folder, every tensor accounted for.

What a checkpoint does not hold comes from elsewhere or is new, and the conversion says which: the vision tower's
configuration (and its weights, and the language model, where training saved neither), and logit scales, which only
pretraining saves. Teachers inside the checkpoint are dropped, each tensor with its reason.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig

from olavlm.data.folder import new_folder
from olavlm.errors import OlaError
from olavlm.model.configuration import OlaVlmConfig, image_tokens
from olavlm.model.distill import INITIAL_LOGIT_SCALE
from olavlm.model.modeling import PARTS, OlaVlmForConditionalGeneration
from olavlm.model.processing import IMAGE_TOKEN, OlaVlmProcessor, task_token
from olavlm.model.published import (
    CONVERSATIONS,
    Published,
    Shapes,
    chat_template,
    published_name,
    read_config,
    why_dropped,
)
from olavlm.model.tensor_files import SHARD_BYTES, TensorFiles, write_tensors

#: The published id of an image in the text. Where there is no tokenizer, task tokens get the ids below it.
PUBLISHED_IMAGE_ID = -200

EMBEDDINGS = "model.language_model.embed_tokens.weight"

HUB_FILES = ["*.json", "*.safetensors", "*.bin", "tokenizer*"]


@dataclass(frozen=True)
class Account:
    """What becomes of every tensor; the content of ``conversion.json``."""

    renamed: dict[str, str]  # published name → ours
    dropped: dict[str, str]  # published name → why
    supplied: dict[str, str]  # ours → the folder or hub id it comes from
    initialised: list[str]  # ours, at their initial value


@dataclass(frozen=True)
class _Source:
    """Files, and which of their tensors are which of ours."""

    files: TensorFiles
    names: dict[str, str]  # there → ours


def convert(
    checkpoint: str,
    out: Path,
    *,
    vision_tower: str | None = None,
    language_model: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Account:
    """Write a published checkpoint as a folder that `OlaVlmForConditionalGeneration.from_pretrained` loads.

    Values keep their dtype and pass through memory shard by shard. With a tokenizer (the checkpoint's, else the
    language model's) the folder holds an `OlaVlmProcessor` too, with the published view and conversation, and the
    vocabulary grows where the new ids do not fit, as in `build_student`. Without one the vocabulary stays as published,
    an image's id is −200, and the task tokens' are the ids below: for use with `inputs_embeds`.

    Args:
        checkpoint: folder or hub id; safetensors or ``.bin``, sharded or not.
        out: a new folder.
        vision_tower: folder or hub id of the CLIP ViT; default: the one the checkpoint names. For a checkpoint with
            its tower inside only ``config.json`` and ``preprocessor_config.json`` are needed.
        language_model: folder or hub id, for a checkpoint without one.
        shard_bytes: most bytes of a file of weights.

    Raises:
        OlaError: an unknown or missing tensor, a wrong shape, a configuration this student cannot have, or parts that
            neither the checkpoint nor the arguments hold.
    """
    folder = _folder("checkpoint", checkpoint)
    files = TensorFiles(folder)
    published = read_config(_read_json(folder / "config.json"), files.shapes, str(folder / "config.json"))
    tower = vision_tower or published.vision_tower
    if tower is None:
        raise OlaError(
            f"{folder}/config.json: mm_vision_tower: missing; expected a CLIP ViT, here or as --vision-tower"
        )
    vision_config = _load("vision tower", tower, AutoConfig.from_pretrained)
    text_config, base = published.text_config, None
    if language_model and "model.embed_tokens.weight" not in files.shapes:
        base = _folder("language model", language_model)
        text_config = _load("language model", str(base), AutoConfig.from_pretrained)
    tokenizer = _tokenizer(text_config, [folder, base] if base else [folder])
    config = student_config(
        published, text_config, getattr(vision_config, "vision_config", vision_config), token_ids(published, tokenizer)
    )
    sources, account = _find_tensors(folder, files, config, published, tower, base)

    config.architectures = [OlaVlmForConditionalGeneration.__name__]
    config.dtype = next(s.files.dtypes[name] for s in sources for name, ours in s.names.items() if ours == EMBEDDINGS)
    config.llm.vocab_size = max(config.llm.vocab_size, len(tokenizer) if tokenizer else 0)
    with new_folder(out) as made:
        write_tensors(made, _student_tensors(sources, account.initialised, config), shard_bytes)
        config.save_pretrained(made)
        _generation_config(folder, config, tokenizer).save_pretrained(made)
        if tokenizer:
            _processor(tokenizer, tower, config, published).save_pretrained(made)
        (made / "conversion.json").write_text(json.dumps({"checkpoint": checkpoint} | asdict(account), indent=1))
    return account


def token_ids(published: Published, tokenizer: Any | None) -> tuple[int, dict[str, list[int]]]:
    """The image's token id, and those of each task's tokens.

    They are added to the tokenizer; without one they are the published −200 and, for task tokens, the ids below it.
    """
    names = {
        task["name"]: [task_token(task["name"], i) for i in range(task["task_tokens"])] for task in published.tasks
    }
    if tokenizer is None:
        below = itertools.count(PUBLISHED_IMAGE_ID - 1, -1)
        return PUBLISHED_IMAGE_ID, {task: [next(below) for _ in tokens] for task, tokens in names.items()}
    tokenizer.add_tokens([IMAGE_TOKEN, *(token for tokens in names.values() for token in tokens)], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids
    return ids(IMAGE_TOKEN), {task: ids(tokens) for task, tokens in names.items()}


def student_config(
    published: Published,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    ids: tuple[int, dict[str, list[int]]],
) -> OlaVlmConfig:
    """The student's configuration, with the vocabulary as published.

    Raises:
        OlaError: another language model or tower than the published, or tasks that cannot be built.
    """
    for found, model_type, what in (
        (text_config, published.text_config.model_type, "language model"),
        (vision_config, "clip_vision_model", "vision tower"),
    ):
        if found.model_type != model_type:
            raise OlaError(f"{what}: {found.model_type!r}; expected {model_type!r}, which the checkpoint has")
    return OlaVlmConfig(
        text_config=text_config,
        vision_config=vision_config,
        vision_feature_layer=published.vision_feature_layer,
        **image_tokens(vision_config),
        image_token_index=ids[0],
        task_token_ids=ids[1],
        tasks=published.tasks,
        predictors_read_text=published.predictors_read_text,
    )


def expected_tensors(config: OlaVlmConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name → our name and shape, for every tensor of the student; a tied head is not listed."""
    with torch.device("meta"):
        state = OlaVlmForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    layers = {task.name: list(task.layers) for task in config.task_configs}
    return {published_name(name, layers): (name, tuple(tensor.shape)) for name, tensor in state.items()}


def assign(
    shapes: Shapes, expected: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """What each of a published checkpoint's tensors is.

    Args:
        shapes: of the checkpoint's tensors.
        expected: `expected_tensors` of the student; some may be absent.
        where: names the checkpoint in messages.

    Returns:
        Published name → ours, and published name → why it is dropped.

    Raises:
        OlaError: a tensor that is neither, or one of another shape.
    """
    renamed, dropped = {}, {}
    for name, shape in shapes.items():
        if name not in expected:
            reason = why_dropped(name)
            if reason is None:
                raise OlaError(f"{where}: {name}: unknown tensor, of shape {list(shape)}")
            dropped[name] = reason
            continue
        renamed[name], wanted = expected[name]
        if shape != wanted and not (shape == () and wanted == (1,)):  # published logit scales are scalars
            raise OlaError(f"{where}: {name}: shape {list(shape)}; expected {list(wanted)}")
    return renamed, dropped


def _find_tensors(
    folder: Path, files: TensorFiles, config: OlaVlmConfig, published: Published, tower: str, base: Path | None
) -> tuple[list[_Source], Account]:
    """Where every tensor of the student is. A part is in the checkpoint whole, or is supplied whole."""
    expected = expected_tensors(config)
    renamed, dropped = assign(files.shapes, expected, str(folder))
    sources = [_Source(files, renamed)]
    supplied: dict[str, str] = {}
    absent = {theirs: ours for theirs, (ours, _) in expected.items() if theirs not in renamed}
    for part, given in (("vision_tower", tower), ("language_model", base)):
        wanted = {theirs: ours for theirs, ours in absent.items() if ours.startswith(PARTS[part])}
        if not wanted or any(ours.startswith(PARTS[part]) for ours in renamed.values()):
            continue
        if given is None:
            raise OlaError(f"{folder}: no language model inside; name the one it was trained with: --language-model")
        source = _supply(part.replace("_", " "), str(given), {theirs: expected[theirs] for theirs in wanted})
        sources.append(source)
        supplied |= dict.fromkeys(source.names.values(), str(given))
        absent = {theirs: ours for theirs, ours in absent.items() if theirs not in wanted}
    initialised = [] if published.has_logit_scales else [n for n in absent.values() if n.startswith("logit_scales.")]
    missing = [theirs for theirs, ours in absent.items() if ours not in initialised]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OlaError(f"{folder}: {missing[0]}: missing{more}")
    return sources, Account(renamed, dropped, supplied, initialised)


def _supply(part: str, where: str, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> _Source:
    """A part from the folder of a language model, or of a CLIP, whole or vision part; what else is there is left."""
    files = TensorFiles(_folder(part, where))
    names = {}
    for theirs, (ours, shape) in wanted.items():
        own = theirs.removeprefix("model.vision_tower.vision_tower.")
        name = own if own in files.shapes else own.removeprefix("vision_model.")  # transformers 5 has no prefix
        if files.shapes.get(name) != shape:
            found = list(files.shapes[name]) if name in files.shapes else "missing"
            raise OlaError(f"{part} {where}: {own}: {found}; expected shape {list(shape)}")
        names[name] = ours
    return _Source(files, names)


def _student_tensors(
    sources: list[_Source], initialised: list[str], config: OlaVlmConfig
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under our name, the vocabulary grown to the configuration's."""
    for source in sources:
        for theirs, tensor in source.files.read(source.names):
            name = source.names[theirs]
            if name in (EMBEDDINGS, "lm_head.weight"):
                new = config.llm.vocab_size - tensor.shape[0]
                tensor = torch.cat([tensor, tensor.float().mean(0).to(tensor.dtype).expand(new, -1)])
            yield name, tensor.reshape(1) if name.startswith("logit_scales.") else tensor
    for name in initialised:
        yield name, torch.full((1,), INITIAL_LOGIT_SCALE).to(config.dtype)


def _generation_config(folder: Path, config: OlaVlmConfig, tokenizer: Any | None) -> GenerationConfig:
    """Greedy decoding that ends where the language model or the published conversation does, and writes no marker."""
    file = folder / "generation_config.json"
    given = _read_json(file) if file.is_file() else {}
    ends = given.get("eos_token_id", config.llm.eos_token_id)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    settings: dict[str, Any] = {"pad_token_id": given.get("pad_token_id", config.llm.pad_token_id)}
    if tokenizer:
        ends += [tokenizer.eos_token_id, tokenizer.get_vocab().get(CONVERSATIONS[config.llm.model_type]["end"])]
        settings = {"pad_token_id": tokenizer.pad_token_id, "suppress_tokens": sorted({*config.image_block})}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=given.get("bos_token_id", config.llm.bos_token_id),
        eos_token_id=sorted({end for end in ends if end is not None}) or None,
        **settings,
    )


def _processor(tokenizer: Any, tower: str, config: OlaVlmConfig, published: Published) -> OlaVlmProcessor:
    """The processor, with the published view, and the published conversation if the tokenizer has its tokens."""
    template, language_model = None, config.llm.model_type
    image_size: int = config.vision_config.image_size  # type: ignore[union-attr]
    if CONVERSATIONS[language_model]["end"] in tokenizer.get_vocab():
        first = tokenizer("a").input_ids[0]
        template = chat_template(language_model, bos=first == tokenizer.bos_token_id)
    return OlaVlmProcessor(
        _load("vision tower", tower, AutoImageProcessor.from_pretrained),
        tokenizer,
        view=published.view,
        image_size=image_size,
        image_seq_length=config.image_seq_length,
        task_tokens=[(task.name, task.task_tokens) for task in config.task_configs],
        chat_template=template,
    )


def _tokenizer(text_config: PreTrainedConfig, folders: list[Path]) -> Any | None:
    """The language model's tokenizer, from the first folder that has one."""
    for folder in folders:
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
        if not files:
            continue
        if files[0].name == "tokenizer.model" and find_spec("sentencepiece") is None:
            raise OlaError(f"{files[0]}: is read by sentencepiece, missing here: pip install sentencepiece protobuf")
        # Given its configuration, transformers does not look for one among types it does not know.
        tokenizer = _load("tokenizer", str(folder), partial(AutoTokenizer.from_pretrained, config=text_config))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    return None


def _folder(what: str, where: str) -> Path:
    """A folder, or the files of a hub id."""
    if Path(where).is_dir():
        return Path(where)
    return Path(_load(what, where, partial(snapshot_download, allow_patterns=HUB_FILES)))


def _load(what: str, where: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(where)
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OlaError(
            f"{what} {where}: cannot be loaded: {reason}. Expected a folder in the hub's layout, or a hub id"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise OlaError(f"{file}: missing") from None
    except ValueError as error:
        raise OlaError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise OlaError(f"{file}: not a dictionary")
    return content
