"""Paths that are URLs, against an S3 API; and promises 2 and 3 where neither rename nor fence exist."""

import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olavlm.data import atomic, codec
from olavlm.data import lease as lease_module
from olavlm.data.commit import TarWriter, describe_arrays
from olavlm.data.files import OpenFiles
from olavlm.data.lease import Lease, LeaseLost
from olavlm.data.objects import ObjectPath, as_path, join, local_path
from olavlm.data.targets import TargetSet, TargetStore
from olavlm.errors import OlaError

from .test_targets import BLOCK, BLOCKS, IDENTITY, Tar

FEATURES = np.random.default_rng(0).normal(size=(6, 4, 6)).astype(np.float32)
OTHERS = FEATURES * np.float32(1.0001)  # as another GPU would compute them


# ---- paths


def test_urls_and_paths_are_told_apart() -> None:
    assert as_path("s3://bucket/a/b/") == ObjectPath("bucket", "a/b") == as_path("s3://bucket") / "a" / "b"
    assert as_path("a/b") == Path("a/b")
    assert as_path(ObjectPath("bucket", "a")) == ObjectPath("bucket", "a")
    path = as_path("s3://bucket/a/b.c.tar")
    assert (path.name, path.stem, path.parent, str(path)) == (
        "b.c.tar", "b.c", ObjectPath("bucket", "a"), "s3://bucket/a/b.c.tar",
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(path)) == path
    assert join(path.parent, "tars/0.tar") == ObjectPath("bucket", "a/tars/0.tar")
    assert join(path, "/0.tar") == Path("/0.tar")
    assert join(Path("a"), "s3://b/0.tar") == ObjectPath("b", "0.tar")


