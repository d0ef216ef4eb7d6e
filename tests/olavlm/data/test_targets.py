import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from olavlm.config import TeacherConfig
from olavlm.data import atomic, codec, corpus, files
from olavlm.data.commit import TarWriter, describe_arrays, shard, take, tar_blocks
from olavlm.data.lease import LeaseLost
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError

BLOCK = 4
BLOCKS = range(2)


@dataclass(frozen=True)
class Tar:
    name: str = "000000 [a]"
    hash: str = "hash"


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
TEACHER = TeacherConfig(teacher="depth_anything", weights="org/depth", input_size=64, grid=2, width=6)


@pytest.fixture
def store(tmp_path: Path) -> TargetStore:
    return TargetStore.create(tmp_path / "targets", "corpus-1")


def _write(target: TargetSet, tar: Tar, images: int, blocks: range = BLOCKS, failing: frozenset[int] = frozenset()):
    """A text-only sample, then images with random features, some failed; returns the encoded rows that were added."""
    identity = target.identity
    rng = np.random.default_rng(blocks.start)
    features = rng.normal(size=(images, identity.tokens, identity.width)).astype(np.float32)
    values, scales = codec.encode(features, identity.codec)
    writer = TarWriter.open(target, tar, blocks)
    assert writer is not None
    with writer:
        writer.no_image("text")
        for i in range(images):
            if i in failing:
                writer.fail(f"k{i}", 0, "image-hash", "broken")
            else:
                writer.add(f"k{i}", 0, "image-hash", values[i], None if scales is None else scales[i], 1.0, 2.0)
        writer.commit()
    return values, scales


def _shards(target: TargetSet) -> dict[str, bytes]:
    return {str(p.relative_to(target.path)): p.read_bytes() for p in target.path.rglob("*") if p.is_file()}


# ---- stores and identities


def test_promise_7_identity_a_store_of_another_corpus_is_refused(store: TargetStore) -> None:
    with pytest.raises(OlaError, match=r"belong to corpus corpus-1, not to corpus corpus-2"):
        TargetStore.open(store.path, "corpus-2")
    with pytest.raises(OlaError, match=r"belong to corpus corpus-1, not to corpus corpus-2"):
        TargetStore.create(store.path, "corpus-2")
    assert TargetStore.create(store.path, "corpus-1").targets() == []


def test_a_store_that_is_not_there_or_not_one_is_refused(tmp_path: Path, store: TargetStore) -> None:
    with pytest.raises(OlaError, match="no target store here"):
        TargetStore.open(tmp_path / "nowhere", "corpus-1")
    (store.path / "store.json").write_text("{}")
    with pytest.raises(OlaError, match=r"not a store\.json"):
        TargetStore.open(store.path, "corpus-1")
    (store.path / "store.json").write_text('{"schema": 99, "corpus_id": "corpus-1"}')
    with pytest.raises(OlaError, match="schema 99, this version reads 1"):
        TargetStore.open(store.path, "corpus-1")


def test_identity_digest_is_stable_and_depends_on_every_field() -> None:
    assert IDENTITY.folder == "depth-24cc5cafe56d"  # changing it orphans every store there is
    other = {
        field: (7 if isinstance(value, int) else (5,) if isinstance(value, tuple) else "else")
        for field, value in vars(IDENTITY).items()
    }
    digests = {replace(IDENTITY, **{field: value}).digest for field, value in other.items()}
    assert len(digests | {IDENTITY.digest}) == len(other) + 1


