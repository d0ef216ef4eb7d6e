"""The embedding loss, as pure functions in fp32.

Every function takes its normaliser, the count of samples with a target in the **global** batch, as an argument: summed
over micro-steps and ranks the parts then equal the loss of the whole batch, however that batch was cut. Samples without
a target are neither anchors nor candidates; an empty batch has a loss of exactly 0 that is still part of the graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from olavlm.errors import OlaError

MAX_SCALE = 100.0


@dataclass(frozen=True)
class TaskTargets:
    """One task's targets for the images of a micro-batch, and the candidates of the global batch around them."""

    values: Tensor  # (n, q, w), any content where not valid
    valid: Tensor  # (n,) bool, the image has a target
    candidates: Tensor  # (m, q, w), the valid targets of the whole global batch
    index: Tensor  # (n,) int64, an image's own target among the candidates; any content where not valid
    count: int  # images with a target in the global batch

    @classmethod
    def of_batch(cls, values: Tensor, valid: Tensor | None = None) -> "TaskTargets":
        """The targets of a batch that is the whole global batch; all are valid where `valid` is not given.

        With several ranks or micro-steps, fill the fields from all of them together instead.
        """
        if valid is None:
            valid = torch.ones(len(values), dtype=torch.bool, device=values.device)
        return cls(values, valid, values[valid], valid.cumsum(0) - 1, int(valid.sum()))


@dataclass(frozen=True)
class EmbeddingLosses:
    """The weighted sum, and each unweighted part as ``task/layer/smooth_l1`` and ``task/layer/contrastive``."""

    total: Tensor
    parts: dict[str, Tensor]


def smooth_l1(prediction: Tensor, target: Tensor, valid: Tensor, count: int) -> Tensor:
    """Smooth-L1 (β = 1), summed over the valid images and divided by ``count · q · w``.

    Args:
        prediction: (n, q, w), any floating dtype.
        target: (n, q, w); carries no gradient.
        valid: (n,) bool.
        count: valid images in the global batch.

    Returns:
        fp32 scalar; exactly 0, with a graph, where nothing is valid.

    Raises:
        OlaError: shapes or counts that do not fit. Targets are never tiled.
    """
    _check(prediction, target, valid, count)
    # Filling the difference, not multiplying the loss: 0 × NaN of an image without a target would be NaN.
    difference = (prediction.float() - target.detach().float()).masked_fill(~valid[:, None, None], 0.0)
    total = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="sum")
    return total / (max(count, 1) * prediction.shape[1] * prediction.shape[2])


def info_nce(
    prediction: Tensor, candidates: Tensor, index: Tensor, valid: Tensor, logit_scale: Tensor, count: int
) -> Tensor:
    """Cross-entropy of picking the own target among the candidates, by cosine similarity of whole flattened embeddings.

    Logits are cosines × min(exp(logit_scale), 100); prediction → target only. Summed over the valid images and divided
    by `count`.

    Args:
        prediction: (n, q, w), any floating dtype.
        candidates: (m, q, w), the valid targets of the global batch; carry no gradient.
        index: (n,) int64, the own target's position among the candidates.
        valid: (n,) bool.
        logit_scale: one element.
        count: valid images in the global batch.

    Returns:
        fp32 scalar; exactly 0, with a graph, where nothing is valid.

    Raises:
        OlaError: shapes, counts or indices that do not fit.
    """
    _check(prediction, None, valid, count)
    if candidates.shape[1:] != prediction.shape[1:]:
        raise OlaError(
            f"candidates: shape {tuple(candidates.shape)}; expected (m, {prediction.shape[1]}, {prediction.shape[2]})"
        )
    if index.shape != valid.shape:
        raise OlaError(f"index: shape {tuple(index.shape)}; expected {tuple(valid.shape)}, one per prediction")
    own = index[valid]
    if own.numel() == 0:
        return prediction.flatten()[:0].float().sum() + logit_scale.flatten()[:0].float().sum()
    if int(own.min()) < 0 or int(own.max()) >= candidates.shape[0]:
        raise OlaError(
            f"index: {int(own.min())} to {int(own.max())}; expected positions among {candidates.shape[0]} candidates"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        anchors = F.normalize(prediction.float().flatten(1)[valid], dim=-1)
        others = F.normalize(candidates.detach().float().flatten(1), dim=-1)
        logits = anchors @ others.T * logit_scale.float().exp().clamp(max=MAX_SCALE)
        return F.cross_entropy(logits, own, reduction="sum") / count


def embedding_losses(
    predictions: Mapping[str, Mapping[int, Tensor]],
    targets: Mapping[str, TaskTargets],
    logit_scales: Mapping[str, Tensor],
    weights: Mapping[str, float],
    contrastive: float,
) -> EmbeddingLosses:
    """Σ_task weight Σ_layer [smooth-L1 + contrastive · InfoNCE] over the tasks in `weights`.

    Args:
        predictions: task → layer → (n, q, w), as the model returns them.
        targets: task → its targets.
        logit_scales: task → one-element tensor.
        weights: task → weight; tasks left out have no loss.
        contrastive: weight of the InfoNCE part; at 0 it is not computed.

    Raises:
        OlaError: a weighted task without predictions or targets, or anything `smooth_l1` and `info_nce` refuse.
    """
    terms, parts = [], {}
    for task, weight in weights.items():
        if not predictions.get(task):
            raise OlaError(
                f"losses.{task}: the student predicts no such task; it predicts {', '.join(predictions) or 'none'}"
            )
        if task not in targets:
            raise OlaError(f"losses.{task}: no targets given; there are targets of {', '.join(targets) or 'none'}")
        t = targets[task]
        for layer, prediction in predictions[task].items():
            try:
                loss = parts[f"{task}/{layer}/smooth_l1"] = smooth_l1(prediction, t.values, t.valid, t.count)
                if contrastive:
                    nce = info_nce(prediction, t.candidates, t.index, t.valid, logit_scales[task], t.count)
                    parts[f"{task}/{layer}/contrastive"] = nce
                    loss = loss + contrastive * nce
            except OlaError as error:
                raise OlaError(f"losses.{task}: layer {layer}: {error}") from None
            terms.append(weight * loss)
    return EmbeddingLosses(torch.stack(terms).sum() if terms else torch.zeros(()), parts)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine similarity of the flattened embeddings, (n, q, w) × (n, q, w) → (n,) fp32: what the probes report.

    Raises:
        OlaError: shapes that differ.
    """
    if prediction.shape != target.shape:
        raise OlaError(f"target: shape {tuple(target.shape)}; expected the prediction's {tuple(prediction.shape)}")
    return F.cosine_similarity(prediction.float().flatten(1), target.float().flatten(1), dim=-1)


def _check(prediction: Tensor, target: Tensor | None, valid: Tensor, count: int) -> None:
    if prediction.ndim != 3:
        raise OlaError(f"prediction: shape {tuple(prediction.shape)}; expected (images, queries, width)")
    if target is not None and target.shape != prediction.shape:
        raise OlaError(f"target: shape {tuple(target.shape)}; expected the prediction's {tuple(prediction.shape)}")
    if valid.shape != prediction.shape[:1] or valid.dtype != torch.bool:
        raise OlaError(
            f"valid: {tuple(valid.shape)} of {valid.dtype}; expected one bool for each of {len(prediction)} images"
        )
    if int(valid.sum()) > count:
        raise OlaError(
            f"count: {count}; the global batch cannot have fewer targets than this part of it, {int(valid.sum())}"
        )
