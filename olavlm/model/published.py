"""The published OLA-VLM checkpoints: what their configuration says, and which of their tensors is which of ours.

Three kinds, told apart by ``model_type`` and followed by the language model's name (``llama``, ``phi3``):

- ``ola_…``: after pretraining, with predictors. Its teachers sit inside as submodules; they are not the student's.
- ``llava_…``: after visual pretraining or instruction tuning, task tokens without predictors; or a plain LLaVA.
- ``probe_dsg_llava_…``: one predictor per layer with latents of its own.

Everything here is a function of the configuration and the tensors' shapes; no value is read.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from olavlm.config import View
from olavlm.errors import OlaError

Shapes = Mapping[str, tuple[int, ...]]

LANGUAGE_MODELS = ("llama", "phi3")

#: Tasks, and the prefix of their keys in the configuration's ``image_<task>``.
TASKS = {"gen": "img", "depth": "depth", "seg": "seg"}

#: What the published code can be set to and this student cannot: key → (published default, what is supported).
FIXED: dict[str, tuple[Any, Any]] = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_patch_merge_type": ("flat", "flat"),
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_use_im_start_end": (False, False),
}
PREDICTOR_FIXED = {"depth": 1, "dim_head": 32, "num_heads": 4, "ff_mult": 1}

#: ``image_aspect_ratio`` → view. Unset (as after pretraining), CLIP's own processor crops the centre.
VIEWS: dict[Any, View] = {"pad": "pad", "square": "center_crop", None: "center_crop"}

#: Tensors that are no part of the student.
DROPPED = {
    r"da_v2_head\.": "depth teacher's decoder",
    r"dav2_backbone\.": "depth teacher (Depth Anything V2)",
    r"oneformer\.": "segmentation teacher (OneFormer)",
    r"gen_encoder\.": "generation teacher (unCLIP's image encoder)",
    r".*rotary_emb\.inv_freq$": "buffer, computed from the configuration",
    r".*embeddings\.position_ids$": "buffer, computed from the configuration",
}

#: Modules of a predictor: ours → published, below ``image_<task>_heads.<i>.projector``.
PREDICTOR = {
    "latents": "latents",
    "project_in": "proj_in",
    "project_out": "proj_out",
    "norm_out": "norm_out",
    "norm_hidden": "layers.0.0.norm1",
    "norm_latents": "layers.0.0.norm2",
    "to_query": "layers.0.0.to_q",
    "to_key_value": "layers.0.0.to_kv",
    "to_out": "layers.0.0.to_out",
    "norm_mlp": "layers.0.1.0",
    "mlp_up": "layers.0.1.1",
    "mlp_down": "layers.0.1.3",
}

#: The published conversations: what ends a turn, what opens each, and the system text of one that has none.
CONVERSATIONS = {
    "llama": {
        "end": "<|eot_id|>",
        "system": "<|start_header_id|>system<|end_header_id|>\n\n",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "text": "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    },
    "phi3": {
        "end": "<|end|>",
        "system": "<|system|>\n",
        "user": "\n<|user|>\n",
        "assistant": "\n<|assistant|>\n",
        "text": "You are a helpful AI assistant.",
    },
}
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}{{ @system + messages[0]['content'] + @end }}"
    "{% else %}{{ @system + @text + @end }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ @user + message['content'] + @end }}"
    "{% elif message['role'] == 'assistant' %}{{ @assistant + message['content'] + @end }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ @assistant }}{% endif %}"
)


@dataclass(frozen=True)
class Published:
    """What a published configuration says about the student."""

    text_config: PreTrainedConfig
    tasks: list[dict[str, Any]]  # as `OlaVlmConfig` takes them, in the order of the sequence
    predictors_read_text: bool
    vision_tower: str | None  # hub id
    vision_feature_layer: int
    view: View
    has_logit_scales: bool


def read_config(config: Mapping[str, Any], shapes: Shapes, where: str) -> Published:
    """Read a published configuration.

    Sizes are taken from the configuration's own keys and, where it has none, from the tensors.

    Args:
        config: the content of ``config.json``.
        shapes: of every tensor of the checkpoint.
        where: names the configuration in messages.

    Raises:
        OlaError: something this student cannot be, a key missing, or a contradiction to the tensors.
    """
    model_type = str(config.get("model_type"))
    kind, _, language_model = model_type.rpartition("_")
    if kind not in ("ola", "llava", "probe_dsg_llava") or language_model not in LANGUAGE_MODELS:
        raise OlaError(
            f"{where}: model_type: {model_type!r}; expected ola_llama, ola_phi3, llava_llama, llava_phi3 or a probe's"
        )
    for key, (default, supported) in FIXED.items():
        _check(where, key, config.get(key, default), supported)
    aspect = config.get("image_aspect_ratio")
    if aspect not in VIEWS:
        raise OlaError(f"{where}: image_aspect_ratio: {aspect!r}; expected 'pad' or 'square'")
    tower = config.get("mm_vision_tower")
    if "convnext" in str(tower).lower():
        raise OlaError(f"{where}: mm_vision_tower: {tower!r}; expected a CLIP ViT, this student has no ConvNeXt tower")
    text_config = _text_config(config, language_model, where)
    return Published(
        text_config=text_config,
        tasks=_read_tasks(config, shapes, kind, text_config.num_hidden_layers, where),
        predictors_read_text=kind.startswith("probe") or bool(config.get("pass_text_to_aux", True)),
        vision_tower=tower,
        vision_feature_layer=int(config.get("mm_vision_select_layer", -2)),
        view=VIEWS[aspect],
        has_logit_scales=kind == "ola" and bool(config.get("use_contrastive", True)),
    )


def published_name(name: str, layers: Mapping[str, list[int]]) -> str:
    """The published name of one of the student's tensors.

    Args:
        name: ours, as `OlaVlmForConditionalGeneration.state_dict` has it.
        layers: of each task's predictors, in the order of the configuration: published predictors are numbered by it.
    """
    part, _, rest = name.partition(".")
    if part == "predictors":
        task, layer, module, *leaf = rest.split(".")
        head = f"image_{task}_heads.{layers[task].index(int(layer))}"
        inner = module if module.startswith("linear_") else f"projector.{PREDICTOR[module]}"
        return ".".join([head, inner, *leaf])
    if part == "task_tokens":
        return f"model.special_{rest}_tokens"
    if part == "logit_scales":
        return f"{rest}_logit_scale"
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name  # lm_head


def chat_template(language_model: str, bos: bool) -> str:
    """The published conversation as a chat template, beginning with the tokenizer's `bos_token` if asked for."""
    template = "{{ bos_token }}" * bos + CHAT_TEMPLATE
    for name, text in CONVERSATIONS[language_model].items():
        template = template.replace(f"@{name}", json.dumps(text))
    return template


