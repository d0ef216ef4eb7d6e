"""The loss of a step does not depend on how its global batch is cut."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from train import student
from train.distributed import World
from train.loader import Loader, MicroBatch, Targets
from train.snapshot import Request, Snapshot
from train.step import Objective, accumulate, learning_rate, next_token_loss

ALONE = World(0, 1, torch.device("cpu"))
OBJECTIVE = Objective({"depth": 0.5, "gen": 0.25}, contrastive=0.3)


@pytest.fixture
def read(world: Any, tmp_path: Path) -> Callable[[list[int]], MicroBatch]:
    config = world.config()
    request = Request("t", ("all",), ("depth", "gen"), "squash", False, 0.1)
    snapshot = Snapshot.open(tmp_path / "run", config, request)
    loader = Loader(snapshot, student.create(config)[1], ["depth", "gen"], 128, range(0), lambda s: [], 1)
    return lambda numbers: loader.read(np.array(numbers, np.int64))


def gradients(
    world: Any, batches: list[MicroBatch], objective: Objective = OBJECTIVE, **changes: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Terms and gradients of one global batch, by a fresh student."""
    config = world.config()
    model, _ = student.create(config)
    stage = config.stages["pretrain"].model_copy(update=changes)
    parts = student.prepare(model, stage, ALONE.device)
    terms, _ = accumulate(model, batches, objective, ALONE)
    grads = {name: p.grad for pairs in parts.values() for name, p in pairs if p.grad is not None}
    return {name: float(term) for name, term in terms.items()}, grads


def assert_same(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(
            grad, other[1][name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_promise_5_resumable_micro_batches_agree_over_the_global_batch(
    world: Any, read: Callable[[list[int]], MicroBatch], micro: int
) -> None:
    samples = [6, 3, 5, 0, 11, 2, 13, 7, 1]  # two images, text only and without a depth target among them
    whole = gradients(world, [read(samples)])
    cut = gradients(world, [read(samples[i : i + micro]) for i in range(0, len(samples), micro)])
    assert_same(whole, cut)


def test_gradient_checkpointing_changes_nothing(world: Any, read: Callable[[list[int]], MicroBatch]) -> None:
    batch = read([6, 3, 5, 0])
    assert_same(gradients(world, [batch]), gradients(world, [batch], gradient_checkpointing=True), 1e-6)


def test_logits_are_made_only_where_a_token_is_learned_of_and_the_loss_is_that_of_all(
    world: Any, read: Callable[[list[int]], MicroBatch]
) -> None:
    batch = read([6, 0, 3])
    model, _ = student.create(world.config())
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda head, given: rows.append(given[0].shape[1]))
    terms, _ = accumulate(model, [batch], Objective(), ALONE)
    assert rows[0] < batch.labels.shape[1] - model.config.image_seq_length
    logits = model(batch.input_ids, batch.pixel_values, batch.attention_mask).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    assert float(terms["text"]) == pytest.approx(expected.item(), rel=1e-5)


def test_terms_are_named_and_add_up(world: Any, read: Callable[[list[int]], MicroBatch]) -> None:
    terms, grads = gradients(world, [read([6, 0, 1])])
    parts = ["depth/1", "depth/2", "gen/2"]
    assert set(terms) == {"loss", "text", *(f"{p}/{t}" for p in parts for t in ("smooth_l1", "contrastive"))}
    weight = {"depth": 0.5, "gen": 0.25}
    total = sum(weight[p.split("/")[0]] * (terms[f"{p}/smooth_l1"] + 0.3 * terms[f"{p}/contrastive"]) for p in parts)
    assert terms["loss"] == pytest.approx(terms["text"] + total, rel=1e-6)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_text_only_batch_has_exactly_no_embedding_loss(world: Any, read: Callable[[list[int]], MicroBatch]) -> None:
    terms, grads = gradients(world, [read([3, 11])])
    assert all(term == 0 for name, term in terms.items() if "/" in name)
    assert terms["loss"] == terms["text"] > 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_text_only_batches_under_a_frozen_language_model_pass(
    world: Any, read: Callable[[list[int]], MicroBatch]
) -> None:
    _, grads = gradients(world, [read([3, 11])], trainable=["projector", "predictors", "logit_scales"])
    assert not any(grad.any() for grad in grads.values())


def test_images_without_a_target_are_neither_anchors_nor_candidates(
    world: Any, read: Callable[[list[int]], MicroBatch]
) -> None:
    with_gap, without = gradients(world, [read([5, 0, 1])])[0], gradients(world, [read([0, 1])])[0]
    for name in ("depth/1/smooth_l1", "depth/2/contrastive"):
        assert with_gap[name] == pytest.approx(without[name], rel=1e-5)


def test_a_provider_of_its_own_may_give_the_targets(world: Any, read: Callable[[list[int]], MicroBatch]) -> None:
    batch = read([0, 1, 2])
    bare = replace(batch, targets={})

    def online(asked: MicroBatch) -> dict[str, Targets]:
        assert asked is bare
        return {t: Targets(s.features(), None, s.valid, "fp16") for t, s in batch.targets.items()}

    assert_same(gradients(world, [batch]), gradients(world, [bare], replace(OBJECTIVE, targets=online)), 1e-6)


def test_next_token_loss_is_the_mean_over_the_global_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=-100)
    follows = labels[:, 1:]
    assert next_token_loss(logits[:, :-1], follows, int((follows != -100).sum())) == pytest.approx(float(expected))
    nothing = next_token_loss(logits.requires_grad_(), torch.full((2, 5), -100), 0)
    assert nothing == 0
    nothing.backward()


@given(steps=st.integers(1, 10_000), warmup=st.floats(0, 1))
def test_learning_rate_warms_up_and_falls_to_zero(steps: int, warmup: float) -> None:
    rates = [learning_rate(step, steps, warmup) for step in sorted({0, steps // 3, steps // 2, steps - 1})]
    assert all(0 <= rate <= 1 for rate in rates)
    warm = math.ceil(warmup * steps)
    if 0 < warm < steps:
        assert learning_rate(warm - 1, steps, warmup) == learning_rate(warm, steps, warmup) == 1
    assert learning_rate(steps, steps, warmup) == pytest.approx(0, abs=1e-9) or warm == steps
