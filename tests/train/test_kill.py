"""Real processes. Promise 5: SIGKILL, and two ranks. Promise 6: a process that cannot import a teacher."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from olavlm import runs
from train.checkpoint import complete
from train.metrics import TIME_KEYS, read
from train.stage import run

#: Runs `python -m train …` in a process that kills itself where the test says.
DRIVER = """
import os, signal, sys
from train import checkpoint, stage
moment, sys.argv = sys.argv[1], ["train", *sys.argv[2:]]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if moment == "in step 4":
    original, calls = stage.accumulate, []
    def accumulate(*args):
        calls.append(1)
        result = original(*args)
        if len(calls) == 4:
            die()
        return result
    stage.accumulate = accumulate
elif moment == "in checkpoint 4":
    original = checkpoint._write
    def write(file, tensors):
        original(file, tensors)
        if "step-4" in str(file):
            die()
    checkpoint._write = write
from train.__main__ import main
main()
"""

#: Runs `python -m train …` and insists that the language model's trained parameters are slices, the others whole.
SHARDED = """
import sys
from torch.distributed.tensor import DTensor
from train import stage
sys.argv = ["train", *sys.argv[1:]]
original = stage._loop
def loop(settings, seed, model, parameters, *rest):
    sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
    of_model = {name for name in parameters if name.startswith(("model.language_model.", "lm_head."))}
    assert sharded == of_model != set(), sharded ^ of_model
    assert all(p.to_local().numel() < p.numel() for p in parameters.values() if isinstance(p, DTensor))
    return original(settings, seed, model, parameters, *rest)
stage._loop = loop
from train.__main__ import main
main()
"""

#: A finder that refuses whatever the lean side must not import.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = {"ray", "diffusers", "featurize", "pipelines"}
        teachers = {"depth_anything", "oneformer", "dinov2", "swin"}
        parts = name.split(".")
        if parts[0] in blocked or (parts[:2] == ["transformers", "models"] and set(parts[2:3]) & teachers):
            raise ImportError(f"the lean side imported {name}")
sys.meta_path.insert(0, Blocker())
sys.argv = ["train", *sys.argv[1:]]
from train.__main__ import main
main()
"""


def python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=400)


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in read(folder)]


@pytest.mark.parametrize("moment", ["in step 4", "in checkpoint 4"])
def test_promise_5_resumable_after_sigkill(world: Any, tmp_path: Path, moment: str) -> None:
    whole, broken = tmp_path / "whole" / "pretrain", tmp_path / "broken" / "pretrain"
    run(world.config(f"run_dir={tmp_path}/whole"), "pretrain")
    killed = python("-c", DRIVER, moment, "pretrain", str(world.file), f"run_dir={tmp_path}/broken")
    assert killed.returncode == -9, killed.stderr
    assert complete(broken / "checkpoints") == [2]
    run(world.config(f"run_dir={tmp_path}/broken"), "pretrain")
    same = ["model/model.safetensors", "checkpoints/step-6/optimizer.safetensors", "snapshot.json", "group_keys.npy"]
    for file in same:
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert timeless(broken) == timeless(whole)
    assert [line["step"] for line in read(broken)] == [1, 2, 3, 4, 5, 6]
    assert sorted(os.listdir(broken / "checkpoints")) == ["step-4", "step-6"]


def test_promise_5_resumable_on_two_ranks(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped on one process and resumed on two: the samples and losses of the run on one process.

    The last batch of an epoch is one micro-batch: the second rank has nothing, and enters every collective.
    """
    batches = ["stages.pretrain.global_batch=22", "stages.pretrain.micro_batch=2"]
    run(world.config(f"run_dir={tmp_path}/one", *batches), "pretrain")
    overrides = [f"run_dir={tmp_path}/two", *batches]
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(world.config(*overrides), "pretrain")
    monkeypatch.undo()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    resumed = python(*launcher, "-m", "train", "pretrain", str(world.file), *overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    one, two = timeless(tmp_path / "one" / "pretrain"), timeless(tmp_path / "two" / "pretrain")
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=2e-4)
    done = runs.finished(tmp_path / "two" / "pretrain")
    assert done is not None
    assert done["samples"] == 48


def test_promise_5_resumable_fully_sharded(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that share the language model out between them: samples, losses, weights of the run on one process.

    Begun on one process without sharding, gone on with on two. The pretraining's batches hold text-only samples and
    end with a rank that has nothing to do; the fine-tuning starts from what a sharded stage exported.
    """
    batches = ["stages.pretrain.global_batch=22", "stages.pretrain.micro_batch=2", "stages.finetune.micro_batch=3"]
    one, two = ([f"run_dir={tmp_path}/{name}", *batches] for name in ("one", "two"))
    run(world.config(*one), "pretrain")
    run(world.config(*one), "finetune")
    at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(world.config(*two), "pretrain")
    monkeypatch.undo()
    for stage in ("pretrain", "finetune"):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
        ranks = python(
            *launcher, sys.executable, "-c", SHARDED, stage, str(world.file), *two, f"stages.{stage}.fully_shard=true"
        )
        assert ranks.returncode == 0, ranks.stderr[-3000:]
        folders = [tmp_path / name / stage for name in ("one", "two")]
        for line, other in zip(*map(timeless, folders), strict=True):
            assert line == pytest.approx(other, rel=1e-3)
        whole, sharded = (load_file(folder / "model" / "model.safetensors") for folder in folders)
        assert whole.keys() == sharded.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(sharded[name], tensor, atol=2e-4, rtol=1e-3)


def test_promise_6_lean(world: Any, tmp_path: Path) -> None:
    trained = python("-c", BLOCKER, "pretrain", str(world.file), f"run_dir={tmp_path}", "stages.pretrain.max_steps=2")
    assert trained.returncode == 0, trained.stderr
    assert runs.finished(tmp_path / "pretrain") is not None