def why_dropped(name: str) -> str | None:
    """Why a published tensor has no place in the student; None where it should have one."""
    return next((reason for pattern, reason in DROPPED.items() if re.match(pattern, name)), None)


def _text_config(config: Mapping[str, Any], language_model: str, where: str) -> PreTrainedConfig:
    """The language model's own keys, which the published configuration mixes with the others."""
    config_class = CONFIG_MAPPING[language_model]
    # use_cache is off because training had it off; a student decodes with it.
    own = (set(inspect.get_annotations(config_class)) | {"rope_theta", "rope_scaling"}) - {"use_cache"}
    try:
        return config_class(**{key: value for key, value in config.items() if key in own})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise OlaError(f"{where}: no configuration of a {language_model}: {' '.join(str(error).split())}") from None


def _read_tasks(config: Mapping[str, Any], shapes: Shapes, kind: str, depth: int, where: str) -> list[dict[str, Any]]:
    """The tasks in the order of their tokens."""
    probed = config.get("probe_mode")
    gen_tokens = shapes.get("model.special_gen_tokens", (None,))[0]
    tokens = 0 if probed else _agreed(where, "num_task_tokens", config.get("num_task_tokens"), gen_tokens, 0)
    has_tables = any(f"model.special_{task}_tokens" in shapes for task in TASKS)
    if kind == "llava" and not tokens and not has_tables:
        return []  # a plain LLaVA: nothing of the tasks is left
    mode = probed or config.get("aux_mode")
    if mode is None:
        if tokens or has_tables:
            raise OlaError(
                f"{where}: aux_mode: missing; expected the order of the task tokens, such as 'gen-depth-seg'"
            )
        mode = "gen-depth-seg"  # the published default; without task tokens the order has no meaning
    order = str(mode).split("-")
    if not set(order) <= TASKS.keys() or len(set(order)) != len(order):
        raise OlaError(f"{where}: aux_mode: {mode!r}; expected some of {', '.join(TASKS)}, joined by '-'")
    if tokens:
        # After pretraining the published code averages the tables whatever the format is called.
        given = config.get("task_token_format", "emb")
        if given not in (["expand_emb", "emb"] if kind == "ola" else ["expand_emb"]):
            raise OlaError(f"{where}: task_token_format: {given!r}; expected 'expand_emb'")
    return [_read_task(task, config, shapes, kind, tokens, depth, where) for task in order]


