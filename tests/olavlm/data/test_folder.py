"""A new folder is there in full or not at all."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from olavlm.data.folder import new_folder
from olavlm.errors import OlaError


def test_it_gets_its_name_when_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a" / "model"
    with new_folder(path) as folder:
        assert folder.parent == path.parent  # a rename, not a copy
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not path.exists()
    assert (path / "inner" / "file").read_text() == "content"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_one_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "file").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    message = "I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left") as caught, new_folder(tmp_path / "model"):
        raise SafetensorError(message)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "model"))
    with pytest.raises(SafetensorError), new_folder(tmp_path / "model"):
        raise SafetensorError("another")


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    for name in ("file", "folder"):
        path = tmp_path / name
        path.touch() if name == "file" else (path / "inner").mkdir(parents=True)
        with pytest.raises(OlaError, match=f"{name}: already there"), new_folder(path):
            pytest.fail("the block ran")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "file").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in (".model.12-ab.tmp", ".model2.12-ab.tmp"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model2.12-ab.tmp"}
