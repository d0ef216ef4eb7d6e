"""A second try at failed images: what is there stays readable, what comes is added."""

import io
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import zarr
from hypothesis import given
from hypothesis import strategies as st

from olavlm.data import atomic, codec
from olavlm.data.amend import TarAmender
from olavlm.data.commit import TarWriter, describe_arrays, shard_index, shard_ranges
from olavlm.data.corpus import content_hash
from olavlm.data.lease import LeaseLost
from olavlm.data.objects import AnyPath, ObjectPath
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError

BLOCK, IMAGES = 4, 10
BLOCKS = range(3)
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


@pytest.fixture(params=["disk", "s3"])
def place(request: Any, tmp_path: Path) -> AnyPath:
    return tmp_path if request.param == "disk" else request.getfixturevalue("s3")


@pytest.fixture
def store(place: AnyPath) -> TargetStore:
    return TargetStore.create(place / "targets", "corpus-1")


def _put(writer: Any, i: int, failing: Set[int] = frozenset()) -> None:
    if i in failing:
        writer.fail(f"k{i}", 0, f"hash {i}", "broken")
    else:
        values, scales = codec.encode(FEATURES[i : i + 1], writer._target.identity.codec)
        writer.add(f"k{i}", 0, f"hash {i}", values[0], None if scales is None else scales[0], 1.0, 2.0)


@pytest.fixture(params=[("int8", "zarr"), ("fp16", "zarr"), ("int8", "webdataset")], ids="-".join)
def make(request: Any, store: TargetStore) -> Callable[[set[int]], TargetSet]:
    """A set with one committed tar: a text-only sample, then ten images of which some have failed."""

    def build(failing: set[int]) -> TargetSet:
        codec_name, form = request.param
        target = store.add(replace(IDENTITY, codec=codec_name), BLOCK, form)
        describe_arrays(target, 3 * BLOCK)
        writer = TarWriter.open(target, Tar(), BLOCKS)
        assert writer is not None
        with writer:
            writer.no_image("text")
            for i in range(IMAGES):
                _put(writer, i, failing)
            writer.commit()
        return target

    return build


def _amend(target: TargetSet, failing: Set[int] = frozenset()) -> None:
    amender = TarAmender.open(target, Tar(), BLOCKS)
    assert amender is not None
    with amender:
        for position in sorted(amender.failed):
            _put(amender, position - 1, failing)
        amender.commit()


def _paths(target: TargetSet) -> list[AnyPath]:
    if isinstance(target.path, ObjectPath):
        return [path for path, _ in target.path.walk()]
    return [path for path in target.path.rglob("*") if path.is_file()]


def _files(target: TargetSet) -> dict[str, bytes]:
    return {str(path)[len(str(target.path)) + 1 :]: path.read_bytes() for path in _paths(target)}


def _arrays(target: TargetSet) -> dict[str, np.ndarray[Any, Any]]:
    """What others read of a set by image: zarr's rows, or webdataset's samples."""
    files = _files(target)
    if target.format == "zarr":
        stored = zarr.storage.MemoryStore(
            {name.removeprefix("values.zarr/"): zarr.core.buffer.cpu.Buffer.from_bytes(data)
             for name, data in files.items() if name.startswith("values.zarr/")}
        )  # fmt: skip
        array = zarr.open(stored, mode="r")
        rows = target.commit(Tar()).to_pylist()
        return {row["key"]: array[row["block"] * BLOCK + row["row"]] for row in rows if row["status"] == "ok"}
    found = {}
    for name, data in files.items():
        if name.startswith("tars/"):
            stream = iter(webdataset.tariterators.tar_file_iterator(io.BytesIO(data)))
            for sample in webdataset.tariterators.group_by_keys({**member, "__url__": name} for member in stream):
                assert sample["__key__"] not in found
                found[sample["__key__"]] = np.load(io.BytesIO(sample["npy"]))
    return found


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
    arrays = _arrays(target)
    assert len(arrays) == IMAGES - 1
    for row in new:
        if row["status"] == "ok":
            np.testing.assert_array_equal(arrays[row["key"]], TargetSet(target.path).read(row, row["key"])[0])
    assert list((target.path / "leases").iterdir()) == []


