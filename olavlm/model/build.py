"""Composing a student from a vision tower and a language model."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from olavlm.config import View
from olavlm.errors import OlaError
from olavlm.model.configuration import TOWERS, OlaVlmConfig, image_tokens, parse_encoders, parse_tasks
from olavlm.model.modeling import OlaVlmForConditionalGeneration
from olavlm.model.predictor import EmbeddingPredictor
from olavlm.model.processing import IMAGE_TOKEN, OlaVlmProcessor, encoder_token, task_token


def build_student(
    vision_tower: str,
    language_model: str,
    tasks: list[dict[str, Any]],
    *,
    encoders: Sequence[dict[str, Any]] = (),
    vision_feature_layer: int = -2,
    predictors_read_text: bool = True,
    view: View = "squash",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """A student with pretrained vision tower and language model; everything between and behind them is new.

    The new parts (projectors, task tokens, predictors, logit scales) depend on `seed` only.

    Args:
        vision_tower: hub id or folder of a CLIP or SigLIP model (whole or vision part), with preprocessor_config.json.
        language_model: hub id or folder of a causal language model with its tokenizer, in safetensors; or a GGUF file
            in one of these (`folder/model.gguf`, `organisation/name/model.gguf`), which has its tokenizer and chat
            template inside. Quantized weights are unpacked.
        tasks: see `OlaVlmConfig`.
        encoders: see `OlaVlmConfig`; teachers whose features the student is fed.
        vision_feature_layer: hidden states of the tower that are projected; −2 is the last layer's input.
        predictors_read_text: whether predictors attend to the text after the image.
        view: how images are made square.
        seed: of the new parameters.
        dtype: of all parameters.

    Raises:
        OlaError: weights that are absent, incomplete or of an unsupported kind; tasks or encoders that cannot be built.
    """
    tower = _load_tower(vision_tower, dtype)
    text_model, tokenizer = _load_language_model(language_model, dtype)
    image_processor = _load(
        "student.vision_tower",
        vision_tower,
        lambda: AutoImageProcessor.from_pretrained(vision_tower),  # type: ignore[no-untyped-call]
    )
    llm = text_model.config
    counts = [(task.name, task.task_tokens) for task in parse_tasks(tasks, llm.hidden_size, llm.num_hidden_layers)]
    fed = [(encoder.name, encoder.tokens) for encoder in parse_encoders([*encoders])]
    names = [IMAGE_TOKEN, *(task_token(task, i) for task, count in counts for i in range(count))]
    names += [encoder_token(encoder) for encoder, _ in fed]
    tokenizer.add_tokens(names, special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    image = image_tokens(tower.config)
    processor = OlaVlmProcessor(
        image_processor,
        tokenizer,
        view=view,
        image_size=tower.config.image_size,
        image_seq_length=image["image_seq_length"],
        task_tokens=counts,
        encoder_tokens=fed,
    )
    config = OlaVlmConfig(
        vision_config=tower.config,
        text_config=text_model.config,
        image_token_index=processor.image_token_id,
        vision_feature_layer=vision_feature_layer,
        **image,
        tasks=tasks,
        task_token_ids=processor.task_token_ids,
        predictors_read_text=predictors_read_text,
        encoders=[*encoders],
        encoder_token_ids=processor.encoder_token_ids,
        dtype=dtype,
    )
    model = _compose(config, tower, text_model, len(tokenizer), seed)
    for parameter in model.parameters():  # not `model.to`: rotary frequencies, which are buffers, stay in fp32
        parameter.data = parameter.data.to(dtype)
    model.generation_config = _generation_config(text_model, processor)
    model.eval()  # type: ignore[no-untyped-call]
    return model, processor


def _compose(
    config: OlaVlmConfig, tower: nn.Module, text_model: Any, vocabulary: int, seed: int
) -> OlaVlmForConditionalGeneration:
    """The student's modules around the loaded ones; built without memory first, so that nothing large is held twice."""
    with torch.device("meta"):
        model = OlaVlmForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = text_model.get_decoder()
    model.lm_head = text_model.get_output_embeddings()
    projector = model.model.multi_modal_projector
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in (projector, model.task_tokens, model.predictors, model.logit_scales, model.encoder_projectors):
            part.to_empty(device="cpu")
        predictors = [module for module in model.predictors.modules() if isinstance(module, EmbeddingPredictor)]
        # The projector's layers keep torch's fan-in initialisation, as LLaVA's do.
        # Those of encoders come last: students that differ in nothing else have all other parameters in common.
        encoders = [module for module in model.encoder_projectors.modules() if isinstance(module, nn.Linear)]
        parts = (projector.linear_1, projector.linear_2, model.task_tokens, model.logit_scales, *predictors, *encoders)
        for module in parts:
            module.reset_parameters()
        _grow_vocabulary(model, vocabulary)
    return model


