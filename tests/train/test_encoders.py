"""Baselines as configuration: a student that is fed features, one without embedding losses, any subset of tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from olavlm.errors import OlaError
from train import student
from train.distributed import World
from train.loader import Loader
from train.metrics import TIME_KEYS, read
from train.plan import plan
from train.probe import probe
from train.snapshot import Request, Snapshot
from train.stage import run
from train.step import Objective, accumulate

ALONE = World(0, 1, torch.device("cpu"))
FED = ("student.encoders=[depth,gen]", "student.tasks=[]", "stages.pretrain.losses={}")
SHORT = ("stages.pretrain.max_steps=2", "stages.finetune.max_steps=2")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_the_multi_encoder_baseline_is_fed_in_every_stage(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}", *FED, *SHORT)
    initial = student.create(config)[0].state_dict()
    run(config, "pretrain")
    run(config, "finetune")
    first, second = weights(tmp_path / "pretrain"), weights(tmp_path / "finetune")
    fed = {name for name in initial if name.startswith("encoder_projectors.")}
    assert len(fed) == 2 * 4
    for name in fed:
        assert not torch.equal(initial[name], first[name]), name
        assert not torch.equal(first[name], second[name]), name
    assert not any(name.startswith(("predictors", "task_tokens", "logit_scales")) for name in second)
    told = {"step", "loss", "text", "lr", "grad_norm", "samples", "samples_cut", "answers_cut"}
    assert read(tmp_path / "finetune")[-1].keys() - TIME_KEYS == told
    probe(config)
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["students"].keys() == {"initial", "pretrain"}


def test_promise_8_nothing_lost_in_silence_a_sample_that_cannot_be_fed_is_left_out(world: Any, tmp_path: Path) -> None:
    """Settled when the snapshot is pinned: s05 has no depth features, the text-only samples need none."""
    request = Request("finetune", ("all",), (), "squash", max_missing=0.1, encoders=("depth", "gen"))
    for _ in range(2):  # pinned, then opened again
        snapshot = Snapshot.open(tmp_path, world.config(*FED), request)
        keys = [snapshot.sample(i).key for i in range(sum(snapshot.sizes))]
        assert keys == [f"s{i:02}" for i in range(24) if i != 5]
        assert len(snapshot.group_keys) == len(keys)
    pinned = json.loads((tmp_path / "snapshot.json").read_text())
    assert (pinned["encoders"], pinned["left_out"]) == (["depth", "gen"], {"depth": 1})
    tars = pq.ParquetFile(tmp_path / "tars.parquet").read()
    assert not any(tars[task].null_count for task in ("depth", "gen"))
    (row,) = pq.ParquetFile(tmp_path / "left_out.parquet").read().to_pylist()
    assert (row["key"], row["task"], row["reason"]) == ("s05", "depth", "no features today")
    strict = Request("finetune", ("all",), (), "squash", max_missing=0.01, encoders=("depth",))
    with pytest.raises(OlaError, match=r"1 of \d+ images .* have no depth target"):
        Snapshot.open(tmp_path / "strict", world.config(*FED), strict)


def test_promise_8_nothing_lost_in_silence_without_a_store_there_is_nothing_to_feed(
    own_world: Any, tmp_path: Path
) -> None:
    for tar in own_world.corpus().tars:
        own_world.target_set("depth").commit_file(tar).unlink()
    request = Request("finetune", ("all",), (), "squash", max_missing=0.5, encoders=("depth",))
    with pytest.raises(OlaError, match=r"have no depth target.*its tar is not featurized"):
        Snapshot.open(tmp_path, own_world.config(*FED), request)


def test_promise_7_identity_data_of_one_stage_are_fed_by_one_teacher(
    own_world: Any, tmp_path: Path, commit: Callable[..., Any]
) -> None:
    """The same label, other weights: only the identity's hash tells."""
    here, there = own_world.folder / "targets", tmp_path / "targets"
    target = own_world.target_set("depth")
    there.mkdir()
    (there / "store.json").write_text((here / "store.json").read_text())
    content = json.loads((target.path / "target.json").read_text())
    content["identity"]["weights_hash"] = "1" * 32
    (there / "depth-other").mkdir()
    (there / "depth-other" / "target.json").write_text(json.dumps(content))
    other = f"data.more={{corpus: {own_world.folder}/corpus, targets: {there}}}"
    config = own_world.config(other, "stages.pretrain.data=[all,more]")
    request = Request("pretrain", ("all", "more"), ("depth",), "squash")
    message = rf"depth targets are not of one teacher: data.all.targets has {target.path.name}, .* has depth-other"
    with pytest.raises(OlaError, match=message):
        Snapshot.open(tmp_path / "run", config, request)


