"""The embedding losses of a model, whichever it is: task tokens, predictors and logit scales, and how they are run.

The student is one such model (`olavlm.model.modeling`); `EmbeddingDistiller` stands beside any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from olavlm.errors import OlaError
from olavlm.model.configuration import TaskConfig, parse_tasks
from olavlm.model.layout import ImageLayout
from olavlm.model.losses import EmbeddingLosses, TaskTargets, embedding_losses
from olavlm.model.predictor import EmbeddingPredictor

#: Hidden states by layer: a dictionary, or what transformers returns as ``hidden_states`` (whose entry 0 is no layer).
HiddenStates = Mapping[int, Tensor] | Sequence[Tensor]

#: What a contrastive loss's log-scale starts from, as published.
INITIAL_LOGIT_SCALE = 2.0


class TaskTokens(nn.ParameterDict):
    """Each task's learnable table, N(0, 1)."""

    def reset_parameters(self) -> None:
        """Draw anew."""
        for table in self.parameters():
            nn.init.normal_(table)


class LogitScales(nn.ParameterDict):
    """Each task's learnable log-scale of the cosines in its contrastive loss."""

    def reset_parameters(self) -> None:
        """Back to `INITIAL_LOGIT_SCALE`."""
        for scale in self.parameters():
            nn.init.constant_(scale, INITIAL_LOGIT_SCALE)


