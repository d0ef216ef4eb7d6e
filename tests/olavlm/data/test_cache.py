"""The cache never takes more than it may, never gives torn bytes, and any number of processes may share it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olavlm.data.cache import Cache
from olavlm.errors import OlaError

ROOT = Path(__file__).resolve().parents[3]


def on_disk(folder: Path) -> int:
    """Bytes that the cached files take."""
    return sum(file.stat().st_blocks * 512 for file in folder.glob("??/*"))


def files(folder: Path) -> list[Path]:
    return list(folder.glob("??/*"))


class Source:
    """Counts what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def __call__(self, name: str) -> Callable[[], bytes]:
        def fetch() -> bytes:
            self.fetched.append(name)
            return name.encode() * 1000

        return fetch

    def read(self, cache: Cache, name: str) -> bytes:
        return cache.read(name, self(name), good=lambda data: True)


def test_a_range_is_fetched_once_also_by_another_process(tmp_path: Path) -> None:
    source = Source()
    for cache in (Cache(tmp_path, 1 << 20), Cache(tmp_path, 1 << 20)):
        for name in ("a", "b", "a"):
            assert source.read(cache, name) == name.encode() * 1000
    assert source.fetched == ["a", "b"]


@given(sizes=st.lists(st.integers(0, 20_000), max_size=20), limit=st.integers(0, 100_000))
def test_the_limit_holds_and_everything_is_read(
    sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder, limit)
    for _ in range(2):
        for i, size in enumerate(sizes):
            assert cache.read(str(i), lambda size=size: bytes(size), good=lambda data: True) == bytes(size)
            assert on_disk(folder) <= limit


def test_a_full_cache_goes_on_serving_what_it_has(tmp_path: Path) -> None:
    source, cache = Source(), Cache(tmp_path, 3 * 4096)
    for _ in range(3):
        for name in "abcdef":
            source.read(cache, name)
    assert source.fetched == [*"abcdef", *"def", *"def"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: bytes(len(data))])
def test_torn_files_are_fetched_again_and_mended(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    source, cache = Source(), Cache(tmp_path, 1 << 20)
    source.read(cache, "a")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert source.read(cache, "a") == b"a" * 1000
    assert file.read_bytes() == whole
    source.read(cache, "a")
    assert source.fetched == ["a", "a"]


def test_what_is_not_good_is_given_but_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1 << 20)
    assert cache.read("a", lambda: b"damaged", good=lambda data: False) == b"damaged"
    assert cache.read("a", lambda: b"mended", good=lambda data: True) == b"mended"
    assert cache.read("a", lambda: b"", good=lambda data: True) == b"mended"


def test_a_failed_fetch_keeps_nothing(tmp_path: Path) -> None:
    def fetch() -> bytes:
        raise OlaError("gone")

    with pytest.raises(OlaError, match="gone"):
        Cache(tmp_path, 1 << 20).read("a", fetch, good=lambda data: True)
    assert not files(tmp_path)


@pytest.mark.parametrize("lost", [b"", b"\0" * 20, None])
def test_a_lost_count_is_counted_anew(tmp_path: Path, lost: bytes | None) -> None:
    source, cache = Source(), Cache(tmp_path, 3 * 4096)
    source.read(cache, "a")
    source.read(cache, "b")
    (tmp_path / "used").unlink()
    if lost is not None:
        (tmp_path / "used").write_bytes(lost)
    for name in "cdef":
        source.read(Cache(tmp_path, 3 * 4096), name)
    assert len(files(tmp_path)) == 3


def test_a_disk_that_is_full_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    source, cache = Source(), Cache(tmp_path, 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert source.read(cache, "a") == b"a" * 1000
    assert not files(tmp_path)
    source.read(cache, "a")
    source.read(cache, "a")
    assert source.fetched == ["a", "a"]


def test_many_threads_and_processes_keep_the_limit_between_them(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from olavlm.data.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]), 40 * 4096)\n"
        "for i in range(100):\n"
        "    assert cache.read(str(i), lambda: str(i).encode() * 1000, lambda data: True) == str(i).encode() * 1000"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    others = [subprocess.Popen(command, env=environment) for _ in range(2)]
    source, cache = Source(), Cache(tmp_path, 40 * 4096)
    threads = [threading.Thread(target=lambda: [source.read(cache, f"{i}") for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    assert 0 < on_disk(tmp_path) <= 40 * 4096
    assert not list(tmp_path.glob("??/*.tmp"))


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OlaError, match=r"cache\.folder: .*/file cannot be used"):
        Cache(tmp_path / "file", 1)
