"""The embedding loss against the published one where that is right, and on its own where it is not."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from olavlm.errors import OlaError
from olavlm.model import TaskTargets, cosine, embedding_losses, info_nce, smooth_l1

Reference = Callable[[str], dict[str, Tensor]]


def tokens(x: Tensor) -> Tensor:
    """The published segmentation embeddings are (n, width, rows, columns); ours (n, tokens, width)."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def published(reference: Reference, case: str) -> dict[str, Tensor]:
    return {k.split("/")[1]: v for k, v in reference("losses").items() if k.split("/")[0] == case}


@pytest.mark.parametrize(
    ("case", "contrastive"),
    [
        ("depth3d_ones", 0.3),
        ("seg4d_ones", 0.3),
        ("gen_ones", 0.3),
        ("gen_w1", 1.0),
        ("depth3d_scale6", 0.3),
        ("depth3d_b1", 0.3),
    ],
)
def test_published_numbers_where_every_image_has_a_target(reference: Reference, case: str, contrastive: float) -> None:
    given = published(reference, case)
    prediction, scale = given["pred"].requires_grad_(), given["logit_scale"].requires_grad_()
    losses = embedding_losses(
        {"t": {3: tokens(prediction)}},
        {"t": TaskTargets.of_batch(tokens(given["target"]))},
        {"t": scale},
        {"t": 1.0},
        contrastive,
    )
    assert_close(losses.parts["t/3/smooth_l1"], given["sl1"], atol=1e-4, rtol=1e-4)
    # Recorded with its weight, 0.3 unless the case says otherwise.
    assert_close(contrastive * losses.parts["t/3/contrastive"], given["contrastive"], atol=1e-4, rtol=1e-4)
    assert_close(losses.total, given["total"], atol=1e-4, rtol=1e-4)
    losses.total.backward()
    assert_close(prediction.grad, given["grad_pred"], atol=1e-4, rtol=1e-4)
    assert_close(scale.grad, given["grad_logit_scale"], atol=1e-4, rtol=1e-4)


def test_published_defect_2_masked_images_are_neither_anchors_nor_candidates(reference: Reference) -> None:
    given = published(reference, "depth3d_mixed")
    valid = given["mask"].bool()
    scale = given["logit_scale"]
    target = TaskTargets.of_batch(given["target"], valid)
    got = info_nce(given["pred"], target.candidates, target.index, valid, scale, target.count)
    of_the_valid = TaskTargets.of_batch(given["target"][valid])
    index = torch.arange(int(valid.sum()))
    alone = info_nce(given["pred"][valid], of_the_valid.candidates, index, of_the_valid.valid, scale, len(index))
    assert_close(got, alone)
    assert abs(0.3 * float(got) - float(given["contrastive"])) > 1e-2
    # The published smooth-L1 divides by all images, masked or not: the same sum over another count.
    assert_close(smooth_l1(given["pred"], given["target"], valid, count=4), given["sl1"], atol=1e-4, rtol=1e-4)


def test_published_defect_3_targets_are_never_tiled(reference: Reference) -> None:
    given = published(reference, "depth3d_repeat")  # 4 predictions, 2 targets
    with pytest.raises(OlaError, match=r"\(2, 16, 24\); expected the prediction's \(4, 16, 24\)"):
        smooth_l1(given["pred"], given["target"], torch.ones(4, dtype=torch.bool), 4)
    with pytest.raises(OlaError, match="valid"):
        smooth_l1(given["pred"], given["pred"], torch.ones(2, dtype=torch.bool), 4)


@pytest.mark.parametrize("images", [0, 3])
def test_published_defect_4_nothing_to_learn_is_exactly_zero_and_in_the_graph(images: int) -> None:
    prediction = torch.randn(images, 4, 5, requires_grad=True)
    scale = torch.tensor([2.0], requires_grad=True)
    target = TaskTargets(
        torch.full((images, 4, 5), math.nan),
        torch.zeros(images, dtype=torch.bool),
        torch.empty(0, 4, 5),
        torch.full((images,), -1),
        0,
    )
    losses = embedding_losses({"t": {1: prediction}}, {"t": target}, {"t": scale}, {"t": 0.5}, 0.3)
    assert losses.total.item() == 0.0
    losses.total.backward()
    assert_close(prediction.grad, torch.zeros_like(prediction))
    assert_close(scale.grad, torch.zeros(1))