def test_nothing_is_written_where_nothing_succeeds(make: Any) -> None:
    target = make({1, 5})
    before = _files(target)
    _amend(target, failing={1, 5})
    assert _files(target) == before


def test_only_a_committed_tar_with_failures_is_opened(make: Any, store: TargetStore) -> None:
    target = make(set())
    assert TarAmender.open(target, Tar(), BLOCKS) is None
    assert TarAmender.open(target, Tar("another"), BLOCKS) is None
    assert list((target.path / "leases").iterdir()) == []


@pytest.mark.parametrize("failing", [set(), {1}], ids=["alike", "less"])
def test_promise_2_atomic_a_try_that_dies_before_its_commit_changes_nothing_that_shows(
    make: Any, failing: set[int]
) -> None:
    """Its chunks lie in the shards, unlisted; the next try gives the bytes of one that was never disturbed."""
    target = make({1, 2, 5})
    before = target.commit_file(Tar()).read_bytes()
    amender = TarAmender.open(target, Tar(), BLOCKS)
    with amender:
        for i in (1, 2, 5):
            _put(amender, i)  # publishes block 0, when an image of block 1 comes
    assert target.commit_file(Tar()).read_bytes() == before
    assert _readable(target, target.commit(Tar()).to_pylist()) == set(range(IMAGES)) - {1, 2, 5}
    _amend(target, failing=failing)
    assert _readable(target, target.commit(Tar()).to_pylist()) == set(range(IMAGES)) - failing
    disturbed = _files(target)

    for file in _paths(target):
        if file.name != "target.json":
            file.unlink()
    again = make({1, 2, 5})
    _amend(again, failing=failing)
    unbroken = _files(again)
    if failing and isinstance(target.path, ObjectPath):  # where nothing is ever taken away
        assert [len(disturbed[name]) - len(unbroken[name]) >= 0 for name in unbroken]
    else:
        assert unbroken == disturbed


