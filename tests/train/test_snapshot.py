"""What a run may train on: promises 1 (key-checked), 7 (identity), 8 (nothing lost in silence)."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from olavlm.config import PipelineConfig
from olavlm.data import codec
from olavlm.data.amend import TarAmender
from olavlm.data.corpus import content_hash
from olavlm.errors import OlaError
from train.snapshot import Request, Snapshot

DEPTH = Request("pretrain", ("all",), ("depth",), "squash", max_missing=0.1)
TEXT = Request("finetune", ("all",), (), "squash")


def rewrite(file: Path, change: Callable[[list[dict[str, Any]]], None], schema: Any = None) -> None:
    """Change the rows of a Parquet file, keeping its columns and metadata."""
    table = pq.ParquetFile(file).read()
    rows = table.to_pylist()
    change(rows)
    pq.write_table(type(table).from_pylist(rows, table.schema), file)


def test_samples_are_numbered_through_and_joined(world: Any, tmp_path: Path) -> None:
    snapshot = Snapshot.open(tmp_path, world.config(), DEPTH)
    assert snapshot.sizes == (24,)
    samples = [snapshot.sample(i) for i in range(24)]
    assert [s.key for s in samples] == [f"s{i:02}" for i in range(24)]
    assert [len(s.images) for s in samples] == [0 if i % 8 == 3 else 2 if i % 7 == 6 else 1 for i in range(24)]
    corpus = world.corpus()
    for sample in samples:
        for image in sample.images:
            assert content_hash(corpus.read(sample.tar, image.offset, image.bytes)) == image.hash
            row = image.targets["depth"]
            assert (row is None) == (sample.key == "s05")
            assert row is None or (row["key"], row["image_hash"]) == (sample.key, image.hash)
    lengths = snapshot.group_keys & 0xFFFFFFFF
    assert list(snapshot.group_keys >> 32) == [len(s.images) for s in samples]
    assert len(np.unique(lengths)) > 3


def test_promise_8_nothing_lost_in_silence_what_is_missing_is_counted_and_named(world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, world.config(), DEPTH)
    saved = json.loads((tmp_path / "snapshot.json").read_text())
    assert saved["left_out"] == {"depth": 1}
    (row,) = pq.ParquetFile(tmp_path / "left_out.parquet").read().to_pylist()
    assert (row["key"], row["task"], row["reason"]) == ("s05", "depth", "no features today")


def test_promise_8_nothing_lost_in_silence_too_many_gaps_are_refused(own_world: Any, tmp_path: Path) -> None:
    target = own_world.target_set("depth")
    target.commit_file(own_world.corpus().tars[1]).unlink()
    with pytest.raises(OlaError, match=r"10 of 24 .*41\.67%.* depth target.*10\.00%.*not featurized.*featurize run"):
        Snapshot.open(tmp_path / "run", own_world.config(), DEPTH)
    assert not (tmp_path / "run" / "snapshot.json").exists()


def test_promise_8_nothing_lost_in_silence_samples_with_an_unusable_image_are_left_out(
    own_world: Any, tmp_path: Path
) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[1] |= {"error": "truncated", "width": 0, "height": 0}

    corpus = own_world.corpus()
    rewrite(own_world.folder / "corpus" / "index" / f"{corpus.tars[0].name}.parquet", spoil)
    snapshot = Snapshot.open(tmp_path, own_world.config(), DEPTH)
    assert snapshot.sizes == (23,)
    assert "s01" not in [snapshot.sample(i).key for i in range(23)]
    reasons = {row["key"]: row["reason"] for row in pq.ParquetFile(tmp_path / "left_out.parquet").read().to_pylist()}
    assert reasons == {"s01": "truncated", "s05": "no features today"}


@pytest.mark.parametrize("column", ["key", "image_hash", "image_index"])
def test_promise_1_key_checked_swapped_targets_are_refused(own_world: Any, tmp_path: Path, column: str) -> None:
    def swap(rows: list[dict[str, Any]]) -> None:
        rows[0][column], rows[6][column] = rows[6][column], rows[0][column]
        if column == "image_index":
            rows[0][column] = 1

    target = own_world.target_set("depth")
    rewrite(target.commit_file(own_world.corpus().tars[0]), swap)
    with pytest.raises(OlaError, match=rf"{column} of sample s00.* in the corpus and .* in the commit"):
        Snapshot.open(tmp_path / "run", own_world.config(), DEPTH)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teachers.depth.weights=others", "weights"),
        ("teachers.depth.teacher=other", "teacher"),
        ("teachers.depth.width=8", "width"),
        ("teachers.depth.grid=4", "grid"),
        ("teachers.depth.input_size=48", "input_size"),
        ("teachers.depth.view=pad", "view"),
        ("teachers.depth.codec=fp16", "codec"),
    ],
)
def test_promise_7_identity_other_targets_are_refused(world: Any, tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(OlaError, match=rf"{named}: .* here, .* wanted"):
        Snapshot.open(tmp_path, world.config(override), DEPTH)


def test_promise_7_identity_another_view_is_refused_unless_allowed(world: Any, tmp_path: Path) -> None:
    config: PipelineConfig = world.config()
    padded = Request("pretrain", ("all",), ("depth",), "pad", max_missing=0.1)
    with pytest.raises(OlaError, match=r"'squash'.*'pad'.*allow_view_mismatch"):
        Snapshot.open(tmp_path, config, padded)
    allowed = Request("pretrain", ("all",), ("depth",), "pad", allow_view_mismatch=True, max_missing=0.1)
    assert Snapshot.open(tmp_path, config, allowed).sizes == (24,)


def test_promise_7_identity_targets_of_another_corpus_are_refused(own_world: Any, tmp_path: Path) -> None:
    file = own_world.folder / "corpus" / "corpus.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(header | {"id": "f" * 32}))
    with pytest.raises(OlaError, match=rf"{header['id']}.*{'f' * 32}"):
        Snapshot.open(tmp_path, own_world.config(), DEPTH)


def test_a_changed_commit_is_refused_by_name_on_resume(own_world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, own_world.config(), DEPTH)
    file = own_world.target_set("depth").commit_file(own_world.corpus().tars[2])
    pq.write_table(pq.read_table(file), file, compression="none")
    with pytest.raises(OlaError, match=rf"{file.name}.*changed since the run was pinned"):
        Snapshot.open(tmp_path, own_world.config(), DEPTH)


def test_a_run_goes_on_with_its_pinned_targets_when_failed_images_get_theirs(own_world: Any, tmp_path: Path) -> None:
    before = Snapshot.open(tmp_path, own_world.config(), DEPTH)
    target = own_world.target_set("depth")
    pinned = [before.sample(i) for i in range(sum(before.sizes))]
    (failed,) = [s for s in pinned if any(image.targets["depth"] is None for image in s.images)]
    tar = own_world.corpus().tar(failed.tar.name)
    amender = TarAmender.open(target, tar, range(0))
    assert amender is not None
    with amender:
        (image,) = failed.images
        shape = (1, target.identity.tokens, target.identity.width)
        values, scales = codec.encode(np.ones(shape, np.float32), target.identity.codec)
        amender.add(failed.key, image.index, image.hash, values[0], None if scales is None else scales[0], 1.0, 1.0)
        amender.commit()
    after = Snapshot.open(tmp_path, own_world.config(), DEPTH)
    assert [after.sample(i) for i in range(len(pinned))] == pinned
    for sample in pinned:
        for image in sample.images:
            if image.targets["depth"]:
                target.read(image.targets["depth"], sample.key)
    anew = Snapshot.open(tmp_path / "anew", own_world.config(), DEPTH)
    samples = [anew.sample(i) for i in range(sum(anew.sizes))]
    assert all(image.targets["depth"] for sample in samples for image in sample.images)

    for kept in (target.path / "superseded" / tar.name).iterdir():
        kept.unlink()
    with pytest.raises(OlaError, match="changed since the run was pinned"):
        Snapshot.open(tmp_path, own_world.config(), DEPTH)


def test_a_changed_tar_is_refused_by_name_on_resume(own_world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, own_world.config(), TEXT)
    (name, *_), digest = [tar.name for tar in own_world.corpus().tars], "e" * 32
    rewrite(own_world.folder / "corpus" / "tars.parquet", lambda rows: rows[0].update(hash=digest))
    with pytest.raises(OlaError, match=rf"pinned tar {name} .*{digest}"):
        Snapshot.open(tmp_path, own_world.config(), TEXT)


def test_a_grown_corpus_does_not_change_a_pinned_run(own_world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, own_world.config(), TEXT)

    def grow(rows: list[dict[str, Any]]) -> None:
        rows.append(rows[0] | {"name": "later", "path": "tars/later.tar"})

    rewrite(own_world.folder / "corpus" / "tars.parquet", grow)
    assert Snapshot.open(tmp_path, own_world.config(), TEXT).sizes == (24,)


def test_without_tasks_no_store_is_opened(own_world: Any, tmp_path: Path) -> None:
    (own_world.folder / "targets" / "store.json").unlink()
    assert Snapshot.open(tmp_path, own_world.config(), TEXT).sample(0).images[0].targets == {}


def test_promise_5_resumable_opening_a_pinned_snapshot_opens_no_index_no_commit_and_no_tar(
    own_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read, and compared with what was pinned, when a sample of a tar is first asked for."""
    Snapshot.open(tmp_path, own_world.config(), DEPTH)
    opened: list[Path] = []
    read_bytes = Path.read_bytes

    def noted(path: Path) -> bytes:
        opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    snapshot = Snapshot.open(tmp_path, own_world.config(), DEPTH)
    assert {path.name for path in opened} == {"tars.parquet"}  # the corpus's and the run's
    opened.clear()
    snapshot.sample(11)
    assert sorted(path.parent.name for path in opened) == ["commits", "index"]
    assert {path.stem for path in opened} == {own_world.corpus().tars[1].name}


def test_a_store_that_was_copied_is_what_was_pinned(own_world: Any, tmp_path: Path) -> None:
    """Its files have other times: they are opened, and found to say the same."""
    Snapshot.open(tmp_path, own_world.config(), DEPTH)
    for file in own_world.target_set("depth").path.glob("commits/*"):
        os.utime(file, (0, 0))
    assert Snapshot.open(tmp_path, own_world.config(), DEPTH).sizes == (24,)


def test_a_commit_changed_behind_the_files_time_is_refused_when_it_is_used(own_world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, own_world.config(), DEPTH)
    file = own_world.target_set("depth").commit_file(own_world.corpus().tars[0])
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    snapshot = Snapshot.open(tmp_path, own_world.config(), DEPTH)
    with pytest.raises(OlaError, match="changed since the run was pinned"):
        snapshot.sample(0)


def test_a_commit_that_is_gone_is_refused_on_resume(own_world: Any, tmp_path: Path) -> None:
    Snapshot.open(tmp_path, own_world.config(), DEPTH)
    own_world.target_set("depth").commit_file(own_world.corpus().tars[1]).unlink()
    with pytest.raises(OlaError, match="now gone"):
        Snapshot.open(tmp_path, own_world.config(), DEPTH)