def _grow_vocabulary(model: OlaVlmForConditionalGeneration, size: int) -> None:
    """Room for the added tokens, each with the mean embedding; a vocabulary padded beyond its tokenizer keeps its size.

    The input rows are never read (image features and task tokens take their place); the output rows are no answer to
    anything and `generate` suppresses them, but they are part of every softmax and should be unremarkable.
    """
    old = int(model.config.llm.vocab_size)
    if size > old:
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.lm_head):
            weight = module.get_parameter("weight")
            weight[old:] = weight[:old].float().mean(0).to(weight.dtype)


def _generation_config(text_model: Any, processor: OlaVlmProcessor) -> GenerationConfig:
    """Greedy decoding that ends where the language model's does and never writes an image or task token."""
    given, tokenizer = text_model.generation_config, processor.tokenizer
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=given.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if given.eos_token_id is None else given.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted({*processor.image_block}),
    )


def _load_tower(weights: str, dtype: torch.dtype) -> Any:
    """The vision part of a CLIP or SigLIP checkpoint."""
    key = "student.vision_tower"
    config = _load(key, weights, lambda: AutoConfig.from_pretrained(weights))
    config = getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise OlaError(
            f"{key}: {_where(weights)} holds a {config.model_type!r} model; expected CLIP or SigLIP, of a fixed "
            "resolution"
        )
    return _load_model(key, weights, MODEL_MAPPING[type(config)], config=config, dtype=dtype)


def split_gguf(language_model: str) -> tuple[str, dict[str, str]]:
    """Where a language model lies, and what else transformers' `from_pretrained` needs to know if it is a GGUF file.

    What ends in ``.gguf`` is a file in the folder, or the repository of the hub, that is named before the last slash.
    """
    if not language_model.endswith(".gguf"):
        return language_model, {}
    path = Path(language_model)
    return str(path.parent), {"gguf_file": path.name}


def _load_language_model(language_model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model and its tokenizer."""
    key = "student.language_model"
    weights, gguf = split_gguf(language_model)
    options: dict[str, Any] = {**gguf}
    if gguf:
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise OlaError(f"{key}: {language_model} is read by {' and '.join(missing)}: pip install 'olavlm[gguf]'")
        from transformers import GgufConfig  # newer than what all else needs; the extra asks for it

        options["quantization_config"] = GgufConfig(dequantize=True)
    model = _load_model(key, weights, AutoModelForCausalLM, dtype=dtype, **options)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")) or getattr(head, "bias", None) is not None:
        raise OlaError(
            f"{key}: {_where(weights)} holds a {model.config.model_type!r} model; expected a decoder with `layers`, "
            "a final `norm` and a head without bias, as Llama, Mistral, Qwen and Phi-3 have"
        )
    with torch.no_grad():
        out = model(torch.arange(4)[None], output_hidden_states=True)  # 0 alone is padding to some, and all zeros
        if not torch.equal(head(out.hidden_states[-1]).float(), out.logits.float()):
            raise OlaError(
                f"{key}: {_where(weights)} holds a {model.config.model_type!r} model, which scales or caps what its "
                "head gives; a student, as LLaVA, has the head alone"
            )
    return model, _load(key, weights, lambda: AutoTokenizer.from_pretrained(weights, **gguf))


def _load_model(key: str, weights: str, model_class: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained`, from safetensors (or GGUF), refusing a checkpoint with parts missing."""
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    model, info = _load(key, weights, lambda: model_class.from_pretrained(weights, output_loading_info=True, **kwargs))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise OlaError(f"{key}: {_where(weights)} lacks {len(missing)} tensors, among them {missing[0]}")
    return model


def _load(key: str, weights: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OlaError(
            f"{key}: cannot load {_where(weights)}: {reason}. Expected a folder in the hub's layout with safetensors, "
            f"or a hub id; to fetch one: hf download {weights if not Path(weights).exists() else '<hub id>'}"
        ) from None


def _where(weights: str) -> str:
    return f"folder {weights}" if Path(weights).exists() else f"{weights!r} (no such folder here; taken as a hub id)"