def test_identity_survives_json(store: TargetStore) -> None:
    assert store.add(IDENTITY, BLOCK).identity == IDENTITY
    assert [found.identity for found in store.targets()] == [IDENTITY]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "other"}, "teacher: 'depth_anything' here, 'other' wanted"),
        ({"weights": "org/other"}, "weights: 'org/depth' here, 'org/other' wanted"),
        ({"view": "pad"}, "view: 'squash' here, 'pad' wanted"),
        ({"grid": 3}, "grid: 2 here, 3 wanted"),
        ({"width": 7}, "width: 6 here, 7 wanted"),
        ({"input_size": 32}, "input_size: 64 here, 32 wanted"),
        ({"layers": [1]}, r"layers: \(0, 1\) here, \(1,\) wanted"),
        ({"codec": "fp16"}, "codec: 'int8' here, 'fp16' wanted"),
        ({"dtype": "bfloat16"}, "compute_dtype: 'float32' here, 'bfloat16' wanted"),
        ({"revision": "v2"}, "revision: None here, 'v2' wanted"),
    ],
)
def test_promise_7_identity_another_teacher_is_refused_with_both_sides(
    store: TargetStore, change: dict[str, object], message: str
) -> None:
    store.add(IDENTITY, BLOCK)
    with pytest.raises(OlaError, match=message):
        store.find("depth", TEACHER.model_copy(update=change))


def test_find_leaves_open_what_the_pipeline_leaves_open(store: TargetStore) -> None:
    added = store.add(IDENTITY, BLOCK)
    assert store.find("depth", TEACHER).path == added.path
    assert store.find("depth", TEACHER.model_copy(update={"layers": [0, 1]})).path == added.path
    folder = store.add(replace(IDENTITY, task="seg", weights="depth"), BLOCK)
    assert store.find("seg", TEACHER.model_copy(update={"weights": "some/where/depth"})).path == folder.path


def test_find_says_what_there_is(store: TargetStore) -> None:
    with pytest.raises(OlaError, match=r"no 'depth' targets here; there are: none"):
        store.find("depth", TEACHER)
    store.add(IDENTITY, BLOCK)
    with pytest.raises(OlaError, match=r"no 'gen' targets here; there are: depth"):
        store.find("gen", TEACHER)
    store.add(replace(IDENTITY, weights_hash="11ee"), BLOCK)
    with pytest.raises(
        OlaError, match=r"2 sets of 'depth' targets fit.*weights_hash='00ff'.*weights_hash='11ee'|11ee.*00ff"
    ):
        store.find("depth", TEACHER)


def test_a_set_keeps_its_block_size(store: TargetStore) -> None:
    store.add(IDENTITY, BLOCK)
    with pytest.raises(OlaError, match=r"featurize\.block=4, not 8"):
        store.add(IDENTITY, 8)


# ---- shards


@given(st.lists(st.none() | st.binary(min_size=1, max_size=9), min_size=1, max_size=6))
def test_shard_offsets_point_at_the_chunks(chunks: list[bytes | None]) -> None:
    data, offsets = shard(chunks)
    for chunk, offset in zip(chunks, offsets, strict=True):
        assert offset == -1 if chunk is None else data[offset : offset + len(chunk)] == chunk
    assert len(data) == sum(len(chunk or b"") for chunk in chunks) + 16 * len(chunks) + 4


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 6))
def test_blocks_of_earlier_tars_do_not_move_when_a_corpus_grows(images: list[int], block: int) -> None:
    tars = [corpus.Tar(f"{i}", f"{i}.tar", "hash", 0, n, n) for i, n in enumerate([*images, 5])]
    grown = tar_blocks(tars, block)
    assert list(grown.items())[:-1] == list(tar_blocks(tars[:-1], block).items())
    assert all(tar.images <= block * len(grown[tar.name]) < tar.images + block for tar in tars)
    assert [number for blocks in grown.values() for number in blocks] == list(range(sum(map(len, grown.values()))))


@pytest.mark.parametrize("name", ["int8", "int4", "fp16"])
def test_zarr_reads_what_the_reader_reads(store: TargetStore, name: str) -> None:
    target = store.add(replace(IDENTITY, codec=name, width=32), BLOCK)
    tars = [Tar("a"), Tar("b")]
    describe_arrays(target, rows=3 * BLOCK)
    for tar, images, blocks in zip(tars, [6, 2], [range(2), range(2, 3)], strict=True):
        values, scales = _write(target, tar, images, blocks, failing=frozenset({1}))
        array = zarr.open(target.path / "values.zarr", mode="r")
        assert array.shape == (3 * BLOCK, *target.identity.layout.shape)
        for row in target.commit(tar).to_pylist():
            place = row["block"] * BLOCK + row["row"]
            if row["status"] == "failed":
                assert not array[place].any()
            if row["status"] == "ok":
                got, got_scales = target.read(row, row["key"])
                i = int(row["key"][1:])
                np.testing.assert_array_equal(got, values[i])
                np.testing.assert_array_equal(array[place], got)
                if scales is not None:
                    np.testing.assert_array_equal(got_scales, scales[i])
                    np.testing.assert_array_equal(zarr.open(target.path / "scales.zarr", mode="r")[place], got_scales)
    assert (target.path / "scales.zarr").exists() == (name != "fp16")


