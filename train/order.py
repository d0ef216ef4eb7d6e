"""The sample order (promise 4): which samples the global batch of a step holds, as pure functions.

The order depends on (snapshot, seed, epoch, global batch size, grouping) and on nothing else: not on ranks, threads,
micro-batches or restarts. It is evaluated where it is needed; no list of all samples is ever made.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_ROUNDS = 8
#: Samples that stay together under a windowed shuffle: neighbours on disk, read at about the same time.
RUN = 256
#: Length grouping sorts inside windows of this many global batches.
MEGABATCH = 64


def permute(index: Ints, n: int, *key: object, inverse: bool = False) -> Ints:
    """The image of `index` under a permutation of ``[0, n)`` chosen by `key`; with `inverse`, where it comes from.

    A Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that holds n, with cycle walking (Black
    & Rogaway 2002): what falls outside ``[0, n)`` is permuted again until it is inside, at most 4 times on average.
    Costs O(1) memory and time per index, also for n = 10⁹.

    Args:
        index: int64, any shape, values in [0, n).
        n: size of the domain.
        key: anything with a stable ``repr``, e.g. ``seed, "epoch", 3``; another key gives an unrelated permutation.
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(n, 2)) / 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(repr(key))
    out = index.astype(np.uint64)
    pending = np.ones(out.shape, bool)
    while pending.any():
        x = out[pending]
        left, right = x >> half, x & mask
        if inverse:
            for k in reversed(keys):
                left, right = right ^ (_mix(left ^ k) & mask), left
        else:
            for k in keys:
                left, right = right, left ^ (_mix(right ^ k) & mask)
        out[pending] = (left << half) | right
        pending = out >= n
    return out.astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(key: str) -> tuple[np.uint64, ...]:
    """One 64-bit key per Feistel round."""
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(np.frombuffer(digest, np.uint64))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def quotas(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """How many samples of each data set one epoch holds; they sum to ``sum(sizes)``.

    Args:
        sizes: samples per data set.
        weights: relative share of each data set in an epoch; None: every sample once.
    """
    if weights is None:
        return tuple(sizes)
    total = sum(sizes)
    exact = [total * w / sum(weights) for w in weights]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda d: (counts[d] - exact[d], d))
    for d in by_remainder[: total - sum(counts)]:
        counts[d] += 1
    return tuple(counts)


