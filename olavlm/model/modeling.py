"""`OlaVlmForConditionalGeneration`: transformers' LLaVA plus task tokens and embedding predictors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from olavlm.errors import OlaError
from olavlm.model.configuration import OlaVlmConfig, TaskConfig
from olavlm.model.layout import ImageLayout, find_images
from olavlm.model.predictor import EmbeddingPredictor

#: Parts of the student by prefix of the parameter name, as configurations name them.
PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
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


class TaskTokens(nn.ParameterDict):
    """Each task's learnable table, N(0, 1)."""

    def reset_parameters(self) -> None:
        """Draw anew."""
        for table in self.parameters():
            nn.init.normal_(table)


class LogitScales(nn.ParameterDict):
    """Each task's learnable log-scale of the cosines in its contrastive loss."""

    def reset_parameters(self) -> None:
        """Back to the published start."""
        for scale in self.parameters():
            nn.init.constant_(scale, 2.0)


class OlaVlmForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[no-untyped-call]
    """The student: vision encoder → projector → language model, with task tokens behind every image.

    The task tokens' ids mark positions only: what the language model reads there are rows of `task_tokens`. Predictors
    run only in ``forward(..., predict=True)``, never in `generate`.
    """

    config_class = OlaVlmConfig
    config: OlaVlmConfig
    _can_compile_fullgraph = False  # positions are found by looking at the ids

    def __init__(self, config: OlaVlmConfig) -> None:
        super().__init__(config)
        hidden = config.llm.hidden_size
        tasks = config.task_configs
        # Held as parameters: rebuilt as `nn.Parameter(...).to(dtype)` they would neither be trained nor saved.
        self.task_tokens = TaskTokens({t.name: torch.empty(t.table_rows, hidden) for t in tasks if t.task_tokens})
        self.predictors = nn.ModuleDict(
            {t.name: nn.ModuleDict({str(layer): _predictor(t, hidden) for layer in t.layers}) for t in tasks}
        )
        # One element rather than a scalar: `fully_shard` refuses scalar parameters.
        self.logit_scales = LogitScales({t.name: torch.empty(1) for t in tasks})
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

    def inserted_tokens(self) -> Tensor:
        """The embeddings inserted behind every image, all tasks in order: (sum of task_tokens, hidden)."""
        rows = []
        for task in self.config.task_configs:
            if task.task_tokens:
                table = self.task_tokens[task.name]
                # Dense: runs of queries / task_tokens rows, averaged. Pooled: runs of one row.
                rows.append(table.unflatten(0, (task.task_tokens, -1)).mean(1))
        return torch.cat(rows) if rows else torch.empty(0, self.config.llm.hidden_size, device=self.device)

    def embed(self, input_ids: Tensor, layout: ImageLayout, image_features: Tensor) -> Tensor:
        """The language model's input.

        Args:
            input_ids: (B, L) int64.
            layout: `find_images` of them.
            image_features: (n, image_seq_length, hidden), the projector's output.

        Returns:
            (B, L, hidden). Image features and task tokens stay part of the graph when the batch has no image.

        Raises:
            OlaError: another number of images than the ids have room for.
        """
        if image_features.shape[0] != layout.images:
            raise OlaError(
                f"pixel_values: {image_features.shape[0]} images; the input_ids have room for {layout.images}"
            )
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        block = torch.cat(
            [
                image_features.to(embeds.dtype),
                self.inserted_tokens().to(embeds.dtype).expand(layout.images, -1, -1),
            ],
            dim=1,
        )
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

    @contextmanager
    def capture(self, layers: set[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the hidden states after the named decoder layers (1-based) of the forward passes inside the block.

        The last layer's are taken after the final norm. Hooks on just these modules: nothing else is kept alive, and no
        position in a tuple of outputs can shift.
        """
        decoder, hidden = self.model.language_model, {}

        def hook(layer: int) -> Any:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                hidden[layer] = output[0] if isinstance(output, tuple) else output

            return keep

        depth = self.config.llm.num_hidden_layers
        modules = {layer: decoder.norm if layer == depth else decoder.layers[layer - 1] for layer in layers}
        handles = [module.register_forward_hook(hook(layer)) for layer, module in modules.items()]
        try:
            yield hidden
        finally:
            for handle in handles:
                handle.remove()

    def predict(
        self, hidden: dict[int, Tensor], layout: ImageLayout, attention_mask: Tensor | None
    ) -> dict[str, dict[int, Tensor]]:
        """Every predictor's output: task → layer → (n, queries, width).

        Args:
            hidden: layer → (B, L, hidden), from `capture`.
            layout: where the images are.
            attention_mask: (B, L) or None.
        """
        predictions: dict[str, dict[int, Tensor]] = {}
        for task in self.config.task_configs:
            keys = layout.key_mask(
                attention_mask, task.name if task.task_tokens else None, self.config.predictors_read_text
            )
            predictions[task.name] = {}
            for layer in task.layers:
                states = layout.rows(hidden[layer])
                queries = None
                if task.task_tokens and task.kind == "dense":
                    queries = self.task_tokens[task.name][None]
                elif task.task_tokens:
                    image = torch.arange(layout.images, device=states.device)
                    queries = states[image[:, None], layout.columns(task.name)].mean(1, keepdim=True)
                predictor = self.predictors[task.name].get_submodule(str(layer))
                predictions[task.name][layer] = predictor(states, keys, queries)
        return predictions

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

        Raises:
            OlaError: incomplete image blocks, images that do not match them, `predict` without `input_ids`.
        """
        layout = None if input_ids is None else find_images(input_ids, self.config)
        if inputs_embeds is None:
            if input_ids is None or layout is None:
                raise OlaError("forward: neither input_ids nor inputs_embeds given")
            inputs_embeds = self.embed(input_ids, layout, self.image_features(pixel_values))
        if predict and layout is None:
            raise OlaError("forward(predict=True): input_ids missing; they tell where the images are")
        if predict and attention_mask is not None and attention_mask.shape != inputs_embeds.shape[:2]:
            raise OlaError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; "
                f"predict=True needs the sequences' {tuple(inputs_embeds.shape[:2])}"
            )
        layers = {layer for task in self.config.task_configs for layer in task.layers} if predict else set()
        with self.capture(layers) as hidden:
            kwargs["return_dict"] = True
            output = super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        predictions = self.predict(hidden, layout, attention_mask) if predict and layout else None
        return OlaVlmOutput(**output, predictions=predictions)


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


def _predictor(task: TaskConfig, hidden: int) -> EmbeddingPredictor:
    own = None if task.task_tokens else task.queries
    return EmbeddingPredictor(hidden, task.dim, task.width, own, task.depth_mlps)
