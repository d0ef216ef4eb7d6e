"""The commands around the store: plan, status, verify, inspect."""

import errno
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from featurize import teachers
from featurize.inspect import SIDE, pictures
from featurize.lifecycle import withdraw_damaged
from featurize.plan import plan
from featurize.stage import open_jobs, run_pipeline
from featurize.teachers.unclip import UnClip
from featurize.verify import verify
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.codec import encoded_bytes
from olavlm.data.targets import TargetSet
from olavlm.errors import OlaError

# ---- plan


def test_the_published_setting_is_planned_without_weights_or_corpus() -> None:
    made = plan(load_pipeline("llava558k-llama3-8b"))
    assert made.images == {"pretrain": 558_128}
    sizes = {teacher.task: teacher.bytes_per_image for teacher in made.teachers}
    assert sizes == {"gen": 2048, "depth": 576 * 1024 + 576 * 4, "seg": 576 * 1536 + 576 * 4}
    assert sum(teacher.total_bytes for teacher in made.teachers) == pytest.approx(827e9, rel=0.01)
    assert made.hours_once is not None
    assert made.hours_online == pytest.approx(made.hours_once * made.runs * made.passes)


def test_bytes_per_image_are_what_the_store_holds(world: Any, unbroken: Path) -> None:
    config = world.config(unbroken)
    (job,) = open_jobs(config)
    for task, teacher in config.teachers.items():
        row = next(r for r in job.sets[task].commit(job.corpus.tars[0]).to_pylist() if r["status"] == "ok")
        assert row["values_bytes"] + row["scales_bytes"] == encoded_bytes(teacher.tokens, teacher.width, teacher.codec)


def test_a_plan_needs_a_count(world: Any, tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"no corpus in .*nowhere yet; state data\.all\.expected_images to plan"):
        plan(world.config(tmp_path, "data.all.corpus=nowhere"))
    assert plan(world.config(tmp_path, "data.all.corpus=nowhere", "data.all.expected_images=5")).images == {"all": 5}
    assert plan(world.config(tmp_path)).images == {"all": 12}


# ---- verify


def test_a_finished_store_verifies_and_recomputes(world: Any, unbroken: Path) -> None:
    assert list(verify(world.config(unbroken), recompute=4)) == []


