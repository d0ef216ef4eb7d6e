"""Real processes. Promises 4 and 5: any number of ranks, stopped anywhere. Promise 6: one without any teacher."""

import errno
import json
import os
import random
import shutil
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

SIGNALS = {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGKILL: -9}  # and the exit code after each
#: 24 samples, so that the last batch of an epoch is one micro-batch; text-only samples among them.
UNEVEN = ("stages.pretrain.global_batch=22", "stages.pretrain.micro_batch=2")
#: Batches of like length: the first kind holds nothing but text.
TEXT_ONLY = (
    "stages.pretrain.global_batch=3",
    "stages.pretrain.micro_batch=1",
    "stages.pretrain.group_by_length=true",
    "stages.pretrain.epochs=1",
)


def python(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=400)


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in read(folder)]


def assert_as_unbroken(broken: Path, whole: Path) -> None:
    """Weights, optimizer and counts of the last checkpoint, the exported model and the metrics, bit for bit."""
    last = f"checkpoints/step-{complete(whole / 'checkpoints')[-1]}"
    states = [f"{last}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "counts.json")]
    for file in ("model/model.safetensors", *states, "snapshot.json", "group_keys.npy"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert timeless(broken) == timeless(whole)
    assert sorted(os.listdir(broken / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))
    assert runs.finished(broken) is not None


@pytest.fixture(scope="module")
def whole(_shared_world: Any, processes: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining of six steps that nothing interrupts."""
    folder: Path = tmp_path_factory.mktemp("whole")
    ended = processes("pretrain", _shared_world.file, f"run_dir={folder}")
    assert ended.codes == [0], ended.output
    return folder / "pretrain"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_promise_5_resumable_stopped_again_and_again_at_random_steps(
    world: Any, processes: Callable[..., Any], whole: Path, tmp_path: Path, seed: int
) -> None:
    """SIGTERM, Ctrl-C and SIGKILL, each once, and in the end the weights of the unbroken run, bit for bit."""
    chance = random.Random(seed)
    argv = ("pretrain", world.file, f"run_dir={tmp_path}", f"stages.pretrain.checkpoint_every={seed}")
    for number in chance.sample(list(SIGNALS), 3):
        done = (complete(tmp_path / "pretrain" / "checkpoints") or [0])[-1]
        stop = [chance.choice(["step", "gradients", "update"]), chance.randint(1, max(1, 4 - done)), number]
        ended = processes(*argv, stop=stop)
        if ended.codes == [0]:  # asked in the last step
            break
        assert ended.codes == [SIGNALS[number]], (stop, ended.output)
        assert ("run the same command again" in ended.output) == (number != signal.SIGKILL)
    ended = processes(*argv)
    assert ended.codes == [0], ended.output
    ended = processes("pretrain", world.file, f"run_dir={tmp_path}")
    assert "finished already" in ended.output
    for file in ("model/model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (tmp_path / "pretrain" / file).read_bytes() == (whole / file).read_bytes()
    assert timeless(tmp_path / "pretrain") == timeless(whole)


def test_promise_5_resumable_after_sigkill_at_any_change_of_the_disk(
    world: Any, processes: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    """Killed before a name appears, changes or goes, until there is no such moment left; every one of a few at random.

    They lie in the middle of a checkpoint's publication, the removal of an older one, the snapshot, the export.
    """
    chance = random.Random(0)
    killed, at = 0, chance.randint(1, 9)
    while True:
        argv = ("pretrain", world.file, f"run_dir={tmp_path}/{at}")
        codes = processes(*argv, stop=["disk", at, signal.SIGKILL]).codes
        if codes == [-9]:
            ended = processes(*argv)
            assert ended.codes == [0], ended.output
            killed += 1
        assert_as_unbroken(tmp_path / str(at) / "pretrain", whole)
        if codes == [0]:
            break
        at += chance.randint(3, 12)
    assert killed >= 4


def test_promise_5_resumable_after_a_disk_that_is_really_full(
    world: Any, processes: Callable[..., Any], whole: Path, tmp_path: Path, at_step: Any, monkeypatch: Any
) -> None:
    """Full in the middle of a checkpoint, of its first file or its second, or when the metrics are written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        one, two = (
            (whole / "checkpoints" / "step-4" / f"{f}.safetensors").stat().st_size for f in ("model", "optimizer")
        )
        for room in (0, one // 2, one + two // 2):
            argv = ("pretrain", world.file, f"run_dir={disk}/{room}")

            def fill(room: int = room) -> None:
                there = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes(max(there.f_bavail * there.f_frsize - room - 8192, 0)))

            at_step(4, fill)
            with pytest.raises(OSError, match="No space left") as caught:
                run(world.config(argv[2]), "pretrain")
            assert caught.value.errno == errno.ENOSPC
            monkeypatch.undo()
            assert complete(disk / str(room) / "pretrain" / "checkpoints") == [2]
            assert os.listdir(disk / str(room) / "pretrain" / "checkpoints") == ["step-2"]
            (disk / "filler").unlink()
            ended = processes(*argv)
            assert ended.codes == [0], ended.output
            assert_as_unbroken(disk / str(room) / "pretrain", whole)
            shutil.rmtree(disk / str(room))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # a failed run's log may still be open


def test_promise_5_resumable_after_a_file_that_may_not_grow(
    world: Any, processes: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    """Where nothing can be mounted: the system refuses to write beyond a size (RLIMIT_FSIZE)."""
    size = (whole / "checkpoints" / "step-4" / "optimizer.safetensors").stat().st_size
    ended = processes("pretrain", world.file, f"run_dir={tmp_path}", largest=size - 1000)
    assert ended.codes == [1]
    assert "File too large" in ended.output
    assert "optimizer.safetensors" in ended.output
    assert os.listdir(tmp_path / "pretrain" / "checkpoints") == []
    assert processes("pretrain", world.file, f"run_dir={tmp_path}").codes == [0]
    assert_as_unbroken(tmp_path / "pretrain", whole)


def test_the_reason_why_one_rank_fails_alone_is_told(
    world: Any, processes: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    """The first rank, while the other waits for its checkpoint."""
    size = (whole / "checkpoints" / "step-4" / "optimizer.safetensors").stat().st_size
    ended = processes("pretrain", world.file, f"run_dir={tmp_path}", ranks=2, largest=size - 1000)
    assert ended.codes == [1, 1]
    assert "File too large" in ended.output


def seen(folder: Path) -> dict[int, list[str]]:
    """The samples of every step, over all ranks, and over all processes that came to it."""
    found: dict[int, set[str]] = {}
    for file in folder.iterdir():
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault(line["step"], set()).update(line["keys"])
    return {step: sorted(keys) for step, keys in sorted(found.items())}


@pytest.mark.parametrize(
    ("settings", "sharded"),
    [(UNEVEN, False), (UNEVEN, True), (TEXT_ONLY, False), (TEXT_ONLY, True)],
    ids=["uneven", "uneven, sharded", "text only", "text only, sharded"],
)
def test_promise_5_resumable_on_any_number_of_ranks(
    world: Any, processes: Callable[..., Any], tmp_path: Path, settings: tuple[str, ...], sharded: bool
) -> None:
    """1, 2 and 4 ranks, other micro-batches, and changing between them: the same global batches, losses and weights.

    Some ranks have nothing to do in some batches, and enter every collective all the same.
    """

    def train(name: str, *more: str, **asked: Any) -> list[int]:
        folder = tmp_path / f"{name}-seen"
        folder.mkdir(exist_ok=True)
        ended = processes("pretrain", world.file, f"run_dir={tmp_path}/{name}", *settings, *more, seen=folder, **asked)
        assert set(ended.codes) <= {0, 130}, ended.output
        codes: list[int] = ended.codes
        return codes

    shard = ["stages.pretrain.fully_shard=true"] if sharded else []
    stop = ["step", 1, signal.SIGTERM]
    assert train("one") == [0]
    assert train("two", *shard, ranks=2) == [0, 0]
    if not sharded:
        assert train("four", "stages.pretrain.micro_batch=1", ranks=4) == [0] * 4
    # One step on each: as many ranks as it says, with or without slices, with other micro-batches.
    assert train("changing", stop=stop) == [130]
    assert train("changing", *shard, ranks=2, stop=stop) == [130, 130]
    assert train("changing", *shard, "stages.pretrain.micro_batch=1", ranks=1 if sharded else 4, stop=stop)[0] == 130
    assert train("changing", *shard, ranks=2) == [0, 0]

    expected, samples = timeless(tmp_path / "one" / "pretrain"), seen(tmp_path / "one-seen")
    assert len(samples) == len(expected)
    if settings is TEXT_ONLY:
        assert sum(line["depth/1/smooth_l1"] == 0 for line in expected) == 1
    weights = load_file(tmp_path / "one" / "pretrain" / "model" / "model.safetensors")
    for name in ("two", "changing") if sharded else ("two", "four", "changing"):
        assert seen(tmp_path / f"{name}-seen") == samples
        for line, other in zip(expected, timeless(tmp_path / name / "pretrain"), strict=True):
            assert line == pytest.approx(other, rel=1e-3, abs=1e-6), name
        trained = load_file(tmp_path / name / "pretrain" / "model" / "model.safetensors")
        assert trained.keys() == weights.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(trained[key], tensor, atol=2e-4, rtol=1e-3)


def test_promise_5_resumable_as_torchrun_starts_it(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretrained on one process and then two, sharded; fine-tuned on what a sharded stage exported."""
    overrides = [f"run_dir={tmp_path}", *UNEVEN, "stages.pretrain.fully_shard=true"]
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(world.config(*overrides, "stages.pretrain.fully_shard=false"), "pretrain")
    monkeypatch.undo()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    resumed = python(*launcher, "-m", "train", "pretrain", str(world.file), *overrides)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    done = runs.finished(tmp_path / "pretrain")
    assert done is not None
    assert done["samples"] == 48
    run(world.config(*overrides, "stages.finetune.max_steps=1"), "finetune")
    assert runs.finished(tmp_path / "finetune") is not None


def test_promise_6_lean(world: Any, tmp_path: Path) -> None:
    trained = python("-c", BLOCKER, "pretrain", str(world.file), f"run_dir={tmp_path}", "stages.pretrain.max_steps=2")
    assert trained.returncode == 0, trained.stderr
    assert runs.finished(tmp_path / "pretrain") is not None
