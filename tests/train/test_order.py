"""Promise 4: the order is a pure, keyed permutation, whatever the ranks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import order as orders
from train.order import MEGABATCH, RUN, Order, permute, quotas, rank_share

sizes = st.integers(1, 300)
seeds = st.integers(0, 2**31)


windows = st.none() | st.integers(1, 2000)


def plain(n: int, batch: int, seed: int = 0, group_keys: np.ndarray | None = None, window: int | None = None) -> Order:
    return Order((n,), (n,), seed, batch, group_keys, window)


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(n), n, seed, epoch)
    assert sorted(image) == list(range(n))
    assert (permute(image, n, seed, epoch, inverse=True) == np.arange(n)).all()


@given(n=st.integers(1, 10**9), at=st.floats(0, 1, exclude_max=True), seed=seeds)
@settings(max_examples=50, deadline=None)
def test_permute_is_evaluated_at_single_points(n: int, at: float, seed: int) -> None:
    index = np.array([int(at * n)])
    image = permute(index, n, seed)
    assert 0 <= image[0] < n
    assert image[0] == permute(np.array([0, index[0], n - 1]), n, seed)[1]


@pytest.mark.parametrize("window", [None, 2**16])
def test_a_billion_samples_cost_nothing(window: int | None) -> None:
    n = 10**9
    order = plain(n, 256, window=window)
    batch = order.batch(3_000_000)
    assert len(np.unique(batch)) == 256
    assert batch.min() >= 0
    assert batch.max() < n
    assert batch.std() > n / 5  # spread over the whole corpus


def test_epochs_and_seeds_differ() -> None:
    one = plain(1000, 1000)
    assert (one.batch(0) != one.batch(1)).mean() > 0.9
    assert (one.batch(0) != plain(1000, 1000, seed=1).batch(0)).mean() > 0.9


def test_permute_is_well_spread() -> None:
    """Chi-square of where the first tenth of the positions goes: near its expectation, for many keys."""
    counts = np.zeros(10)
    for key in range(50):
        counts += np.histogram(permute(np.arange(100), 1000, key), bins=10, range=(0, 1000))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 35  # 9 degrees of freedom, p ≈ 6e-5


@given(n=st.integers(1, 3000), batch=st.integers(8, 64), seed=seeds, grouped=st.booleans(), window=windows)
@settings(max_examples=40, deadline=None)
def test_promise_4_ordered_every_epoch_holds_every_sample_once(
    n: int, batch: int, seed: int, grouped: bool, window: int | None
) -> None:
    order = plain(n, batch, seed, np.arange(n) * 7919 % 101 if grouped else None, window)
    for epoch in range(2):
        steps = range(epoch * order.epoch_batches, (epoch + 1) * order.epoch_batches)
        seen = np.concatenate([order.batch(step) for step in steps])
        assert sorted(seen) == list(range(n))


@given(n=st.integers(1, 10**9), at=st.floats(0, 1), batch=st.integers(1, 64), window=windows)
@settings(max_examples=40, deadline=None)
def test_promise_4_ordered_a_batch_is_the_same_evaluated_alone_or_with_its_neighbours(
    n: int, at: float, batch: int, window: int | None
) -> None:
    order = plain(n, batch, 0, None, window)
    first = int(at * max(0, n - 3 * batch))
    together = order.sample_at(1, np.arange(first, min(n, first + 3 * batch)))
    alone = [order.sample_at(1, np.array([position]))[0] for position in range(first, min(n, first + 3 * batch))]
    assert list(together) == alone
    assert len(set(alone)) == len(alone)


@st.composite
def any_order(draw: st.DrawFn) -> Order:
    """Several data sets or one, weighted or not, fully random or in windows, grouped or not."""
    counts = tuple(draw(st.lists(st.integers(1, 900), min_size=1, max_size=3)))
    weights = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)))
    keys = np.random.default_rng(0).integers(0, 500, sum(counts)) if draw(st.booleans()) else None
    return Order(counts, quotas(counts, weights), draw(seeds), draw(st.integers(1, 64)), keys, draw(windows))


@given(order=any_order(), at=st.lists(st.floats(0, 1), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_promise_4_ordered_a_restart_anywhere_comes_to_the_same_batches(order: Order, at: list[float]) -> None:
    steps = [int(where * (3 * order.epoch_batches - 1)) for where in at]
    start = max(0, max(steps) - 300)  # of a run that has come this far, whatever it has drawn before
    before = {step: order.batch(step) for step in sorted({*steps, *range(start, max(steps) + 1)})}
    for step in steps:
        afresh = replace(order)  # a process that has drawn nothing yet
        assert list(afresh.batch(step)) == list(before[step])
        last = step % order.epoch_batches == order.epoch_batches - 1
        rest = (order.epoch_samples - 1) % order.global_batch + 1
        if order.group_keys is None:
            assert len(before[step]) == (rest if last else order.global_batch)
        else:  # the batch that is not full is shuffled, too
            assert len(before[step]) in (rest, order.global_batch)


@given(order=any_order())
@settings(max_examples=40, deadline=None)
def test_epochs_are_shuffled_anew(order: Order) -> None:
    one, other = (order.sample_at(epoch, np.arange(order.epoch_samples)) for epoch in (1, 2))
    of = np.repeat(order.sizes, order.sizes)[one]  # how many samples the data set has that a position's sample is from
    varied = of >= 8  # of few samples another draw is often the same
    assert varied.sum() < 20 or (one != other)[varied].mean() > 0.5


@pytest.mark.parametrize("window", [None, 2**16])
@pytest.mark.parametrize("grouped", [False, True])
def test_promise_5_resumable_at_step_a_million_of_a_billion_samples_costs_as_at_step_one(
    monkeypatch: pytest.MonkeyPatch, window: int | None, grouped: bool
) -> None:
    """Counted, not timed: the numbers that are mixed to draw the first batch after a restart."""
    n, mixed, real = 10**9, 0, orders._mix

    def mix(x: np.ndarray) -> np.ndarray:
        nonlocal mixed
        mixed += x.size
        return real(x)

    monkeypatch.setattr(orders, "_mix", mix)
    costs = []
    for step in (1, 10**6):
        keys = np.broadcast_to(np.int64(7), n) if grouped else None
        mixed = 0
        plain(n, 256, group_keys=keys, window=window).batch(step)
        costs.append(mixed)
    assert costs[1] <= 1.2 * costs[0] <= 5_000_000


@given(share=st.floats(0.02, 0.98), batch=st.integers(2, 32), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_grouped_batches_hold_one_modality_but_for_one_of_a_megabatch(share: float, batch: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = MEGABATCH * batch * 2
    keys = ((draw.random(n) < share).astype(np.int64) << 32) | draw.integers(0, 2000, n)  # as the snapshot has them
    order = plain(n, batch, seed, keys)
    for megabatch in range(2):
        steps = range(megabatch * MEGABATCH, (megabatch + 1) * MEGABATCH)
        assert sum(len(np.unique(keys[order.batch(step)] >> 32)) > 1 for step in steps) <= 1


def test_windows_hold_whole_runs_of_neighbours_and_are_shuffled_inside() -> None:
    n, window = 96 * RUN, 8 * RUN
    order = plain(n, 16, window=window)
    seen = order.sample_at(0, np.arange(n))
    runs = [np.unique(seen[i : i + window] // RUN) for i in range(0, n, window)]
    assert all(len(of_window) == 8 for of_window in runs)
    assert abs(np.corrcoef(seen[:window] % RUN, np.arange(window))[0, 1]) < 0.1
    assert abs(np.corrcoef(seen, np.arange(n))[0, 1]) < 0.3  # the windows themselves come in no order
    assert (seen != order.sample_at(1, np.arange(n))).mean() > 0.9


@given(n=sizes, batch=st.integers(1, 64), micro=st.integers(1, 16), ranks=st.integers(1, 5), step=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_promise_4_ordered_ranks_share_the_same_batch(n: int, batch: int, micro: int, ranks: int, step: int) -> None:
    whole = plain(n, batch).batch(step)
    shares = [rank_share(whole, micro, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate([chunk for share in shares for chunk in share])) == sorted(whole)
    assert all(len(chunk) <= micro for share in shares for chunk in share)


def test_grouping_makes_batches_alike_and_keeps_the_training_shuffled() -> None:
    keys = np.random.default_rng(0).integers(0, 10_000, 64 * 16 * 2)
    grouped, plain_order = plain(len(keys), 16, 0, keys), plain(len(keys), 16)
    spread = [np.ptp(keys[grouped.batch(s)]) for s in range(grouped.epoch_batches)]
    assert np.mean(spread) < 0.05 * np.mean([np.ptp(keys[plain_order.batch(s)]) for s in range(grouped.epoch_batches)])
    means = np.array([keys[grouped.batch(s)].mean() for s in range(MEGABATCH)])
    assert abs(np.corrcoef(means, np.arange(MEGABATCH))[0, 1]) < 0.5
    inside = np.concatenate([grouped.batch(s) for s in range(MEGABATCH)])
    assert set(inside) == {i for s in range(MEGABATCH) for i in plain_order.batch(s)}  # nothing leaves its megabatch


@given(
    pair=st.lists(st.tuples(st.integers(1, 700), st.floats(0.1, 10)), min_size=1, max_size=3),
    batch=st.integers(8, 64),
    window=windows,
)
@settings(max_examples=40, deadline=None)
def test_mixture_keeps_its_shares_and_repeats_nothing_early(
    pair: list[tuple[int, float]], batch: int, window: int | None
) -> None:
    counts = tuple(size for size, _ in pair)
    order = Order(counts, quotas(counts, [w for _, w in pair]), 3, batch, None, window)
    assert sum(order.quotas) == sum(counts)
    starts = np.cumsum((0, *counts))
    seen = np.concatenate([order.batch(s) for s in range(3 * order.epoch_batches)])
    times = np.bincount(seen, minlength=sum(counts))
    for d, size in enumerate(counts):
        mine = times[starts[d] : starts[d + 1]]
        assert mine.sum() == 3 * order.quotas[d]
        assert mine.max() - mine.min() <= 1
        assert mine.sum() // size == mine.min()


def test_quotas_without_weights_are_the_sizes() -> None:
    assert quotas([5, 7], None) == (5, 7)
    assert quotas([10, 30], [1, 1]) == (20, 20)