def test_int4_targets_take_what_was_planned_and_recompute(world: Any, tmp_path: Path) -> None:
    config = world.config(tmp_path, "teachers.seg.codec=int4")
    run_pipeline(config)
    (job,) = open_jobs(config)
    row = next(r for r in job.sets["seg"].commit(job.corpus.tars[0]).to_pylist() if r["status"] == "ok")
    assert row["values_bytes"] + row["scales_bytes"] == 36 * (64 // 2 + 2 * 64 // 32) == encoded_bytes(36, 64, "int4")
    assert list(verify(config, recompute=4)) == []


def test_verify_names_a_damaged_target(world: Any, own: Path) -> None:
    (job,) = open_jobs(world.config(own))
    target, tar = job.sets["seg"], job.corpus.tars[1]
    row = [r for r in target.commit(tar).to_pylist() if r["status"] == "ok"][2]
    file = target.values_file(row["block"])
    content = bytearray(file.read_bytes())
    content[row["values_offset"] + 5] ^= 4
    file.write_bytes(content)
    (line,) = map(str, verify(world.config(own)))
    assert f"all, seg, tar {tar.name}: " in line
    assert f"damaged: the target of sample '{row['key']}'" in line


def test_what_cannot_be_read_now_is_not_taken_for_damage(
    world: Any, own: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (job,) = open_jobs(world.config(own))
    commits = {task: [target.commit(tar) for tar in job.corpus.tars] for task, target in job.sets.items()}
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OlaError, match=r"depth-.*: the target of sample 't0s0' cannot be read \(Input/output error\)"):
        list(verify(world.config(own)))
    assert command("repair", own) == 2
    assert {task: [target.commit(tar) for tar in job.corpus.tars] for task, target in job.sets.items()} == commits


def test_verify_names_a_tar_without_a_commit(world: Any, own: Path) -> None:
    (job,) = open_jobs(world.config(own))
    tar = job.corpus.tars[0]
    job.sets["gen"].commit_file(tar).unlink()
    assert [str(finding) for finding in verify(world.config(own))] == [
        f"all, gen, tar {tar.name}: not committed, {tar.images} images without a target"
    ]


def test_verify_names_a_commit_of_other_images(world: Any, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = open_jobs(world.config(own))
    index = type(job.corpus).index
    monkeypatch.setattr(type(job.corpus), "index", lambda self, tar: index(self, tar).slice(1))
    lines = [str(finding) for finding in verify(world.config(own))]
    assert len(lines) == 6
    assert all("does not list the images of the corpus index" in line for line in lines)


def test_verify_recomputes_what_was_tampered_with_consistently(world: Any, own: Path) -> None:
    """Values and checksum agree, but they are not what the teacher computes: only --recompute can tell."""
    import pyarrow.parquet as pq

    from olavlm.data.targets import checksum

    (job,) = open_jobs(world.config(own))
    target = job.sets["depth"]
    for tar in job.corpus.tars:
        commit = target.commit(tar)
        rows = commit.to_pylist()
        for row in rows:
            if row["status"] != "ok":
                continue
            file = target.values_file(row["block"])
            content = bytearray(file.read_bytes())
            span = slice(row["values_offset"], row["values_offset"] + row["values_bytes"])
            content[span] = bytes(reversed(content[span]))
            file.write_bytes(content)
            scales = target.scales_file(row["block"]).read_bytes()
            scales = scales[row["scales_offset"] : row["scales_offset"] + row["scales_bytes"]]
            row["checksum"] = checksum(row["key"], scales, bytes(content[span]))
        table = pa.Table.from_pylist(rows, commit.schema)
        pq.write_table(table, target.commit_file(tar))
    assert list(verify(world.config(own))) == []
    lines = [str(finding) for finding in verify(world.config(own), recompute=3)]
    assert len(lines) == 3
    assert all("all, depth, tar" in line and "quantization steps off" in line for line in lines)
    assert all(mended for _, mended in withdraw_damaged(world.config(own), recompute=10))
    assert [target.commit(tar) for tar in job.corpus.tars] == [None, None]


def _gen_alone(config: PipelineConfig) -> PipelineConfig:
    return config.model_copy(update={"teachers": {"gen": config.teachers["gen"]}})


def _distort(run: Path, world: Any, change: Callable[[torch.Tensor], torch.Tensor], *overrides: str) -> PipelineConfig:
    """A store whose features were changed before they were quantized; its configuration."""
    encode = UnClip.encode
    config = _gen_alone(world.config(run, *overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnClip, "encode", lambda self, pixels: change(encode(self, pixels)))
        run_pipeline(config)
    return config


def _as_on_other_hardware(features: torch.Tensor) -> torch.Tensor:
    """Up to 5 units in bfloat16's last place of each token's largest value."""
    noise = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return features + 5 * 2**-7 * noise * features.abs().amax(-1, keepdim=True)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_recomputing_allows_for_other_hardware_as_far_as_the_dtype_does(world: Any, tmp_path: Path, codec: str) -> None:
    for dtype, wrong in (("bfloat16", 0), ("float32", 10)):
        stated = f"teachers.gen.dtype={dtype}", f"teachers.gen.codec={codec}"
        config = _distort(tmp_path / dtype, world, _as_on_other_hardware, *stated)
        found = list(verify(config, recompute=10))
        assert len(found) == wrong
        assert all("quantization steps off, 1.0 are tolerated" in finding.what for finding in found)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_recomputing_in_low_precision_finds_another_images_target(world: Any, tmp_path: Path, codec: str) -> None:
    stated = "teachers.gen.dtype=bfloat16", f"teachers.gen.codec={codec}"
    config = _distort(tmp_path, world, lambda features: features.roll(1, 0), *stated)
    assert len(list(verify(config, recompute=10))) == 10


def test_recomputing_is_done_where_featurizing_is(world: Any, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, devices = teachers.load, []

    def record(stated: Any, device: str) -> Any:
        devices.append(device)
        return load(stated)

    monkeypatch.setattr(teachers, "load", record)
    for there, gpus in ((True, 0.5), (False, 0.5), (True, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        config = _gen_alone(world.config(unbroken, f"featurize.gpus_per_worker={gpus}"))
        assert list(verify(config, recompute=1)) == []
    assert devices == ["cuda", "cpu", "cpu"]


def test_recomputing_a_few_images_does_not_hold_the_whole_store(
    world: Any, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = TargetSet.commit
    monkeypatch.setattr(TargetSet, "commit", lambda self, tar: pa.concat_tables([commit(self, tar)] * 300))
    monkeypatch.setattr("featurize.verify.verify_tar", lambda job, task, tar: ())
    load, held = teachers.load, []
    config = _gen_alone(world.config(unbroken))

    def measure(stated: Any, device: str) -> Any:
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return load(stated)

    monkeypatch.setattr(teachers, "load", measure)
    tracemalloc.start()
    assert list(verify(config, recompute=3)) == []
    assert held[0] < 500_000  # 3000 rows take 3 MB


# ---- inspect


def test_pictures_show_every_task(world: Any, unbroken: Path) -> None:
    shown = pictures(world.config(unbroken), "all", 4)
    assert len(shown) == 4
    for picture in shown:
        assert set(picture) == {"key", "image", "depth", "depth features", "seg", "seg features", "gen nearest"}
        for name, pixels in picture.items():
            if name != "key":
                assert pixels.shape == (SIDE, SIDE, 3)
                assert pixels.dtype == np.uint8
        assert not np.array_equal(picture["image"], picture["gen nearest"])


def test_pictures_of_what_is_not_there_are_refused(world: Any, unbroken: Path, own: Path) -> None:
    with pytest.raises(OlaError, match=r"data\.other is not there or has no targets"):
        pictures(world.config(unbroken), "other")
    (job,) = open_jobs(world.config(own))
    for tar in job.corpus.tars:
        job.sets["seg"].commit_file(tar).unlink()
    with pytest.raises(OlaError, match=r"no image has all targets \(depth, seg, gen\) yet"):
        pictures(world.config(own), "all")


# ---- the command line


def test_commands_succeed_and_say_what_they_found(command: Any, tmp_path: Path, capsys: Any) -> None:
    assert command("plan", tmp_path) == 0
    assert "12 images" in capsys.readouterr().out
    assert command("run", tmp_path) == 0
    assert "12 images, 2 of them without some target" in capsys.readouterr().out
    assert command("status", tmp_path, "--failed") == 0
    out = capsys.readouterr().out
    assert "2/2" in out
    assert "all gen tar 0 sample t0s2 image 0: cannot be decoded" in out
    assert command("verify", tmp_path) == 0
    assert "every target is there and undamaged" in capsys.readouterr().out
    assert command("inspect", tmp_path, "--images", "2") == 0
    with Image.open(tmp_path / "featurize" / "inspect.png") as sheet:
        assert sheet.height == 16 + 2 * (SIDE + 4) - 4


def test_commands_fail_with_one_line_and_a_status(command: Any, own: Path, tmp_path: Path, capsys: Any) -> None:
    next((own / "targets").glob("depth-*/commits/*")).unlink()
    assert command("verify", own) == 1
    assert "1 things are wrong" in capsys.readouterr().out
    assert command("status", tmp_path / "nothing") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert command("run", tmp_path / "x", "teachers.gen.weights=no/such/folder") == 2
    assert "weights of teacher unclip: no folder" in capsys.readouterr().err