def _read_task(
    task: str, config: Mapping[str, Any], shapes: Shapes, kind: str, tokens: int, depth: int, where: str
) -> dict[str, Any]:
    """One task, as `OlaVlmConfig` takes it."""
    key = f"image_{task}"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise OlaError(f"{where}: {key}: {given!r}; expected a dictionary")
    for name, supported in PREDICTOR_FIXED.items():
        _check(where, f"{key}.{name}", given.get(name, supported), supported)
    heads = sorted({int(m[1]) for name in shapes if (m := re.match(rf"{key}_heads\.(\d+)\.", name))})
    head = f"{key}_heads.0."
    width, dim = shapes.get(head + "projector.proj_out.weight", (None, None))
    table = shapes.get(f"model.special_{task}_tokens", (None,))[0]
    queries = shapes.get(head + "projector.latents", (None, table if task != "gen" else 1))[1]
    has_mlps = head + "linear_1.0.weight" in shapes if heads else None
    layers = _read_layers(task, given, kind, depth, where) if kind != "llava" else []
    if len(layers) != len(heads):
        raise OlaError(
            f"{where}: {key}: model_type and {TASKS[task]}_layer_indices make it {len(layers)} predictors "
            f"(layers {', '.join(map(str, layers)) or 'none'}); the checkpoint has {len(heads)} {key}_heads"
        )
    return {
        "name": task,
        "kind": "pooled" if task == "gen" else "dense",
        "queries": _agreed(where, f"{key}.num_tokens", given.get("num_tokens"), queries),
        "width": _agreed(where, f"{key}.output_dim", given.get("output_dim"), width),
        "layers": layers,
        "task_tokens": tokens,
        "depth_mlps": task == "depth"
        and _agreed(where, f"{key}.use_intermediate_depth", given.get("use_intermediate_depth"), has_mlps, True),
        **({"dim": dim} if dim is not None else {}),
    }


def _read_layers(task: str, given: Mapping[str, Any], kind: str, depth: int, where: str) -> list[int]:
    """The layers that predictors sit behind, 1-based."""
    if kind != "ola":
        return list(range(1, depth + 1))
    key = f"image_{task}.{TASKS[task]}_layer_indices"
    text = given.get(f"{TASKS[task]}_layer_indices")
    if not re.fullmatch(r"\d+(-\d+)*", str(text)):
        raise OlaError(f"{where}: {key}: {text!r}; expected layers joined by '-', such as '18-20'")
    # "0" is what training writes for a task its --layer_indices leave out; index −1 then takes the last layer.
    return [int(layer) or depth for layer in str(text).split("-")]


def _agreed(where: str, key: str, given: Any, found: Any, default: Any = None) -> Any:
    """What the configuration and the tensors both say."""
    if given is not None and found is not None and given != found:
        raise OlaError(f"{where}: {key}: {given!r}; the tensors say {found!r}")
    value = next((value for value in (given, found, default) if value is not None), None)
    if value is None:
        raise OlaError(f"{where}: {key}: missing, and no tensor tells it")
    return value


def _check(where: str, key: str, found: Any, supported: Any) -> None:
    if found != supported:
        raise OlaError(f"{where}: {key}: {found!r}; expected {supported!r}, the only one this student has")