class EmbeddingStack(nn.Module):
    """What a module learns beside a language model to predict the teachers' features from its hidden states."""

    tasks: list[TaskConfig]
    hidden_size: int
    read_text: bool
    task_tokens: TaskTokens
    predictors: nn.ModuleDict  # task → layer → EmbeddingPredictor
    logit_scales: LogitScales

    def add_stack(self, tasks: list[TaskConfig], hidden_size: int, read_text: bool) -> None:
        """Make the parameters; task tokens and logit scales are not initialised yet."""
        self.tasks, self.hidden_size, self.read_text = tasks, hidden_size, read_text
        # Held as parameters: rebuilt as `nn.Parameter(...).to(dtype)` they would neither be trained nor saved.
        self.task_tokens = TaskTokens({t.name: torch.empty(t.table_rows, hidden_size) for t in tasks if t.task_tokens})
        self.predictors = nn.ModuleDict(
            {t.name: nn.ModuleDict({str(layer): _predictor(t, hidden_size) for layer in t.layers}) for t in tasks}
        )
        # One element rather than a scalar: `fully_shard` refuses scalar parameters.
        self.logit_scales = LogitScales({t.name: torch.empty(1) for t in tasks})

    def inserted_tokens(self) -> Tensor:
        """The embeddings inserted behind every image, all tasks in order: (sum of task_tokens, hidden), own dtype."""
        rows = []
        for task in self.tasks:
            if task.task_tokens:
                table = self.task_tokens[task.name]
                # Dense: runs of queries / task_tokens rows, averaged. Pooled: runs of one row.
                rows.append(table.unflatten(0, (task.task_tokens, -1)).mean(1))
        return torch.cat(rows) if rows else torch.empty(0, self.hidden_size)

    def predict(
        self, hidden: HiddenStates, layout: ImageLayout, attention_mask: Tensor | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Every predictor's output: task → layer → (n, queries, width) for the layout's n images; n may be 0.

        Args:
            hidden: layer → (B, L, hidden), after that decoder layer; the last layer's after the final norm.
            layout: where the images are.
            attention_mask: (B, L), nonzero where a token is no padding; None where there is no padding.

        Raises:
            OlaError: hidden states, layout, mask and tasks that do not fit together.
        """
        states_of = dict(hidden if isinstance(hidden, Mapping) else enumerate(hidden))
        self._check(states_of, layout, attention_mask)
        predictions: dict[str, dict[int, Tensor]] = {}
        for task in self.tasks:
            keys = layout.key_mask(attention_mask, task.name if task.task_tokens else None, self.read_text)
            predictions[task.name] = {}
            for layer in task.layers:
                states = layout.rows(states_of[layer])
                queries = None
                if task.task_tokens and task.kind == "dense":
                    queries = self.task_tokens[task.name][None]
                elif task.task_tokens:
                    image = torch.arange(layout.images, device=states.device)
                    queries = states[image[:, None], layout.columns[task.name]].mean(1, keepdim=True)
                predictor = self.predictors[task.name].get_submodule(str(layer))
                predictions[task.name][layer] = predictor(states, keys, queries)
        return predictions

    def _check(self, hidden: Mapping[int, Tensor], layout: ImageLayout, attention_mask: Tensor | None) -> None:
        if attention_mask is not None and attention_mask.shape != layout.shape:
            raise OlaError(
                f"attention_mask: shape {tuple(attention_mask.shape)}; predictors need the sequences' {layout.shape}"
            )
        for task in self.tasks:
            columns = layout.columns.get(task.name)
            if task.task_tokens and (columns is None or columns.shape != (layout.images, task.task_tokens)):
                raise OlaError(
                    f"layout.columns.{task.name}: {'missing' if columns is None else tuple(columns.shape)}; expected "
                    f"{(layout.images, task.task_tokens)}, the columns of each image's task tokens"
                )
            for layer in task.layers:
                states = hidden.get(layer)
                if states is None or states.shape != (*layout.shape, self.hidden_size):
                    raise OlaError(
                        f"hidden[{layer}]: {'missing' if states is None else tuple(states.shape)}; task {task.name} "
                        f"reads this layer, expected {(*layout.shape, self.hidden_size)}"
                    )


class EmbeddingDistiller(EmbeddingStack):
    """The embedding losses for a model of one's own.

    Two ways to use it. With ``task_tokens: 0`` nothing about the host changes. With task tokens, `inserted_tokens` go
    behind every image's embeddings, in training and at inference, with label −100. Its parameters are trained beside
    the host's and have the names they have in a student's checkpoint.

        distiller = EmbeddingDistiller(tasks, host.config.hidden_size, host.config.num_hidden_layers)
        out = host(input_ids, …, labels=labels, output_hidden_states=True)
        layout = ImageLayout(len(input_ids), row=torch.arange(n), image=input_ids == image_token, columns={})
        targets = {"depth": TaskTargets.of_batch(depth)}  # (n, queries, width)
        loss = out.loss + distiller(out.hidden_states, layout, targets, weights={"depth": 0.5}).total

    Args:
        tasks: as `OlaVlmConfig` takes them.
        hidden_size: width of the host's hidden states.
        num_layers: how many decoder layers it has.
        read_text: whether predictors attend to the text behind the image.

    Raises:
        OlaError: a task that cannot be built.
    """

    def __init__(self, tasks: list[dict[str, Any]], hidden_size: int, num_layers: int, read_text: bool = True) -> None:
        super().__init__()
        self.add_stack(parse_tasks(tasks, hidden_size, num_layers), hidden_size, read_text)
        self.task_tokens.reset_parameters()
        self.logit_scales.reset_parameters()

    def forward(
        self,
        hidden: HiddenStates,
        layout: ImageLayout,
        targets: Mapping[str, TaskTargets],
        weights: Mapping[str, float],
        contrastive: float = 0.3,
        attention_mask: Tensor | None = None,
    ) -> EmbeddingLosses:
        """`predict`, then `embedding_losses`; see both for arguments and errors. Published: 0.5 for each task."""
        predictions = self.predict(hidden, layout, attention_mask)
        return embedding_losses(predictions, targets, dict(self.logit_scales.items()), weights, contrastive)


def _predictor(task: TaskConfig, hidden_size: int) -> EmbeddingPredictor:
    own = None if task.task_tokens else task.queries
    return EmbeddingPredictor(hidden_size, task.dim, task.width, own, task.depth_mlps)