@pytest.mark.parametrize("url", ["gs://bucket/a", "s3://", "s3://bucket//a", "s3://bucket/a/../b"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(OlaError, match=r"expected a local path, or a URL like s3://bucket/folder"):
        as_path(url)


def test_what_must_be_on_a_disk_is_said() -> None:
    assert local_path("a") == Path("a")
    with pytest.raises(OlaError, match="corpora are made on a local disk"):
        local_path("s3://bucket/a")


def test_without_the_extra_one_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(OlaError, match=r"s3://never: reading object stores needs an extra: `pip install \.\[s3\]`"):
        as_path("s3://never/a").read_bytes()


def test_objects_are_read_and_written_like_files(s3: ObjectPath, tmp_path: Path) -> None:
    path = s3 / "folder" / "[a] b é%"
    assert not path.exists()
    assert not path.parent.is_dir()
    for missing in (path.read_bytes, path.stat, path.unlink, lambda: path.open("rb"), lambda: path.pread(1, 0)):
        with pytest.raises(FileNotFoundError, match=r"folder/\[a\] b"):
            missing()
    path.unlink(missing_ok=True)
    atomic.publish(path, b"first")
    with pytest.raises(FileExistsError):
        atomic.publish(path, b"second")
    assert path.read_text() == "first"
    atomic.replace(path, b"third")
    atomic.ensure(path, b"fourth")
    assert path.read_bytes() == b"third"
    assert (path.is_file(), path.parent.is_dir(), path.stat().st_size) == (True, True, 5)
    path.unlink()
    assert not path.exists()


def test_only_the_version_that_was_seen_is_updated(s3: ObjectPath) -> None:
    path = s3 / "a"
    path.put(b"1")
    seen = path.version()
    newer = path.update(b"2", seen)
    with pytest.raises(FileNotFoundError):
        path.update(b"3", seen)
    path.update(b"4", newer)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        path.update(b"5", newer)
    assert not path.exists()


def test_globs(s3: ObjectPath) -> None:
    for name in ("a/target.json", "b/target.json", "b/c/target.json", "b/other", "[x].1", "x.1"):
        (s3 / "in" / name).put(b"")
    found = {pattern: sorted(str(p)[len(str(s3)) + 4 :] for p in (s3 / "in").glob(pattern)) for pattern in
             ("*/target.json", "[[]x].*", "*", "b/*", "no/*")}  # fmt: skip
    assert found == {
        "*/target.json": ["a/target.json", "b/target.json"],
        "[[]x].*": ["[x].1"],
        "*": ["[x].1", "x.1"],
        "b/*": ["b/other", "b/target.json"],
        "no/*": [],
    }


def test_byte_ranges_are_those_of_a_file(s3: ObjectPath, tmp_path: Path) -> None:
    data = bytes(range(100))
    for path in (tmp_path / "file", s3 / "file"):
        atomic.publish(path, data)
        files = OpenFiles()
        ranges = [(10, 5), (1000, 90), (5, 100), (5, 200), (0, 3)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda r, p=path, f=files: f.pread(p, *r), ranges * 5))
        assert found == [data[offset : offset + count] for count, offset in ranges] * 5
        assert files.size(path) == OpenFiles().size(path) == 100
        with pytest.raises(FileNotFoundError):
            files.pread(path.parent / "none", 1, 0)


def test_a_tar_is_read_through_the_stream(s3: ObjectPath, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 3000)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
        tar.add(tmp_path / "b", "b")
    (s3 / "x.tar").put((tmp_path / "x.tar").read_bytes())
    with (s3 / "x.tar").open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == {"a": b"a" * 3000, "b": b"b" * 3000}


def test_what_the_store_refuses_is_said(s3: ObjectPath) -> None:
    with pytest.raises(OlaError, match="there is no bucket 'no-such-bucket'"):
        atomic.ensure(as_path("s3://no-such-bucket/a"), b"")
    with pytest.raises(FileNotFoundError):
        as_path("s3://no-such-bucket/a").read_bytes()
    (s3 / "a").put(b"0123")
    assert (s3 / "a").pread(1, 9) == (b"", 4)


def test_promise_2_atomic_of_many_creators_one_wins(s3: ObjectPath) -> None:
    def create(i: int) -> int:
        try:
            atomic.publish(s3 / f"name{i % 5}", str(i).encode())
        except FileExistsError:
            return -1
        return i

    with ThreadPoolExecutor(8) as pool:
        winners = {i for i in pool.map(create, range(40)) if i >= 0}
    assert {int((s3 / f"name{n}").read_text()) for n in range(5)} == winners
    assert len(winners) == 5


# ---- leases


def test_a_lease_is_held_by_one_and_leaves_no_object(s3: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease.acquire(s3 / "leases", "tar [1]") as first:
        assert Lease.acquire(s3 / "leases", "tar [1]") is None
        first.check()
        monkeypatch.setattr(lease_module, "_stale", lambda path: True)
        with Lease.acquire(s3 / "leases", "tar [1]") as second:
            with pytest.raises(LeaseLost):
                first.check()
            second.check()
    assert not (s3 / "leases").is_dir()


def test_a_heart_beats_and_a_lease_that_was_taken_does_not_come_back(
    s3: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_BEAT", 0.01)
    beats = []
    update = ObjectPath.update
    monkeypatch.setattr(ObjectPath, "update", lambda *a: beats.append(1) or update(*a))
    lease = Lease.acquire(s3 / "leases", "tar")
    while len(beats) < 3:
        pass
    lease.path.unlink()  # as a successor does when it is done
    lease._heart.join()
    assert not lease.path.exists()


# ---- targets


@pytest.fixture(params=["zarr", "webdataset"])
def target(s3: ObjectPath, request: pytest.FixtureRequest) -> TargetSet:
    found = TargetStore.create(s3 / "targets", "corpus").add(IDENTITY, BLOCK, request.param)
    describe_arrays(found, 2 * BLOCK)
    return found


def write(target: TargetSet, tar: Tar = Tar(), features: Any = FEATURES, images: int = 6) -> None:  # noqa: B008
    with TarWriter.open(target, tar, BLOCKS) as writer:
        fill(writer, features, images)
        writer.commit()


def fill(writer: TarWriter, features: Any, images: int, rms: float = 1.0) -> None:
    values, scales = codec.encode(features, "int8")
    for i in range(images):
        writer.add(f"k{i}", 0, "image-hash", values[i], scales[i], rms, 2.0)


def check_readable(target: TargetSet) -> None:
    """Every target is there, undamaged, and within a quantization step of what was computed."""
    reader = TargetSet(target.path)
    rows = reader.commit(Tar()).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 6
    for i, row in enumerate(rows):
        values, scales = reader.read(row, f"k{i}")
        step = scales[:, None]
        assert (np.abs(values * step - FEATURES[i]) <= 1.01 * step).all()


def test_a_set_in_s3_is_written_once_and_read_back(target: TargetSet) -> None:
    write(target)
    check_readable(target)
    assert TarWriter.open(target, Tar(), BLOCKS) is None
    assert not (target.path / "leases").is_dir()
    assert TargetStore.open(str(target.path.parent), "corpus").targets()[0].identity == IDENTITY


def test_promise_3_once_two_writers_at_one_tar(target: TargetSet) -> None:
    with TarWriter.open(target, Tar(), BLOCKS):
        assert TarWriter.open(target, Tar(), BLOCKS) is None
    write(target)
    check_readable(target)


def test_promise_3_once_a_zombie_in_s3_can_change_nothing(
    target: TargetSet, monkeypatch: pytest.MonkeyPatch, objects: Any
) -> None:
    """It is stopped between its last look at the lease and its write, and computes other bytes than its successor."""
    zombie = TarWriter.open(target, Tar(), BLOCKS)
    check, whole = zombie._lease.check, {}

    def takeover_after_the_check() -> None:
        check()
        monkeypatch.setattr(zombie._lease, "check", check)
        with monkeypatch.context() as patch:
            patch.setattr(lease_module, "_stale", lambda path: True)
            write(target)
        whole.update(objects(target.path))

    monkeypatch.setattr(zombie._lease, "check", takeover_after_the_check)

    def go_on() -> None:
        fill(zombie, OTHERS, 6)
        zombie.commit()

    with pytest.raises(LeaseLost):
        go_on()
    zombie.__exit__()
    assert objects(target.path) == whole
    check_readable(target)


def test_promise_3_once_a_zombie_in_s3_that_commits_first_has_committed_what_is_there(
    target: TargetSet, monkeypatch: pytest.MonkeyPatch, objects: Any
) -> None:
    """Its commit passes the last look at the lease, then its successor has published a block; then the commit lands."""
    zombie = TarWriter.open(target, Tar(), BLOCKS)
    fill(zombie, OTHERS, 5)  # the first block is published, the second is being filled
    monkeypatch.setattr(lease_module, "_stale", lambda path: True)
    successor = TarWriter.open(target, Tar(), BLOCKS)
    fill(successor, FEATURES, 6, rms=1.1)
    monkeypatch.setattr(zombie._lease, "check", lambda: None)
    values, scales = codec.encode(OTHERS, "int8")
    zombie.add("k5", 0, "image-hash", values[5], scales[5], 1.0, 2.0)
    zombie.commit()
    whole = objects(target.path / "commits")
    with pytest.raises(LeaseLost, match="committed by another writer"):
        successor.commit()
    successor.__exit__()
    assert objects(target.path / "commits") == whole
    check_readable(target)


def test_promise_3_once_blocks_that_a_dead_writer_left_in_s3_are_taken_as_they_are(
    target: TargetSet, objects: Any
) -> None:
    write(target, features=OTHERS)
    target.commit_file(Tar()).unlink()
    blocks = {name: data for name, data in objects(target.path).items() if "commits" not in name}
    write(target)
    assert {name: data for name, data in objects(target.path).items() if "commits" not in name} == blocks
    check_readable(target)


def test_blocks_of_another_content_of_the_tar_are_refused_in_s3(target: TargetSet) -> None:
    write(target, Tar(hash="before"))
    target.commit_file(Tar()).unlink()
    changed = FEATURES + 1
    with pytest.raises(OlaError, match=r"left here uncommitted.*`python -m featurize repair` removes it"):
        write(target, features=changed)
    assert target.commit(Tar()) is None


def test_blocks_that_lack_an_image_are_refused_in_s3(target: TargetSet) -> None:
    write(target, images=5)
    target.commit_file(Tar()).unlink()
    with pytest.raises(OlaError, match=r"left here uncommitted"):
        write(target)
    assert target.commit(Tar()) is None


def test_missing_and_damaged_objects_are_named(target: TargetSet) -> None:
    write(target)
    row = target.commit(Tar()).to_pylist()[0]
    file = target.values_file(0)
    data = bytearray(file.read_bytes())
    data[row["values_offset"]] ^= 1
    file.put(bytes(data))
    with pytest.raises(OlaError, match=r"s3://.*: damaged: the target of sample 'k0'"):
        target.read(row, "k0")
    file.put(b"")
    with pytest.raises(OlaError, match="cut short"):
        target.read(row, "k0")
    file.unlink()
    with pytest.raises(OlaError, match="missing, though"):
        target.read(row, "k0")
