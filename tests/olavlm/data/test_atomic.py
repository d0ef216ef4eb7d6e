import errno
import os
from pathlib import Path

import pytest

from olavlm.data import atomic


def test_publish_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "name"
    atomic.publish(file, b"first")
    with pytest.raises(FileExistsError):
        atomic.publish(file, b"second")
    assert file.read_bytes() == b"first"
    assert os.listdir(file.parent) == ["name"]


def test_replace_sets_the_content(tmp_path: Path) -> None:
    file = tmp_path / "name"
    for content in (b"first", b"second"):
        atomic.replace(file, content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("write", [atomic.publish, atomic.replace])
def test_the_check_stops_a_file_from_appearing(tmp_path: Path, write) -> None:
    def refuse() -> None:
        assert [name.startswith(".name.") for name in os.listdir(tmp_path)] == [True]  # laid down before the check
        raise RuntimeError("fenced")

    with pytest.raises(RuntimeError, match="fenced"):
        write(tmp_path / "name", b"data", refuse)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [atomic.publish, atomic.replace])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "name", b"data")
    assert caught.value.filename == str(tmp_path / "name")
    assert os.listdir(tmp_path) == []


def test_sweep_removes_leftovers_of_that_name_only(tmp_path: Path) -> None:
    for name in (".a[1].12-ab.tmp", ".a1.12-ab.tmp", ".b.12-ab.tmp", "a[1]"):
        (tmp_path / name).touch()
    atomic.sweep(tmp_path / "a[1]")
    assert sorted(os.listdir(tmp_path)) == [".a1.12-ab.tmp", ".b.12-ab.tmp", "a[1]"]


def test_a_writer_whose_temporary_file_was_swept_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.publish(tmp_path / "name", b"zombie", lambda: atomic.sweep(tmp_path / "name"))
    assert os.listdir(tmp_path) == []


def test_ensure_keeps_what_is_there_and_sweeps(tmp_path: Path) -> None:
    (tmp_path / ".name.12-ab.tmp").touch()
    atomic.ensure(tmp_path / "name", b"first")
    atomic.ensure(tmp_path / "name", b"second")
    assert (tmp_path / "name").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["name"]
