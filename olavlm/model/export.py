"""A student as a stock LLaVA: a folder that serves wherever transformers' `LlavaForConditionalGeneration` does.

What the language model reads at the positions of task tokens is baked into the rows of their ids in the input
embeddings; the predictors are left out. Using the folder takes nothing of this package::

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    reply = model.generate(**processor(images=[image], text=text, return_tensors="pt"), max_new_tokens=64)

The chat template writes the task tokens behind every image, be it ``{"type": "image"}`` or an ``<image>`` in a text.
Whoever writes prompts without the template has to write `image_text` (``<image><gen_0>…<seg_7>``) for ``<image>``.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from olavlm.data.folder import new_folder
from olavlm.data.images import MEAN_COLOUR
from olavlm.errors import OlaError
from olavlm.model.configuration import OlaVlmConfig
from olavlm.model.modeling import OlaVlmForConditionalGeneration
from olavlm.model.processing import IMAGE_TOKEN, OlaVlmProcessor, contents_as_text, task_token


def export_plain(model: OlaVlmForConditionalGeneration, processor: OlaVlmProcessor, out: Path) -> None:
    """Write a student as a stock LLaVA folder that generates the same tokens; the module's docstring shows its use.

    Dtypes are kept. Tied embeddings are untied: what is read at a task token is no row of the head. The ids of images
    and task tokens are suppressed in ``generation_config.json``. Images are brought into the student's view by the
    settings of a stock image processor, exactly so with Pillow; where torchvision is installed transformers resizes
    with that, and pixels may differ by a rounding step.

    Args:
        model: stays as it is.
        processor: the model's own, in the view to be used.
        out: a new folder.

    Raises:
        OlaError: the student is fed teachers' features, which no stock LLaVA is; the processor is not the model's, its
            view cannot be had from a stock image processor, or its tokenizer cannot be kept from adding special tokens
            to a rendered prompt.
    """
    if encoders := _fed(model.config):
        raise OlaError(f"a student that is fed teachers' features ({encoders}) has no form as a stock LLaVA")
    if processor.image_block != model.config.image_block:
        raise OlaError("processor: its ids of image and task tokens are not the model's; expected the model's own")
    template = contents_as_text(image_text(processor)) + str(processor.chat_template)
    stock_processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        _image_processor(processor),
        _tokenizer(processor, template),
        patch_size=model.config.vision_config.patch_size,  # type: ignore[union-attr]
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        # What "default" takes off again is the CLS token.
        num_additional_image_tokens=int(model.config.vision_feature_select_strategy == "default"),
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )
    stock = _stock_model(model)
    with new_folder(out) as folder:
        stock.save_pretrained(folder)
        stock_processor.save_pretrained(folder)


def load_for_inference(
    folder: Path, predictors: bool = False
) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    """The student in a folder as it answers and is exported: without `predictors` these are neither built nor read.

    Raises:
        OlaError: no student there, or one with tensors missing, unknown or damaged; or one that is fed teachers'
            features, which whoever has but an image cannot give it.
    """
    if not (folder / "config.json").is_file():
        raise OlaError(f"{folder}: no model here, config.json is missing")
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
        if model_type != OlaVlmConfig.model_type:
            raise OlaError(
                f"{folder}/config.json: model_type: {model_type!r}; expected {OlaVlmConfig.model_type!r} "
                "(published checkpoints are converted first: python -m olavlm convert)"
            )
        config = OlaVlmConfig.from_pretrained(folder)
        if encoders := _fed(config):
            raise OlaError(
                f"{folder}: this student is fed teachers' features ({encoders}) beside every image, which only a "
                "target store has; a pipeline trains and evaluates it, but it cannot be asked, seen or exported alone"
            )
        if not predictors:
            config.tasks = [task | {"layers": []} for task in config.tasks or []]
        model = OlaVlmForConditionalGeneration.from_pretrained(folder, config=config)
        processor = OlaVlmProcessor.from_pretrained(folder)
    except OlaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OlaError(f"{folder}: cannot be loaded: {reason}") from None
    return model, processor


def image_text(processor: OlaVlmProcessor) -> str:
    """``<image>`` and the task tokens: what stands for an image in a prompt to the exported folder."""
    return IMAGE_TOKEN + "".join(task_token(task, i) for task, count in processor.task_tokens for i in range(count))


def _fed(config: OlaVlmConfig) -> str:
    """The encoders whose features the student is fed; empty without any."""
    return ", ".join(encoder.name for encoder in config.encoder_configs)


@torch.no_grad()
def _stock_model(model: OlaVlmForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The student's own parameters in a stock LLaVA, but for the embeddings: a copy, with the task tokens baked in."""
    settings = {name: getattr(model.config, name) for name in LlavaConfig.__annotations__ if name != "model_type"}
    settings |= {"text_config": copy.deepcopy(model.config.llm), "tie_word_embeddings": False, "dtype": model.dtype}
    settings["text_config"].tie_word_embeddings = False
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(LlavaConfig(**settings))
    wanted = stock.state_dict().keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    embeddings = model.get_input_embeddings().get_parameter("weight").clone()
    ids = [i for task in model.config.task_configs for i in (model.config.task_token_ids or {})[task.name]]
    embeddings[ids] = model.inserted_tokens().to(embeddings.dtype)
    state["model.language_model.embed_tokens.weight"] = embeddings
    stock.load_state_dict(state, assign=True)
    stock.generation_config = copy.deepcopy(model.generation_config)
    stock.generation_config.suppress_tokens = sorted({*model.config.image_block})
    return stock


def _image_processor(processor: OlaVlmProcessor) -> Any:
    """A stock image processor with the settings that give the student's view."""
    side = {"height": processor.image_size, "width": processor.image_size}
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    common = {"image_mean": mean, "image_std": std, "resample": Image.Resampling.BICUBIC, "crop_size": side}
    if processor.view == "center_crop":
        return CLIPImageProcessorPil(size={"shortest_edge": processor.image_size}, **common)
    if processor.view == "squash":
        return CLIPImageProcessorPil(size=side, do_center_crop=False, **common)
    colour = tuple(int(value * 255) for value in mean)  # what LLaVA's image processor pads with
    if colour != MEAN_COLOUR:
        raise OlaError(
            f"processor: view 'pad' pads with {MEAN_COLOUR}, a stock LLaVA with its image_mean, here {colour}; "
            "set another view, or export a student with CLIP's image_mean"
        )
    return LlavaImageProcessorPil(size=side, do_center_crop=False, do_pad=True, **common)


def _tokenizer(processor: OlaVlmProcessor, chat_template: str) -> Any:
    """A copy of the tokenizer that pads on the left and adds nothing to a prompt: the template writes all of it."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # only what a tokenizer was made with is saved
    tokenizer.chat_template = chat_template
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    added = tokenizer("").input_ids
    if added:
        raise OlaError(
            f"tokenizer: adds {tokenizer.convert_ids_to_tokens(added)} to every text, and cannot be told not to"
        )
    return tokenizer