@dataclass(frozen=True, eq=False)  # compared by identity: a key of the cache below
class Order:
    """The order of a run's samples. A sample is a number in ``[0, sum(sizes))``: the data sets one after another.

    Attributes:
        sizes: samples per data set, as pinned.
        quotas: samples per data set in one epoch (see `quotas`). A data set is walked through in passes of its own: no
            sample comes back before all of its data set have been seen, whatever its quota.
        seed: of the pipeline.
        global_batch: samples per optimizer step; the last batch of an epoch holds what is left.
        group_keys: int64 per sample; given, samples of similar key are batched together (see `batch`).
        window: samples among which one is shuffled. None: all of an epoch. Else an epoch is a shuffled sequence of runs
            of `RUN` neighbours, shuffled once more inside windows of so many samples: a rank reads from few tars at
            a time, which matters where there are more tars than can be kept open, or seeks are dear.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int
    global_batch: int
    group_keys: Ints | None = None
    window: int | None = None

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch."""
        return sum(self.sizes)

    @property
    def epoch_batches(self) -> int:
        """Global batches in one epoch."""
        return -(-self.epoch_samples // self.global_batch)

    def sample_at(self, epoch: int, position: Ints) -> Ints:
        """The samples at `position` (int64, values in [0, epoch_samples)) of an epoch, before any grouping."""
        if self.window is None:
            slot = permute(position, self.epoch_samples, self.seed, "epoch", epoch)
        else:
            slot = self._windowed(epoch, position)
        starts = np.cumsum((0, *self.quotas))
        data = np.searchsorted(starts, slot, side="right") - 1
        samples = np.empty_like(slot)
        offset = 0
        for d, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            of_d = np.flatnonzero(data == d)
            turn = epoch * quota + slot[of_d] - starts[d]  # how many samples of d came before, over all epochs
            for number in np.unique(turn // max(size, 1)):
                here = turn // size == number
                within = turn[here] % size
                if self.window is None:
                    within = permute(within, size, self.seed, "pass", d, int(number))
                samples[of_d[here]] = offset + within
            offset += size
        return samples

    def _windowed(self, epoch: int, position: Ints) -> Ints:
        """The slots at these positions of an epoch whose runs are shuffled, and the samples inside windows of them."""
        assert self.window is not None
        quotas = np.array([quota for quota in self.quotas if quota], np.int64)
        runs = -(-quotas // RUN)
        ends, total = np.cumsum(runs), int(runs.sum())
        # The last run of a data set may be short. Where those come decides how many samples precede a run.
        lacking = runs * RUN - quotas
        last_at = permute(ends - 1, total, self.seed, "runs", epoch, inverse=True)

        def samples_before(run: Ints) -> Ints:
            run = np.minimum(run, total)
            before: Ints = run * RUN - ((last_at < run[..., None]) * lacking).sum(-1)
            return before

        per_window = max(1, self.window // RUN)
        least = position // (per_window * RUN)  # were every run before it whole
        nearest = np.arange(least.min(initial=0), least.max(initial=0) + len(runs) // per_window + 3)
        bounds = samples_before(nearest * per_window)
        window = nearest[np.searchsorted(bounds, position, side="right") - 1]
        slots = np.empty_like(position)
        for number in np.unique(window):
            here = window == number
            first = number * per_window
            order = permute(np.arange(first, min(first + per_window, total)), total, self.seed, "runs", epoch)
            starts = samples_before(np.arange(first, first + len(order) + 1))
            begin, starts = starts[0], starts - starts[0]
            at = permute(position[here] - begin, int(starts[-1]), self.seed, "window", epoch, int(number))
            run = np.searchsorted(starts, at, side="right") - 1
            of = np.searchsorted(ends, order[run], side="right")  # the run's data set
            within = at - starts[run] + (order[run] - (ends - runs)[of]) * RUN
            slots[here] = (np.cumsum(quotas) - quotas)[of] + within
        return slots

    def batch(self, step: int) -> Ints:
        """The samples of the global batch that optimizer step `step` (0-based) trains on.

        With grouping, the samples of a megabatch (64 global batches) are sorted by group key and cut into batches, and
        the batches are permuted: batches are alike inside, the training as a whole stays shuffled.
        """
        epoch, number = divmod(step, self.epoch_batches)
        if self.group_keys is None:
            return self.sample_at(epoch, self._positions(number, number + 1))
        window, slot = divmod(number, MEGABATCH)
        return _megabatch(self, epoch, window)[slot]

    def _positions(self, first: int, end: int) -> Ints:
        """Epoch positions of the batches first … end-1."""
        return np.arange(first * self.global_batch, min(end * self.global_batch, self.epoch_samples), dtype=np.int64)


@lru_cache(maxsize=2)
def _megabatch(order: Order, epoch: int, window: int) -> list[Ints]:
    """The grouped batches of one megabatch, in the order they are trained on."""
    assert order.group_keys is not None
    first = window * MEGABATCH
    samples = order.sample_at(epoch, order._positions(first, min(first + MEGABATCH, order.epoch_batches)))
    samples = samples[np.lexsort((samples, order.group_keys[samples]))]
    batches = [samples[i : i + order.global_batch] for i in range(0, len(samples), order.global_batch)]
    shuffled = permute(np.arange(len(batches)), len(batches), order.seed, "megabatch", epoch, window)
    return [batches[i] for i in shuffled]


def rank_share(batch: Ints, micro_batch: int, rank: int, ranks: int) -> list[Ints]:
    """The micro-batches of a global batch that one rank trains on: every `ranks`-th, none lost, none doubled.

    Every rank gets equally many, the last of which is empty where there are not enough.
    """
    chunks = [batch[i : i + micro_batch] for i in range(0, len(batch), micro_batch)]
    chunks += [batch[:0]] * (-len(chunks) % ranks)
    return chunks[rank::ranks]