@pytest.mark.parametrize("micro", [1, 4])
def test_promise_5_resumable_micro_batches_agree_when_features_are_fed(world: Any, tmp_path: Path, micro: int) -> None:
    """With embedding losses beside: what is fed and what is learned come from one reading of the store."""
    config = world.config("student.encoders=[gen,depth]")
    request = Request("t", ("all",), ("depth",), "squash", max_missing=0.1, encoders=("gen", "depth"))
    snapshot = Snapshot.open(tmp_path / "run", config, request)
    loader = Loader(snapshot, student.create(config)[1], list(snapshot.tasks), 128, range(0), lambda s: [], 1)
    samples = [6, 3, 0, 10, 2, 12, 7, 1]  # two images and text only among them

    def gradients(cuts: list[list[int]]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        model, _ = student.create(config)
        parts = student.prepare(model, config.stages["pretrain"], ALONE.device)
        batches = [loader.read(np.array(cut, np.int64)) for cut in cuts]
        terms, _ = accumulate(model, batches, Objective({"depth": 0.5}), ALONE)
        ALONE.sum_gradients([p for pairs in parts.values() for _, p in pairs])
        return {n: float(t) for n, t in terms.items()}, {n: p.grad for of in parts.values() for n, p in of}  # type: ignore

    whole, cut = gradients([samples]), gradients([samples[i : i + micro] for i in range(0, len(samples), micro)])
    assert whole[0] == pytest.approx(cut[0], rel=2e-5, abs=2e-5)
    assert whole[1]["encoder_projectors.depth.0.weight"].any()
    for name, grad in whole[1].items():
        torch.testing.assert_close(grad, cut[1][name], rtol=2e-5, atol=2e-5)


def test_two_ranks_feed_as_one(world: Any, processes: Callable[..., Any], tmp_path: Path) -> None:
    """Sharded, in a global batch whose last micro-batches are text only or missing."""
    settings = [*FED, "stages.pretrain.max_steps=2", "stages.pretrain.global_batch=22", "stages.pretrain.micro_batch=2"]
    run(world.config(f"run_dir={tmp_path}/one", *settings), "pretrain")
    overrides = [f"run_dir={tmp_path}/two", *settings, "stages.pretrain.fully_shard=true"]
    ended = processes("pretrain", world.file, *overrides, ranks=2)
    assert ended.codes == [0, 0], ended.output
    one, two = (weights(tmp_path / name / "pretrain") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


#: Overrides, and the terms of the loss that are left.
BASELINES = {
    "no embedding losses": (["stages.pretrain.losses={}"], set()),
    "neither losses nor tasks": (["stages.pretrain.losses={}", "student.tasks=[]"], set()),
    "one task": (["student.tasks=[depth]", "stages.pretrain.losses={depth: 1}"], {"depth/1", "depth/2"}),
    "a task without a loss": (["stages.pretrain.losses={gen: 0.5}"], {"gen/2"}),
    "another order": (["student.tasks=[depth,gen]"], {"depth/1", "depth/2", "gen/2"}),
    "other layers": (["student.layers={depth: [2], gen: [1, 2]}"], {"depth/2", "gen/1", "gen/2"}),
    "no task tokens": (["student.task_tokens=0"], {"depth/1", "depth/2", "gen/2"}),
    "other task tokens": (["student.task_tokens=4"], {"depth/1", "depth/2", "gen/2"}),
    "fed and distilled": (["student.encoders=[gen]"], {"depth/1", "depth/2", "gen/2"}),
    "fed one, distilled the other": (
        ["student.encoders=[gen]", "student.tasks=[depth]", "stages.pretrain.losses={depth: 1}"],
        {"depth/1", "depth/2"},
    ),
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_is_configuration(world: Any, tmp_path: Path, baseline: str) -> None:
    overrides, expected = BASELINES[baseline]
    config = world.config(f"run_dir={tmp_path}", *overrides, *SHORT)
    run(config, "pretrain")
    run(config, "finetune")
    terms = read(tmp_path / "pretrain")[-1]
    assert {name.rpartition("/")[0] for name in terms if "/" in name} == expected
    assert all(np.isfinite(value) for value in terms.values())
    assert not any("/" in name for name in read(tmp_path / "finetune")[-1])


def test_a_stage_goes_on_with_a_student_that_is_fed_the_same(world: Any, tmp_path: Path) -> None:
    run(world.config(f"run_dir={tmp_path}/a", *FED, *SHORT), "pretrain")
    init = f"stages.pretrain.init={tmp_path}/a/pretrain/model"
    for encoders in ("[gen]", "[gen,depth]", "[]"):
        other = world.config(f"run_dir={tmp_path}/b", *FED, *SHORT, f"student.encoders={encoders}", init)
        with pytest.raises(OlaError, match=r"student.encoders: .*; the student in .* is fed .*depth.*gen"):
            run(other, "pretrain")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.encoders=[depht]"], "student.encoders: 'depht' is not defined here; known: depth, gen"),
        (["student.encoders=[depth,depth]"], "student.encoders: depth, depth names a teacher twice"),
        (["student.encoders=[depth]", "data.all.targets=null", "stages.pretrain.losses={}"],
         r"data.all.targets: stages.pretrain.data is fed to student.encoders \(depth\) and needs a store"),
        (["student.encoders=[depth]", "eval={cv_bench: x}"], "eval.data: missing; the student is fed features"),
        (["eval={cv_bench: x, data: some}"], "eval.data: 'some' is not defined here; known: all"),
        (["student.tasks=[gen]"], "stages.pretrain.losses: 'depth' is not defined here; known: gen"),
    ],
)  # fmt: skip
def test_what_cannot_be_fed_is_refused_by_name(world: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        world.config(*overrides)


def test_a_dry_run_counts_what_is_fed(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """(6·32 + 32) + (32·32 + 32) of depth and (5·32 + 32) + (32·32 + 32) of gen, beside 1,600 of the image's."""
    plan(world.config(f"run_dir={tmp_path}", *FED), "finetune")
    text = capsys.readouterr().out
    for expected in ("4,128 trained", "targets per image", "depth", "gen"):
        assert expected in text
