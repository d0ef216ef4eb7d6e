"""A second try at failed images: what is there stays readable, what comes is added."""

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from olavlm.data import codec
from olavlm.data.amend import TarAmender
from olavlm.data.commit import TarWriter, describe_arrays, shard_index, shard_ranges
from olavlm.data.corpus import content_hash
from olavlm.data.lease import LeaseLost
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError

BLOCK, IMAGES = 4, 10
IDENTITY = Identity(
    task="depth",
    teacher="depth_anything",
    weights="org/depth",
    revision=None,
    weights_hash="00ff",
    compute_dtype="float32",
    view="squash",
    input_size=64,
    preprocessing="bicubic",
    position_embedding="as trained",
    layers=(0, 1),
    pooling="mean",
    grid=2,
    width=6,
    codec="int8",
)
FEATURES = np.random.default_rng(0).normal(size=(IMAGES, 4, 6)).astype(np.float32)


@dataclass(frozen=True)
class Tar:
    name: str = "000000 [a]"
    hash: str = "hash"


@pytest.fixture
def store(tmp_path: Path) -> TargetStore:
    return TargetStore.create(tmp_path / "targets", "corpus-1")


def _put(writer: Any, i: int, failing: Set[int] = frozenset()) -> None:
    if i in failing:
        writer.fail(f"k{i}", 0, f"hash {i}", "broken")
    else:
        values, scales = codec.encode(FEATURES[i : i + 1], writer._target.identity.codec)
        writer.add(f"k{i}", 0, f"hash {i}", values[0], None if scales is None else scales[0], 1.0, 2.0)


@pytest.fixture(params=["int8", "fp16"])
def make(request: Any, store: TargetStore) -> Callable[[set[int]], TargetSet]:
    """A set with one committed tar: a text-only sample, then ten images of which some have failed."""

    def build(failing: set[int]) -> TargetSet:
        target = store.add(replace(IDENTITY, codec=request.param), BLOCK)
        describe_arrays(target, 3 * BLOCK)
        writer = TarWriter.open(target, Tar(), 0)
        assert writer is not None
        with writer:
            writer.no_image("text")
            for i in range(IMAGES):
                _put(writer, i, failing)
            writer.commit()
        return target

    return build


def _amend(target: TargetSet, failing: Set[int] = frozenset()) -> None:
    amender = TarAmender.open(target, Tar())
    assert amender is not None
    with amender:
        for position in sorted(amender.failed):
            _put(amender, position - 1, failing)
        amender.commit()


def _files(target: TargetSet) -> dict[str, bytes]:
    return {str(p.relative_to(target.path)): p.read_bytes() for p in target.path.rglob("*") if p.is_file()}


def _readable(target: TargetSet, rows: list[dict[str, Any]]) -> set[int]:
    """The images that read as what was encoded, by a reader with no file open yet."""
    reader, found = TargetSet(target.path), set()
    for row in rows:
        if row["status"] == "ok":
            i = int(row["key"][1:])
            values, scales = reader.read(row, row["key"])
            expected = codec.encode(FEATURES[i : i + 1], target.identity.codec)
            np.testing.assert_array_equal(values, expected[0][0])
            if scales is not None:
                np.testing.assert_array_equal(scales, expected[1][0])
            found.add(i)
    return found


def test_a_second_try_adds_and_the_old_commit_stays_readable(make: Any) -> None:
    target = make({1, 2, 5})
    old_file = target.commit_file(Tar()).read_bytes()
    old = target.commit(Tar()).to_pylist()
    _amend(target, failing={2})
    new = target.commit(Tar()).to_pylist()
    everything = set(range(IMAGES))
    assert _readable(target, new) == everything - {2}
    assert _readable(target, old) == everything - {1, 2, 5}
    for before, after in zip(old, new, strict=True):
        assert before == after or before["status"] == "failed"
    pinned = target.commit(Tar(), content_hash(old_file))
    assert pinned.to_pylist() == old
    assert target.commit(Tar(), content_hash(target.commit_file(Tar()).read_bytes())).to_pylist() == new
    assert target.commit(Tar(), "0" * 32) is None
    array = zarr.open(target.path / "values.zarr", mode="r")
    for row in new:
        if row["status"] == "ok":
            np.testing.assert_array_equal(array[row["block"] * BLOCK + row["row"]], target.read(row, row["key"])[0])
    assert list((target.path / "leases").iterdir()) == []


def test_nothing_is_written_where_nothing_succeeds(make: Any) -> None:
    target = make({1, 5})
    before = _files(target)
    _amend(target, failing={1, 5})
    assert _files(target) == before


def test_only_a_committed_tar_with_failures_is_opened(make: Any, store: TargetStore) -> None:
    target = make(set())
    assert TarAmender.open(target, Tar()) is None
    assert TarAmender.open(target, Tar("another")) is None
    assert list((target.path / "leases").iterdir()) == []


def test_promise_2_atomic_a_try_that_dies_before_its_commit_changes_nothing_that_shows(make: Any) -> None:
    """Its chunks lie in the shards, unlisted; the next try gives the bytes of one that was never disturbed."""
    target = make({1, 2, 5})
    before = target.commit_file(Tar()).read_bytes()
    amender = TarAmender.open(target, Tar())
    with amender:
        for i in (1, 2, 5):
            _put(amender, i)  # publishes block 0, when an image of block 1 comes
    assert target.commit_file(Tar()).read_bytes() == before
    assert _readable(target, target.commit(Tar()).to_pylist()) == set(range(IMAGES)) - {1, 2, 5}
    _amend(target, failing={1})
    disturbed = _files(target)

    for file in sorted(target.path.rglob("*"), reverse=True):
        if file.is_file() and file.name != "target.json":
            file.unlink()
    again = make({1, 2, 5})
    _amend(again, failing={1})
    assert _files(again) == disturbed


def test_promise_3_once_a_zombie_cannot_amend_after_a_takeover(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make({1, 5})
    zombie = TarAmender.open(target, Tar())
    _put(zombie, 1)
    monkeypatch.setattr("olavlm.data.lease._stale", lambda path: True)
    _amend(target)
    whole = _files(target)
    with pytest.raises(LeaseLost):
        _put(zombie, 5)  # another block, so that the first is published
    with pytest.raises(LeaseLost):
        zombie.commit()
    zombie.__exit__()
    assert _files(target) == whole


def test_another_image_than_the_committed_one_is_refused(make: Any) -> None:
    target = make({1})
    amender = TarAmender.open(target, Tar())
    values, scales = codec.encode(FEATURES[:1], target.identity.codec)
    with amender, pytest.raises(OlaError, match=r"sample 'k1', image 0 has hash hash 1 in the commit and other in the"):
        amender.add("k1", 0, "other", values[0], scales if scales is None else scales[0], 1.0, 2.0)


def test_a_shard_cut_short_is_not_amended(make: Any) -> None:
    target = make({1})
    file = target.values_file(0)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(OlaError, match=r"cut short, 20 of \d+ bytes; run `python -m featurize repair` first"):
        _amend(target)


@given(st.dictionaries(st.integers(0, 8), st.tuples(st.integers(0, 2**40), st.integers(1, 99))))
def test_a_shards_index_reads_back(ranges: dict[int, tuple[int, int]]) -> None:
    index = shard_index(9, ranges)
    assert shard_ranges(index) == ranges
    for damaged in (index[:-1], bytes([index[0] ^ 1]) + index[1:]):
        with pytest.raises(ValueError, match="damaged"):
            shard_ranges(damaged)
