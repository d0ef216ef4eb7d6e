"""The manifest is quick and never the truth against a commit."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olavlm.data import manifest
from olavlm.data.commit import TarWriter, commit_bytes
from olavlm.data.corpus import content_hash
from olavlm.data.manifest import compact, manifest_file, summaries
from olavlm.data.targets import Identity, TargetSet, TargetStore
from olavlm.errors import OlaError

IDENTITY = Identity(
    task="gen",
    teacher="unclip",
    weights="org/gen",
    revision=None,
    weights_hash="00ff",
    compute_dtype="float32",
    view="squash",
    input_size=64,
    preprocessing="bicubic",
    position_embedding="none",
    layers=None,
    pooling="projection",
    grid=1,
    width=6,
    codec="fp16",
)


@dataclass(frozen=True)
class Tar:
    name: str
    hash: str = "hash"


TARS = [Tar("b"), Tar("a"), Tar("c"), Tar("d")]


@pytest.fixture
def target(tmp_path: Path) -> TargetSet:
    """Commits of b (2 ok), a (1 ok, 1 failed) and d, which is of another content; c has none."""
    target = TargetStore.create(tmp_path / "targets", "corpus-1").add(IDENTITY, 4)
    _commit(target, TARS[0], 2, 0)
    _commit(target, TARS[1], 1, 1)
    _commit(target, Tar("d", "other"), 3, 0)
    return target


def _commit(target: TargetSet, tar: Tar, ok: int, failed: int) -> None:
    writer = TarWriter.open(target, tar, range(1))
    assert writer is not None
    with writer:
        writer.no_image("text")
        for i in range(ok):
            writer.add(f"k{i}", 0, "h", np.zeros((1, 6), np.float16), None, 0.0, 0.0)
        for i in range(failed):
            writer.fail(f"f{i}", 0, "h", "broken")
        writer.commit()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the commits that get opened."""
    names: list[str] = []
    real = manifest._open
    monkeypatch.setattr(manifest, "_open", lambda target, name: (names.append(name), real(target, name))[1])
    return names


def _rows(target: TargetSet) -> list[dict[str, Any]]:
    return summaries(target, TARS).to_pylist()


def _hash(target: TargetSet, tar: Tar) -> str:
    return content_hash(target.commit_file(tar).read_bytes())


def test_summaries_say_what_the_commits_say(target: TargetSet) -> None:
    nothing = {"content": None, "ok": 0, "failed": 0, "bytes": 0}
    assert _rows(target) == [
        {"content": _hash(target, TARS[0]), "ok": 2, "failed": 0, "bytes": 24},
        {"content": _hash(target, TARS[1]), "ok": 1, "failed": 1, "bytes": 12},
        nothing,
        nothing,
    ]
    assert summaries(target, []).num_rows == 0


def test_a_compacted_set_is_seen_through_without_opening_commits(target: TargetSet, opened: list[str]) -> None:
    before = _rows(target)
    assert compact(target) == 3
    opened.clear()
    assert _rows(target) == before
    assert compact(target) == 3
    assert opened == []


def test_a_manifest_is_never_the_truth_against_a_commit(target: TargetSet, opened: list[str]) -> None:
    compact(target)
    opened.clear()
    _commit(target, TARS[2], 3, 1)  # newer than the manifest
    target.commit_file(TARS[0]).unlink()  # withdrawn
    rows = target.commit(TARS[1]).to_pylist()
    rows[2] |= {"reason": "broken in another way"}
    file = target.commit_file(TARS[1])
    stamp = file.stat()
    file.unlink()
    file.write_bytes(commit_bytes(target, TARS[1], rows))  # replaced
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert [row["ok"] for row in _rows(target)] == [0, 1, 3, 0]
    assert _rows(target)[1]["content"] == _hash(target, TARS[1])
    assert sorted(opened) == ["a", "a", "c", "c"]
    assert compact(target) == 3
    opened.clear()
    assert [row["ok"] for row in _rows(target)] == [0, 1, 3, 0]
    assert opened == []


@pytest.mark.parametrize("content", [b"", b"PAR1 but damaged PAR1"])
def test_a_damaged_manifest_costs_only_time(target: TargetSet, opened: list[str], content: bytes) -> None:
    before = _rows(target)
    compact(target)
    manifest_file(target).write_bytes(content)
    opened.clear()
    assert _rows(target) == before
    assert sorted(opened) == ["a", "b", "d"]


def test_a_damaged_commit_is_named(target: TargetSet) -> None:
    target.commit_file(TARS[0]).write_bytes(b"PAR1")
    with pytest.raises(OlaError, match=r"b\.parquet: cannot be read .*`python -m featurize repair`"):
        summaries(target, TARS)