def test_array_metadata_grows_and_never_shrinks(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    for rows, expected in ((8, 8), (16, 16), (4, 16)):
        describe_arrays(target, rows)
        assert zarr.open(target.path / "values.zarr", mode="r").shape[0] == expected


# ---- commits


def test_a_commit_lists_every_sample_in_order(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 6, failing=frozenset({1}))
    rows = target.commit(Tar()).to_pylist()
    assert [(r["key"], r["status"], r["block"], r["row"]) for r in rows] == [
        ("text", "no_image", -1, -1),
        ("k0", "ok", 0, 0),
        ("k1", "failed", 0, 1),
        ("k2", "ok", 0, 2),
        ("k3", "ok", 0, 3),
        ("k4", "ok", 1, 0),
        ("k5", "ok", 1, 1),
    ]
    assert rows[2]["reason"] == "broken"
    assert (rows[1]["rms"], rows[1]["absmax"]) == (1.0, 2.0)


def test_promise_2_atomic_nothing_shows_before_the_commit(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    writer = TarWriter.open(target, Tar(), BLOCKS)
    values, scales = codec.encode(np.ones((1, 4, 6), np.float32), "int8")
    with writer:
        for i in range(BLOCK + 1):
            writer.add(f"k{i}", 0, "h", values[0], scales[0], 1.0, 1.0)
        assert target.values_file(0).exists()
        assert target.commit(Tar()) is None
    assert target.commit(Tar()) is None  # given up, not committed
    assert list((target.path / "leases").iterdir()) == []


def test_a_writer_leaves_the_blocks_of_the_next_tar_alone(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar("next"), 3, blocks=range(2, 4))
    whole = _shards(target)
    with pytest.raises(OlaError, match=r"tar 000000 \[a\]: its index has more images than tars.parquet says"):
        _write(target, Tar(), 2 * BLOCK + 1)
    assert {name: _shards(target)[name] for name in whole} == whole


def test_promise_3_once_a_committed_tar_is_not_opened_again(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3)
    assert TarWriter.open(target, Tar(), BLOCKS) is None
    assert list((target.path / "leases").iterdir()) == []


def test_promise_3_once_what_a_dead_writer_left_is_kept_or_replaced(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 6)
    whole = _shards(target)
    target.commit_file(Tar()).unlink()
    kept = target.values_file(0).stat().st_ino
    target.values_file(1).write_bytes(b"other bytes")  # as another GPU, or a cut write, would leave it
    for file in (target.values_file(1), target.commit_file(Tar())):
        (file.parent / f".{file.name}.12-ab.tmp").write_bytes(b"half")
    lease = target.path / "leases" / f"{Tar().name}.1"
    lease.write_text("elsewhere 12 0")
    os.utime(lease, (0, 0))
    _write(target, Tar(), 6)
    assert _shards(target) == whole
    assert target.values_file(0).stat().st_ino == kept


def test_promise_3_once_a_zombie_cannot_publish_after_a_takeover(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = store.add(IDENTITY, BLOCK)
    values, scales = codec.encode(np.ones((1, 4, 6), np.float32), "int8")
    zombie = TarWriter.open(target, Tar(), BLOCKS)
    for i in range(BLOCK):
        zombie.add(f"z{i}", 0, "h", values[0], scales[0], 1.0, 1.0)
    monkeypatch.setattr("olavlm.data.lease._stale", lambda path: True)
    _write(target, Tar(), 6)  # takes over, commits, releases
    whole = _shards(target)
    with pytest.raises(LeaseLost):
        zombie.add("z4", 0, "h", values[0], scales[0], 1.0, 1.0)  # the block is full
    with pytest.raises(LeaseLost):
        zombie.commit()
    zombie.__exit__()
    assert _shards(target) == whole


@pytest.mark.parametrize("fails", ["olavlm.data.commit.sweep", "pathlib.Path.exists"])
def test_promise_3_once_an_error_on_the_way_to_a_tar_leaves_it_to_the_next(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """As of a file server that is away: a lease kept by nobody would have a heart all the same.

    And who was fenced off before stays so, though nobody has swept its files yet.
    """

    def fail(*_: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target = store.add(IDENTITY, BLOCK)
    zombie = TarWriter.open(target, Tar(), BLOCKS)
    assert zombie is not None
    block = target.values_file(0)
    atomic.replace(block.with_name(f".{block.name}.1-ab.tmp"), b"what it is about to rename")
    with monkeypatch.context() as patch:
        patch.setattr("olavlm.data.lease._stale", lambda path: True)
        patch.setattr(fails, fail)
        with pytest.raises(OSError, match="Input/output error"):
            TarWriter.open(target, Tar(), BLOCKS)
    _write(target, Tar(), 3)
    zombie.__exit__()
    assert [path.name for path in block.parent.iterdir()] == [block.name]
    assert list((target.path / "leases").iterdir()) == []


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("left", [None, b"of a writer before"])
@pytest.mark.parametrize("given_back", [False, True])
def test_promise_3_once_a_zombie_stopped_right_before_the_rename_fails(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch, form: str, left: bytes | None, given_back: bool
) -> None:
    """Also where whoever took the tar over gave it back, as gc and repair do, so that its writer found it free."""
    target = store.add(IDENTITY, BLOCK, form)
    values, scales = codec.encode(np.ones((1, 4, 6), np.float32), "int8")
    zombie = TarWriter.open(target, Tar(), BLOCKS)
    for i in range(BLOCK):
        zombie.add(f"z{i}", 0, "h", values[0], scales[0], 1.0, 1.0)
    check, whole = zombie._lease.check, {}
    steps = [None] if left is None else [None, None]  # it links its block, or finds one there and replaces it
    if left:
        atomic.publish(target.values_file(0), left)

    def takeover_after_the_check() -> None:
        check()
        steps.pop()
        if steps:
            return
        monkeypatch.setattr(zombie._lease, "check", check)
        monkeypatch.setattr("olavlm.data.lease._stale", lambda path: True)
        if given_back:
            take(target, Tar().name, BLOCKS).release()
        _write(target, Tar(), 6)
        whole.update(_shards(target))

    monkeypatch.setattr(zombie._lease, "check", takeover_after_the_check)
    with pytest.raises(LeaseLost):
        zombie.add("z4", 0, "h", values[0], scales[0], 1.0, 1.0)
    zombie.__exit__()
    assert _shards(target) == whole


def test_a_commit_of_another_content_of_the_tar_does_not_count(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3)
    changed = Tar(hash="changed")
    assert target.commit(changed) is None
    with pytest.raises(OlaError, match=r"its content was another than the corpus now says \(changed\)"):
        _write(target, changed, 3)


def test_a_commit_of_another_set_is_refused(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    other = store.add(replace(IDENTITY, view="pad"), BLOCK)
    _write(target, Tar(), 3)
    other.commit_file(Tar()).write_bytes(target.commit_file(Tar()).read_bytes())
    with pytest.raises(OlaError, match="not a commit of depth-"):
        other.commit(Tar())


def test_a_damaged_commit_is_named(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3)
    file = target.commit_file(Tar())
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(OlaError, match=r"000000 \[a\]\.parquet: cannot be read"):
        target.commit(Tar())


# ---- reading


def test_promise_1_key_checked_a_row_of_another_sample_is_refused(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3)
    row = target.commit(Tar()).to_pylist()[1]
    with pytest.raises(OlaError, match=r"wanted the target of sample 'k1', the commit's row is of 'k0'"):
        target.read(row, "k1")
    with pytest.raises(OlaError, match="damaged: the target of sample 'k1'"):
        target.read({**row, "key": "k1"}, "k1")  # right range and bytes, another sample's


def test_a_failed_image_cannot_be_read(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3, failing=frozenset({0}))
    with pytest.raises(OlaError, match="status 'failed' broken"):
        target.read(target.commit(Tar()).to_pylist()[1], "k0")


def test_damaged_and_missing_bytes_are_named(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    _write(target, Tar(), 3)
    rows = target.commit(Tar()).to_pylist()
    file = target.values_file(0)
    content = file.read_bytes()

    flipped = bytearray(content)
    flipped[rows[2]["values_offset"]] ^= 1
    file.write_bytes(flipped)
    TargetSet(target.path).read(rows[1], "k0")
    with pytest.raises(OlaError, match=r"0/0/0: damaged: the target of sample 'k1', image 0"):
        TargetSet(target.path).read(rows[2], "k1")

    file.write_bytes(content[:30])
    with pytest.raises(OlaError, match="cut short: of sample 'k1' at byte 24, 6 of 24 bytes are there"):
        TargetSet(target.path).read(rows[2], "k1")

    file.unlink()
    with pytest.raises(OlaError, match="missing, though the target of sample 'k1' is committed in it"):
        TargetSet(target.path).read(rows[2], "k1")

    file.mkdir()
    with pytest.raises(OlaError, match=r"the target of sample 'k1' cannot be read \(Is a directory\)"):
        TargetSet(target.path).read(rows[2], "k1")


def test_a_block_that_another_machine_replaced_is_opened_anew(
    store: TargetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: what an open file was replaced by is there, but reading on in the open one fails with ESTALE."""
    target = store.add(IDENTITY, BLOCK)
    values, _ = _write(target, Tar(), 3)
    row = target.commit(Tar()).to_pylist()[1]
    target.read(row, "k0")
    file = target.values_file(0)
    gone, preadv = file.stat().st_ino, os.preadv
    atomic.replace(file, file.read_bytes())

    def stale(fd: int, *arguments: Any) -> int:
        if os.fstat(fd).st_ino == gone:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(fd, *arguments)

    monkeypatch.setattr(os, "preadv", stale)
    assert (target.read(row, "k0")[0] == values[0]).all()


def test_all_readers_of_a_process_hold_few_files_open(store: TargetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two corpora with three sets each, every one with 128 files, would reach the usual limit of 1024."""
    monkeypatch.setattr(files, "STAY_OPEN", 10)
    target = store.add(IDENTITY, 1)
    _write(target, Tar(), 8, range(8))
    rows = target.commit(Tar()).to_pylist()[1:]
    before = len(os.listdir("/dev/fd"))
    readers = [TargetSet(target.path) for _ in range(8)]
    for row in rows:
        for reader in readers:
            reader.read(row, row["key"])
    assert len(os.listdir("/dev/fd")) <= before + 10
    readers.clear()
    del reader
    assert len(os.listdir("/dev/fd")) <= before


def test_many_threads_read_more_files_than_stay_open(store: TargetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    target = store.add(IDENTITY, 1)
    values, scales = _write(target, Tar(), 40, range(40))
    rows = target.commit(Tar()).to_pylist()[1:]
    reader = TargetSet(target.path)
    monkeypatch.setattr(files, "STAY_OPEN", 3)

    def check(i: int) -> bool:
        got, got_scales = reader.read(rows[i], f"k{i}")
        return bool((got == values[i]).all() and (got_scales == scales[i]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, [i % 40 for i in range(400)]))


def test_target_json_says_everything(store: TargetStore) -> None:
    target = store.add(IDENTITY, BLOCK)
    content = json.loads((target.path / "target.json").read_text())
    assert (content["block"], content["format"]) == (BLOCK, "zarr")
    assert content["identity"] == {**vars(IDENTITY), "layers": [0, 1]}
    (target.path / "target.json").write_text("{}")
    with pytest.raises(OlaError, match=r"not a target\.json"):
        store.targets()
