"""One optimizer step's losses and gradients (method: arXiv 2412.09585, section 3).

    loss = CE(text) + Σ_task weight Σ_layer [ smooth-L1 + contrastive · InfoNCE ]

Every term is normalised by counts over the **global** batch, and InfoNCE picks among the global batch's targets. So
the loss does not depend on how the batch is cut into ranks and micro-steps: micro-steps add up, and so do ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from olavlm.data.codec import decode
from olavlm.model import OlaVlmForConditionalGeneration
from olavlm.model.losses import TaskTargets, embedding_losses
from train.distributed import World
from train.loader import IGNORED, MicroBatch, Targets
from train.sharding import is_sharded

#: Gives the targets of a micro-batch that is on the device. The trainer's are read from the store with the batch; a
#: benchmark may plug in a teacher.
TargetSource = Callable[[MicroBatch], dict[str, Targets]]


def stored(batch: MicroBatch) -> dict[str, Targets]:
    """The targets the loader read."""
    return batch.targets


@dataclass(frozen=True)
class Objective:
    """What is minimised beside next-token prediction, and in which precision.

    Attributes:
        weights: embedding-loss weight by task; empty: next-token prediction only, and no predictor runs.
        contrastive: weight of InfoNCE inside each embedding loss.
        autocast: bfloat16 to run the forward pass under autocast; None for the parameters' own dtype.
        targets: where targets come from.
    """

    weights: dict[str, float] = field(default_factory=dict)
    contrastive: float = 0.3
    autocast: torch.dtype | None = None
    targets: TargetSource = stored


def accumulate(
    model: OlaVlmForConditionalGeneration, batches: list[MicroBatch], objective: Objective, world: World
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Add the gradients of one global batch's loss to the parameters' ``.grad``; other ranks' shares are not in it yet.

    Args:
        model: the student.
        batches: this rank's micro-batches of the global batch, on the model's device; at least one, which may be empty.
        objective: the loss.
        world: every rank of it must call, with micro-batches or without.

    Returns:
        This rank's share of ``loss``, ``text`` and every ``task/layer/term`` (fp32 scalars; summed over ranks they are
        the global batch's); and the loss of each micro-batch. Terms without any sample are exactly 0.

    Raises:
        OlaError: predictions and targets that do not fit together.
    """
    whole = _GlobalBatch(batches, objective, world)
    totals = {name: torch.zeros((), device=world.device) for name in _terms(model, objective)}
    losses = []
    for batch, found in zip(batches, whole.found, strict=True):
        if not batch.keys:  # fewer micro-batches than ranks
            if is_sharded(model):
                _take_part(model, world)
            continue
        follows = batch.labels[:, 1:]
        predicting = (follows != IGNORED).any(0).nonzero().flatten()  # not an image's: no logits are made of those
        with torch.autocast(world.device.type, objective.autocast, enabled=objective.autocast is not None):
            out = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                pixel_values=batch.pixel_values if len(batch.pixel_values) else None,
                predict=bool(objective.weights),
                encoder_features=fed_features(model, found),
                use_cache=False,
                logits_to_keep=predicting,
            )
        text = next_token_loss(out.logits, follows[:, predicting], whole.tokens)
        terms = {"text": text}
        loss = text
        if objective.weights:
            embedding = embedding_losses(
                out.predictions,
                whole.take(found),
                dict(model.logit_scales.items()),
                objective.weights,
                objective.contrastive,
            )
            terms |= embedding.parts
            loss = loss + embedding.total
        if loss.requires_grad:  # not so where the batch gives nothing to learn: text only, and a frozen language model
            loss.backward()  # type: ignore[no-untyped-call]
        for name, term in {"loss": loss, **terms}.items():
            totals[name] += term.detach()
        losses.append(loss.detach())
    return totals, losses


def fed_features(model: OlaVlmForConditionalGeneration, targets: dict[str, Targets]) -> dict[str, Tensor]:
    """What a micro-batch's student is fed: encoder → (n, tokens, width) float32; {} for a student without encoders."""
    return {encoder.name: targets[encoder.name].features() for encoder in model.config.encoder_configs}


def _take_part(model: OlaVlmForConditionalGeneration, world: World) -> None:
    """A pass over one token that changes no gradient: the other ranks need this one's slices, and its part in sums."""
    logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=world.device), use_cache=False).logits
    (0 * logits.float().sum()).backward()


def next_token_loss(logits: Tensor, follows: Tensor, count: int) -> Tensor:
    """Cross-entropy of predicting at each position the token that follows it, in fp32, divided by `count`.

    Args:
        logits: (b, n, vocabulary) at n positions.
        follows: (b, n) int64, the labels one position on; -100 where nothing is learned.
        count: labelled tokens in the global batch.

    Returns:
        fp32 scalar; exactly 0, with a graph, where nothing is labelled.
    """
    learned = follows != IGNORED  # only these rows are turned into fp32: the vocabulary is the largest tensor of all
    total = F.cross_entropy(logits[learned].float(), follows[learned], reduction="sum")
    return total / max(count, 1)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate at optimizer step `step` (0-based): linear warm-up, then a cosine to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _terms(model: OlaVlmForConditionalGeneration, objective: Objective) -> list[str]:
    """The names of all terms of the loss, the same on every rank whatever it has to do."""
    kinds = ["smooth_l1", "contrastive"] if objective.contrastive else ["smooth_l1"]
    tasks = [task for task in model.config.task_configs if task.name in objective.weights]
    of_tasks = (f"{task.name}/{layer}/{kind}" for task in tasks for layer in task.layers for kind in kinds)
    return ["loss", "text", *of_tasks]


class _GlobalBatch:
    """What micro-batches need to know of the batch they are a part of.

    Made once per step, before the first forward pass, by all ranks together. Targets travel between ranks as they are
    stored (int8: a quarter of fp32) and are decoded on arrival.

    Attributes:
        tokens: labelled tokens in the global batch.
        found: this rank's targets, by micro-batch and task.
    """

    def __init__(self, batches: list[MicroBatch], objective: Objective, world: World):
        labelled = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
        self.tokens = int(world.sum(torch.tensor(labelled, device=world.device)))
        self.found = [objective.targets(batch) for batch in batches]
        self._candidates: dict[str, Tensor] = {}
        self._next: dict[str, int] = {}  # position among the candidates of this rank's next valid target
        for task in objective.weights:
            own = [of_batch[task] for of_batch in self.found]
            values, self._next[task] = world.gather(torch.cat([t.values[t.valid] for t in own]))
            scales = [t.scales[t.valid] for t in own if t.scales is not None]
            all_scales = world.gather(torch.cat(scales))[0] if scales else None
            self._candidates[task] = decode(values, all_scales, own[0].codec)

    def take(self, found: dict[str, Targets]) -> dict[str, TaskTargets]:
        """The next micro-batch's targets beside the candidates; to be called in order, once for each."""
        taken = {}
        for task, candidates in self._candidates.items():
            targets = found[task]
            index = self._next[task] + torch.cumsum(targets.valid, 0) - 1  # valid ones are numbered through
            taken[task] = TaskTargets(targets.features(), targets.valid, candidates, index, len(candidates))
            self._next[task] += int(targets.valid.sum())
        return taken