def test_promise_3_once_a_zombie_cannot_amend_after_a_takeover(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make({1, 5})
    zombie = TarAmender.open(target, Tar(), BLOCKS)
    _put(zombie, 1)
    monkeypatch.setattr("olavlm.data.lease._stale", lambda path: True)
    _amend(target)
    whole = _files(target)

    def go_on() -> None:
        _put(zombie, 5)  # another block, so that the first is published
        zombie.commit()

    with pytest.raises(LeaseLost):
        go_on()
    zombie.__exit__()
    assert _files(target) == whole


def test_another_image_than_the_committed_one_is_refused(make: Any) -> None:
    target = make({1})
    amender = TarAmender.open(target, Tar(), BLOCKS)
    values, scales = codec.encode(FEATURES[:1], target.identity.codec)
    with amender, pytest.raises(OlaError, match=r"sample 'k1', image 0 has hash hash 1 in the commit and other in the"):
        amender.add("k1", 0, "other", values[0], scales if scales is None else scales[0], 1.0, 2.0)


def test_a_shard_cut_short_is_not_amended(make: Any) -> None:
    target = make({1})
    file = target.values_file(0)
    atomic.replace(file, file.read_bytes()[:20])
    with pytest.raises(OlaError, match=r"cut short, 20 of \d+ bytes; run `python -m featurize repair` first"):
        _amend(target)


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_chunk_that_a_dead_try_left_and_that_is_damaged_is_not_taken(make: Any) -> None:
    target = make({1, 2, 5})
    with TarAmender.open(target, Tar(), BLOCKS) as amender:
        for i in (1, 2, 5):
            _put(amender, i)  # publishes block 0, when an image of block 1 comes
    file, values = target.values_file(0), codec.encode(FEATURES[1:2], target.identity.codec)[0][0].tobytes()
    there = file.read()
    damaged = values[:-1] + bytes([values[-1] ^ 1])
    assert there.data.count(values) == 1
    file.update(there.data.replace(values, damaged), there.version, there.notes)
    _amend(target)
    assert _readable(target, target.commit(Tar()).to_pylist()) == set(range(IMAGES))


# ---- in an object store, where a writer may wake up between its last look at the lease and its write


def _others(target: TargetSet, amender: TarAmender, images: Iterable[int]) -> None:
    """Add targets as another GPU would compute them."""
    for i in images:
        values, scales = codec.encode(FEATURES[i : i + 1] * np.float32(1.01), target.identity.codec)
        amender.add(f"k{i}", 0, f"hash {i}", values[0], None if scales is None else scales[0], 1.0, 2.0)


def _undamaged(target: TargetSet) -> set[int]:
    """The images that can be read, whosever computation it was; and others read the very same."""
    reader, arrays = TargetSet(target.path), _arrays(target)
    rows = [row for row in target.commit(Tar()).to_pylist() if row["status"] == "ok"]
    for row in rows:
        np.testing.assert_array_equal(reader.read(row, row["key"])[0], arrays[row["key"]])
    return {int(row["key"][1:]) for row in rows}


@pytest.mark.parametrize("make", [("int8", "zarr"), ("int8", "webdataset")], ids="-".join, indirect=True)
@pytest.mark.parametrize("place", ["s3"], indirect=True)
@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_promise_3_once_of_two_tries_in_s3_the_slower_damages_nothing(
    make: Any, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is stopped right before its `last`-th write, when another takes over, computes other bytes and ends."""
    target = make({1, 2, 5})
    first = TarAmender.open(target, Tar(), BLOCKS)
    check, looks, committed = first._lease.check, [], []

    def second_comes() -> None:
        check()
        looks.append(1)
        if len(looks) == last:
            with monkeypatch.context() as patch:
                patch.setattr("olavlm.data.lease._stale", lambda path: True)
                second = TarAmender.open(target, Tar(), BLOCKS)
            with second:
                _others(target, second, (1, 5))
                second.fail("k2", 0, "hash 2", "broken")
                second.commit()
            committed.append(target.commit_file(Tar()).read_bytes())

    monkeypatch.setattr(first._lease, "check", second_comes)

    def go_on() -> None:
        for i in (1, 2, 5):
            _put(first, i)
        first.commit()

    with pytest.raises(LeaseLost):
        go_on()
    first.__exit__()
    assert committed == [target.commit_file(Tar()).read_bytes()]
    assert _undamaged(target) == set(range(IMAGES)) - {2}
    _amend(target)
    assert _undamaged(target) == set(range(IMAGES))


@pytest.mark.parametrize("make", [("int8", "zarr"), ("int8", "webdataset")], ids="-".join, indirect=True)
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_promise_3_once_the_faster_of_two_tries_in_s3_commits_though_it_lost_its_lease(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make({1, 2, 5})
    first = TarAmender.open(target, Tar(), BLOCKS)
    for i in (1, 2, 5):
        _put(first, i)
    with monkeypatch.context() as patch:
        patch.setattr("olavlm.data.lease._stale", lambda path: True)
        second = TarAmender.open(target, Tar(), BLOCKS)
    _others(target, second, (1, 2, 5))
    monkeypatch.setattr(first._lease, "check", lambda: None)
    first.commit()
    with pytest.raises(LeaseLost, match=r"parquet: written by another writer"):
        second.commit()
    second.__exit__()
    assert _undamaged(target) == set(range(IMAGES))


@given(st.dictionaries(st.integers(0, 8), st.tuples(st.integers(0, 2**40), st.integers(1, 99))))
def test_a_shards_index_reads_back(ranges: dict[int, tuple[int, int]]) -> None:
    index = shard_index(9, ranges)
    assert shard_ranges(index) == ranges
    for damaged in (index[:-1], bytes([index[0] ^ 1]) + index[1:]):
        with pytest.raises(ValueError, match="damaged"):
            shard_ranges(damaged)
