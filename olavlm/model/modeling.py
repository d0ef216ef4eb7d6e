"""`OlaVlmForConditionalGeneration`: transformers' LLaVA plus task tokens and embedding predictors.

Or, as the multi-encoder baseline, plus teachers' features as more tokens of every image.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from olavlm.errors import OlaError
from olavlm.model.configuration import EncoderConfig, OlaVlmConfig
from olavlm.model.distill import EmbeddingStack, LogitScales, TaskTokens
from olavlm.model.layout import ImageLayout, find_images
from olavlm.model.predictor import EmbeddingPredictor

#: Parts of the student by prefix of the parameter name, as configurations name them.
PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "encoder_projectors."),
    "language_model": ("model.language_model.", "lm_head."),
    "task_tokens": ("task_tokens.",),
    "predictors": ("predictors.",),
    "logit_scales": ("logit_scales.",),
}


@dataclass
class OlaVlmOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output and, where asked for, the predicted embeddings.

    ``predictions[task][layer]`` is (n, queries, width) for the n images of the batch in row-major order; n may be 0.
    """

    predictions: dict[str, dict[int, Tensor]] | None = None


class OlaVlmForConditionalGeneration(EmbeddingStack, LlavaForConditionalGeneration):  # type: ignore[no-untyped-call]
    """The student: vision encoder → projector → language model, with task tokens behind every image.

    The task tokens' ids mark positions only: what the language model reads there are rows of `task_tokens`. Predictors
    run only in ``forward(..., predict=True)``, never in `generate`.

    The stack behind the vision encoder runs from given embeddings as well; everything there is to compare or to learn:

        out = model(input_ids=ids, inputs_embeds=embeds, labels=labels, predict=True, output_hidden_states=True)
        out.hidden_states[layer], out.predictions[task][layer], out.loss  # the loss is that of the text alone
        embedding_losses(out.predictions, targets, model.logit_scales, weights, contrastive)

    A student whose configuration has `encoders` needs the teachers' features wherever it needs the images:

        model.generate(**inputs, encoder_features={"depth": depth, "seg": seg})  # each (n, tokens, width)
    """

    config_class = OlaVlmConfig
    config: OlaVlmConfig
    _can_compile_fullgraph = False  # positions are found by looking at the ids

    def __init__(self, config: OlaVlmConfig) -> None:
        super().__init__(config)
        self.add_stack(config.task_configs, config.llm.hidden_size, config.predictors_read_text)
        self.encoder_projectors = nn.ModuleDict(
            {encoder.name: _projector(encoder, config.llm.hidden_size) for encoder in config.encoder_configs}
        )
        self._captures: list[tuple[set[int], dict[int, Tensor]]] = []  # what is being collected, innermost last
        self._hooked: dict[int, nn.Module] = {}
        self._listen({layer for task in self.tasks for layer in task.layers})
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no checkpoint provides: task tokens N(0, 1), logit scales 2, predictors by fan-in.

        Called for every module outside `self.model`, children first; transformers guards what has been loaded.
        """
        ours = isinstance(module, EmbeddingPredictor | TaskTokens | LogitScales | nn.Linear | nn.LayerNorm)
        if ours and module is not self.lm_head:
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]

    def embed(
        self, input_ids: Tensor, layout: ImageLayout, image_features: Tensor, encoder_tokens: Tensor | None = None
    ) -> Tensor:
        """The language model's input.

        Args:
            input_ids: (B, L) int64.
            layout: `find_images` of them.
            image_features: (n, image_seq_length, hidden), the projector's output.
            encoder_tokens: `project_features`, of a student with encoders.

        Returns:
            (B, L, hidden). Image features and task tokens stay part of the graph when the batch has no image.

        Raises:
            OlaError: another number of images, or of tokens of an image, than the ids have room for.
        """
        if image_features.shape[0] != layout.images:
            raise OlaError(
                f"pixel_values: {image_features.shape[0]} images; the input_ids have room for {layout.images}"
            )
        if image_features.shape[1] != self.config.image_seq_length:
            raise OlaError(
                f"image features: {image_features.shape[1]} tokens per image; image_seq_length says "
                f"{self.config.image_seq_length}"
            )
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        parts = [image_features] if encoder_tokens is None else [image_features, encoder_tokens]
        parts.append(self.inserted_tokens().to(embeds).expand(layout.images, -1, -1))
        block = torch.cat([part.to(embeds.dtype) for part in parts], dim=1)
        return embeds.masked_scatter(layout.special[..., None], block)

    def image_features(self, pixel_values: Tensor | None) -> Tensor:
        """Projected features of each image, (n, 3, S, S) → (n, image_seq_length, hidden); n = 0 for None."""
        if pixel_values is not None and pixel_values.shape[0]:
            return torch.stack(list(self.get_image_features(pixel_values, return_dict=True).pooler_output))
        # Through the projector all the same, so that a text-only batch gives it a gradient (of zero), as DDP needs.
        projector = self.model.multi_modal_projector
        features = projector.linear_1.weight.new_empty(0, self.config.image_seq_length, projector.linear_1.in_features)
        empty: Tensor = projector(features)
        return empty

    def project_features(self, encoder_features: Mapping[str, Tensor] | None, images: int) -> Tensor | None:
        """The tokens of the teachers' features that the student is fed, encoder after encoder.

        Args:
            encoder_features: encoder → (n, tokens, width), any floating dtype; None without images.
            images: n, how many images the batch has.

        Returns:
            (n, tokens of all encoders, hidden); without images n = 0, and part of the graph all the same. None for a
            student without encoders.

        Raises:
            OlaError: features that are missing, of another shape, or of no encoder of this student.
        """
        given, encoders = encoder_features or {}, self.config.encoder_configs
        if unknown := given.keys() - {encoder.name for encoder in encoders}:
            known = ", ".join(encoder.name for encoder in encoders) or "none"
            raise OlaError(
                f"encoder_features.{min(unknown)}: this student is fed no such features; its encoders: {known}"
            )
        tokens = []
        for encoder in encoders:
            projector = self.encoder_projectors[encoder.name]
            weight = next(projector.parameters())
            features, shape = given.get(encoder.name), (images, encoder.tokens, encoder.width)
            if features is None and images == 0:
                features = weight.new_empty(shape)
            if features is None or features.shape != shape:
                found = "missing" if features is None else str(tuple(features.shape))
                raise OlaError(
                    f"encoder_features.{encoder.name}: {found}; this student is fed the {encoder.name} teacher's "
                    f"features of every image, expected {shape}"
                )
            tokens.append(projector(features.to(weight)))
        return torch.cat(tokens, dim=1) if tokens else None

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, which refuses a checkpoint that is not exactly this model's.

        A configuration without a predictor leaves those of the checkpoint unread. With ``output_loading_info=True``
        what is missing is initialised like new, what is too much is left out, and both are reported beside the model.

        Raises:
            OlaError: tensors that are missing, unknown or of another shape; a damaged file.
        """
        where = args[0] if args else kwargs.get("pretrained_model_name_or_path", "checkpoint")
        if not output_loading_info:
            kwargs["ignore_mismatched_sizes"] = True  # reported with everything else
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise OlaError(f"{where}: cannot be loaded, a file of weights is damaged: {error}") from None
        model, info = loaded
        for module in model.predictors.modules():
            if isinstance(module, EmbeddingPredictor):
                module.freeze_unused()  # transformers makes every loaded parameter trainable
        if output_loading_info:
            return loaded
        unread = () if any(task.layers for task in model.tasks) else PARTS["predictors"]
        missing = sorted(info["missing_keys"])
        unknown = sorted(name for name in info["unexpected_keys"] if not name.startswith(unread))
        faults = [f"lacks {len(missing)} tensors, among them {missing[0]}"] if missing else []
        faults += [f"has {len(unknown)} unknown tensors, among them {unknown[0]}"] if unknown else []
        faults += [
            f"{name} is {tuple(found)}, expected {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]
        ][:1]
        if faults:
            raise OlaError(f"{where}: {'; '.join(faults)}")
        return model

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """transformers' own, for beams and samples; here every copy of a row brings all of the row's images along."""
        pixel_values, features = kwargs.pop("pixel_values", None), kwargs.pop("encoder_features", None)
        ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None and input_ids is not None:
            row = find_images(input_ids, self.config).row
            if 0 < len(row) == len(pixel_values):  # else `forward` refuses
                copy = torch.arange(expand_size, device=row.device).repeat_interleave(len(row))
                order = (row.repeat(expand_size) * expand_size + copy).argsort(stable=True) % len(row)
                pixel_values = pixel_values[order.to(pixel_values.device)]
                features = {
                    name: of[order.to(of.device)] if len(of) == len(row) else of
                    for name, of in (features or {}).items()
                }
        kwargs |= {"pixel_values": pixel_values, "encoder_features": features}
        return ids, kwargs

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, which gives images to the first of the passes only; here their features as well."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("pixel_values") is None:
            inputs.pop("encoder_features", None)
        return inputs

    @contextmanager
    def capture(self, layers: set[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the hidden states after the named decoder layers (1-based) of the forward passes inside the block.

        The last layer's are taken after the final norm. Hooks on just these modules: nothing else is kept alive, and no
        position in a tuple of outputs can shift.

        Raises:
            OlaError: a layer that the language model has not.
        """
        depth = self.config.llm.num_hidden_layers
        if layers - set(range(1, depth + 1)):
            raise OlaError(f"layers: {sorted(layers)}; expected numbers from 1 to {depth}, the number of layers")
        self._listen(layers)
        hidden: dict[int, Tensor] = {}
        self._captures.append((layers, hidden))
        try:
            yield hidden
        finally:
            self._captures.pop()

    def _listen(self, layers: set[int]) -> None:
        """Hook these layers once and for all: a compiled graph would not notice hooks that come and go."""
        decoder = self.model.language_model
        for layer in layers:
            last = layer == self.config.llm.num_hidden_layers
            module = decoder.norm if last else decoder.layers[layer - 1]
            if self._hooked.get(layer) is not module:
                self._hooked[layer] = module
                module.register_forward_hook(partial(self._keep, layer))

    def _keep(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        for layers, hidden in self._captures:
            if layer in layers:
                hidden[layer] = output[0] if isinstance(output, tuple) else output

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        predict: bool = False,
        encoder_features: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> OlaVlmOutput:
        """Run the student.

        Args:
            input_ids: (B, L) int64 with whole image blocks, as `OlaVlmProcessor` writes them.
            pixel_values: (n, 3, S, S) of all images of the batch in row-major order; None or n = 0 for text only.
            attention_mask: (B, L), or what the language model's attention takes (then without `predict`).
            inputs_embeds: (B, L, hidden), used as they are; `input_ids` beside them only tell where the images are.
            labels: (B, L) int64, −100 where nothing is to be learned; gives `loss`, the mean next-token cross-entropy.
            predict: also run the predictors on the captured layers; `predictions` of the output.
            encoder_features: encoder → (n, tokens, width) of the same images, for a student with encoders.

        Raises:
            OlaError: incomplete image blocks, images or features that do not match them, `predict` without `input_ids`,
                arguments of different lengths, sequences longer than the language model's context.
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask, predict)
        layout = None if input_ids is None else find_images(input_ids, self.config)
        if inputs_embeds is None and input_ids is not None and layout is not None:
            encoder_tokens = self.project_features(encoder_features, layout.images)
            inputs_embeds = self.embed(input_ids, layout, self.image_features(pixel_values), encoder_tokens)
        layers = {layer for task in self.tasks for layer in task.layers} if predict else set()
        if past_key_values is not None:  # newer versions of transformers call it `cache`, and take one name only
            kwargs["past_key_values"] = past_key_values
        without_cache = kwargs.get("use_cache") is False and not {"past_key_values", "cache"} & kwargs.keys()
        with self.capture(layers) as hidden:
            kwargs["return_dict"] = True
            output = super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=None if without_cache and _only_behind(attention_mask) else attention_mask,
                position_ids=position_ids,
                labels=labels,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        predictions = self.predict(hidden, layout, attention_mask) if predict and layout else None
        return OlaVlmOutput(**output, predictions=predictions)

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, predict: bool
    ) -> None:
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise OlaError("forward: neither input_ids nor inputs_embeds given")
        shape, context = tuple(given.shape[:2]), self.config.llm.max_position_embeddings
        if predict and input_ids is None:
            raise OlaError("forward(predict=True): input_ids missing; they tell where the images are")
        if input_ids is not None and input_ids.shape != shape:
            raise OlaError(f"input_ids: shape {tuple(input_ids.shape)}; expected that of the inputs_embeds, {shape}")
        if predict and attention_mask is not None and attention_mask.shape != shape:
            raise OlaError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; predict=True needs the sequences' {shape}"
            )
        if shape[1] > context:
            raise OlaError(f"input_ids: {shape[1]} tokens; the language model's context has {context}")


def parameter_groups(model: OlaVlmForConditionalGeneration) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The student's parameters by part: what a stage may train, named as configurations name it.

    Left out are the depth predictors' ``linear_2`` and ``linear_3``: no loss reaches them (see `EmbeddingPredictor`).
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if name.startswith("predictors.") and name.split(".")[3] in ("linear_2", "linear_3"):
            continue
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        groups[part].append((name, parameter))
    return groups


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at the mask
def _only_behind(attention_mask: Tensor | None) -> bool:
    """Whether all padding of a (B, L) mask is behind the tokens, where no causal language model looks.

    Then no mask need be given: what stands at the tokens is the same, and attention takes its causal kernel, which
    skips half of the products and reads no mask of (B, 1, L, L).
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return False
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _projector(encoder: EncoderConfig, hidden_size: int) -> nn.Sequential:
    """Two layers with a GELU between them, as LLaVA's own projector has."""
    return nn.Sequential(nn.Linear(encoder.width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