def test_what_an_image_without_target_holds_does_not_matter() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    valid = torch.tensor([True, False, True])

    def run(fill: float) -> tuple[Tensor, Tensor, Tensor]:
        p, t, scale = prediction.clone(), target.clone(), torch.tensor([2.0], requires_grad=True)
        p[1], t[1] = fill, fill
        p.requires_grad_()
        total = embedding_losses(
            {"t": {1: p}}, {"t": TaskTargets.of_batch(t, valid)}, {"t": scale}, {"t": 1.0}, 0.3
        ).total
        total.backward()
        return total.detach(), p.grad, scale.grad

    for got, expected in zip(run(math.nan), run(0.0), strict=True):
        assert_close(got, expected)
        assert got.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    valid=st.lists(st.booleans(), min_size=1, max_size=7),
    cuts=st.lists(st.integers(0, 7), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_losses_do_not_depend_on_how_the_global_batch_is_cut(valid: list[bool], cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    prediction, values, scale = torch.randn(len(valid), 3, 4), torch.randn(len(valid), 3, 4), {"t": torch.tensor([1.5])}
    whole = TaskTargets.of_batch(values, torch.tensor(valid))

    def total(rows: slice) -> Tensor:
        part = TaskTargets(values[rows], whole.valid[rows], whole.candidates, whole.index[rows], whole.count)
        return embedding_losses({"t": {1: prediction[rows]}}, {"t": part}, scale, {"t": 0.5}, 0.3).total

    edges = sorted({0, len(valid), *(min(cut, len(valid)) for cut in cuts)})
    parts = sum(total(slice(a, b)) for a, b in itertools.pairwise(edges))
    assert_close(parts, total(slice(None)), atol=1e-5, rtol=1e-5)


def test_computed_in_fp32_under_autocast_and_from_bf16() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(4, 16, 24).bfloat16(), torch.randn(4, 16, 24)
    scales, weights = {"t": torch.tensor([2.0])}, {"t": 1.0}
    plain = embedding_losses(
        {"t": {1: prediction.float()}}, {"t": TaskTargets.of_batch(target)}, scales, weights, 0.3
    ).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = embedding_losses(
            {"t": {1: prediction}}, {"t": TaskTargets.of_batch(target)}, scales, weights, 0.3
        ).total
    assert autocast.dtype == torch.float32
    assert_close(autocast, plain)


def test_targets_carry_no_gradient() -> None:
    values = torch.randn(2, 3, 4, requires_grad=True)
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    embedding_losses(
        {"t": {1: prediction}}, {"t": TaskTargets.of_batch(values)}, {"t": torch.zeros(1)}, {"t": 1.0}, 0.3
    ).total.backward()
    assert values.grad is None


def test_no_contrastive_part_at_weight_zero() -> None:
    losses = embedding_losses(
        {"t": {1: torch.ones(1, 2, 3)}}, {"t": TaskTargets.of_batch(torch.zeros(1, 2, 3))}, {}, {"t": 2.0}, 0.0
    )
    assert list(losses.parts) == ["t/1/smooth_l1"]
    assert losses.total.item() == pytest.approx(1.0)  # |1 − 0| is at the knee: 1 − ½, twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"other": 1.0}}, "losses.other: the student predicts no such task"),
        ({"targets": {}}, "losses.t: no targets given"),
        ({"count": 1}, "count: 1; the global batch cannot have fewer"),
        ({"index": torch.tensor([0, 2])}, "expected positions among 2 candidates"),
        ({"index": torch.tensor([0])}, "index: shape"),
        ({"candidates": torch.zeros(2, 3, 5)}, "candidates: shape"),
        ({"valid": torch.tensor([1, 1])}, "valid"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    fields: dict[str, Any] = {
        "values": torch.zeros(2, 3, 4),
        "valid": torch.ones(2, dtype=torch.bool),
        "candidates": torch.zeros(2, 3, 4),
        "index": torch.arange(2),
        "count": 2,
    }
    weights: Any = change.get("weights", {"t": 1.0})
    fields |= {key: value for key, value in change.items() if key in fields}
    given: Any = change.get("targets", {"t": TaskTargets(**fields)})
    with pytest.raises(OlaError, match=message):
        embedding_losses({"t": {1: torch.zeros(2, 3, 4)}}, given, {"t": torch.zeros(1)}, weights, 0.3)


def test_cosine_is_of_whole_flattened_embeddings() -> None:
    prediction = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    assert_close(cosine(prediction, target), torch.tensor([0.5, 1.0]))
    with pytest.raises(OlaError, match="expected the prediction's"):
        cosine(prediction, target[:1])
