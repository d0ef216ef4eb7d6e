"""Whole stages on one process: what they leave behind, how they go on, how they stop."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from olavlm import runs
from olavlm.errors import OlaError
from train import stage as stages
from train.checkpoint import complete
from train.metrics import TIME_KEYS, read
from train.probe import probe
from train.stage import run


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in read(folder)]


def test_a_stage_leaves_a_run_folder_and_is_skipped_the_second_time(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}")
    run(config, "pretrain")
    folder = tmp_path / "pretrain"
    done = runs.finished(folder)
    assert done is not None
    assert (done["steps"], done["samples"]) == (6, 48)
    assert done["final"].keys() == done["first"].keys() > {"loss", "text", "depth/1/smooth_l1", "gen/2/contrastive"}
    assert done["trained_parameters"].keys() == set(config.stages["pretrain"].trainable)
    assert [line["step"] for line in read(folder)] == [1, 2, 3, 4, 5, 6]
    assert complete(folder / "checkpoints") == [4, 6]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    run(config, "pretrain")
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(OlaError, match=r"lr: 0\.001 there, 0\.002 now"):
        run(world.config(f"run_dir={tmp_path}", "stages.pretrain.lr=2e-3"), "pretrain")


def test_only_the_trainable_parts_change(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}", "stages.pretrain.trainable=[projector,predictors,task_tokens]")
    run(config, "pretrain")
    run(config, "finetune")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("pretrain", "finetune"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("model.")} == {
        "multi_modal_projector",
        "language_model",
    }
    assert not any(name.startswith(("predictors", "task_tokens", "logit_scales")) for name in changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_and_exports_them_merged(world: Any, tmp_path: Path, dtype: str) -> None:
    config = world.config(
        f"run_dir={tmp_path}", "stages.finetune.lora={rank: 2, layers: [q_proj]}", f"stages.finetune.dtype={dtype}"
    )
    run(config, "pretrain")
    run(config, "finetune")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("pretrain", "finetune"))
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name].to(second[name].dtype), second[name])}
    of_llm = {name for name in changed if name.startswith("model.language_model")}
    assert of_llm
    assert all("q_proj" in name for name in of_llm)
    for name in of_llm if dtype == "float32" else ():
        assert torch.linalg.matrix_rank(second[name] - first[name], rtol=1e-3) <= 2
    done = runs.finished(tmp_path / "finetune")
    assert done is not None
    hidden = AutoModelForImageTextToText.from_pretrained(tmp_path / "finetune" / "model").config.text_config.hidden_size
    assert done["trained_parameters"]["language_model"] == len(of_llm) * 2 * 2 * hidden


def test_promise_5_resumable_with_adapters(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("stages.pretrain.trainable=[projector,language_model]", "stages.pretrain.lora={rank: 2, dropout: 0.2}")
    run(world.config(f"run_dir={tmp_path}/whole", *settings), "pretrain")
    config = world.config(f"run_dir={tmp_path}/broken", *settings)
    at_step(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(config, "pretrain")
    monkeypatch.undo()
    run(config, "pretrain")
    assert weights(tmp_path / "broken" / "pretrain") == weights(tmp_path / "whole" / "pretrain")


def test_lora_of_layers_the_model_has_not_is_refused(world: Any, tmp_path: Path) -> None:
    config = world.config(
        f"run_dir={tmp_path}", "stages.pretrain.trainable=[language_model]", "stages.pretrain.lora={layers: [conv]}"
    )
    with pytest.raises(OlaError, match=r"lora.layers: \['conv'\]"):
        run(config, "pretrain")
    with pytest.raises(OlaError, match=r"stages.finetune.lora: needs language_model"):
        world.config("stages.finetune.trainable=[projector]", "stages.finetune.lora={}")


def test_the_exported_model_is_an_ordinary_folder(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1", "stages.pretrain.dtype=bfloat16")
    run(config, "pretrain")
    folder = tmp_path / "pretrain" / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.task_configs[0].name == "gen"
    assert AutoProcessor.from_pretrained(folder).view == "squash"


def test_promise_6_lean_the_model_holds_the_students_parameters_only(world: Any, tmp_path: Path) -> None:
    run(world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1"), "pretrain")
    names = load_file(tmp_path / "pretrain" / "model" / "model.safetensors").keys()
    prefixes = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
    assert all(name.startswith((*prefixes, "task_tokens.", "predictors.", "logit_scales.")) for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_promise_5_resumable_after_an_interrupt(
    world: Any,
    tmp_path: Path,
    at_step: Callable[[int, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """The interrupted step is finished and kept; weights and metrics become those of the unbroken run, bit for bit."""
    run(world.config(f"run_dir={tmp_path}/whole"), "pretrain")
    config = world.config(f"run_dir={tmp_path}/broken")
    before = signal.getsignal(number)
    at_step(3, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        run(config, "pretrain")
    assert signal.getsignal(number) == before
    whole, broken = tmp_path / "whole" / "pretrain", tmp_path / "broken" / "pretrain"
    assert complete(broken / "checkpoints") == [2, 3]
    assert runs.finished(broken) is None
    monkeypatch.undo()
    run(config, "pretrain")
    assert weights(broken) == weights(whole)
    assert timeless(broken) == timeless(whole)


@pytest.mark.parametrize(("seconds", "steps"), [(1, [2, 3]), (60, [2])])
def test_promise_5_resumable_a_second_signal_stops_at_once_unless_it_is_the_first_passed_on_twice(
    world: Any,
    tmp_path: Path,
    at_step: Callable[[int, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    steps: list[int],
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        later = time.monotonic() + seconds
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGTERM)

    at_step(3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(world.config(f"run_dir={tmp_path}"), "pretrain")
    assert complete(tmp_path / "pretrain" / "checkpoints") == steps


def test_promise_5_resumable_with_other_micro_batches_and_threads(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise with other threads; with other micro-batches the same samples, and losses within fp32 noise."""
    run(world.config(f"run_dir={tmp_path}/whole"), "pretrain")
    run(world.config(f"run_dir={tmp_path}/threads", "stages.pretrain.loader_threads=5"), "pretrain")
    run(world.config(f"run_dir={tmp_path}/micro", "stages.pretrain.micro_batch=1"), "pretrain")
    whole, threads, micro = (tmp_path / name / "pretrain" for name in ("whole", "threads", "micro"))
    assert weights(threads) == weights(whole)
    assert timeless(threads) == timeless(whole)
    for line, other in zip(timeless(whole), timeless(micro), strict=True):
        assert line == pytest.approx(other, rel=2e-3)


def test_one_process_holds_the_whole_model_whatever_fully_shard_says(world: Any, tmp_path: Path) -> None:
    for name in ("true", "false"):
        run(world.config(f"run_dir={tmp_path}/{name}", f"stages.pretrain.fully_shard={name}"), "pretrain")
    assert weights(tmp_path / "true" / "pretrain") == weights(tmp_path / "false" / "pretrain")


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_samples(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = stages.accumulate, 0

    def accumulate(*args: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        nonlocal calls
        calls += 1
        terms, losses = original(*args)
        if calls == 3:
            terms["loss"], losses[1] = terms["loss"] * torch.nan, losses[1] * torch.nan
        return terms, losses

    monkeypatch.setattr(stages, "accumulate", accumulate)
    with pytest.raises(OlaError, match=r"step 3: loss not finite; among: data all, tar \d+, sample 's\d+'") as caught:
        run(world.config(f"run_dir={tmp_path}"), "pretrain")
    before = tmp_path / "pretrain" / "checkpoints" / "step-2"
    assert str(caught.value).endswith(f"the checkpoint before is {before}")
    assert str(caught.value).count("sample 's") == 4  # those of the micro-batch, of two
    assert complete(before.parent) == [2]


def test_a_gradient_that_is_not_finite_names_every_sample_it_may_come_from(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.sharding, "clip_gradients", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(
        OlaError, match=r"step 1: grad_norm not finite; among: .*; there is no checkpoint yet"
    ) as caught:
        run(world.config(f"run_dir={tmp_path}"), "pretrain")
    assert str(caught.value).count("sample 's") == 8


def test_promise_8_nothing_lost_in_silence_what_is_cut_at_max_length_is_counted(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    at_step: Callable[[int, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the metrics, in done.json and in a last line; also over a stop, and whatever the micro-batches."""
    lengths = ("stages.pretrain.max_length=50", "stages.pretrain.log_every=2")  # too short for s06, s13 and s20
    run(world.config(f"run_dir={tmp_path}/whole", *lengths), "pretrain")
    last = capsys.readouterr().out.splitlines()[-1]
    done = runs.finished(tmp_path / "whole" / "pretrain")
    assert done is not None
    assert (done["samples"], done["samples_cut"], done["answers_cut"]) == (48, 6, 6)  # two epochs
    assert last == "pretrain: 6 of 48 samples were cut at max_length 50; 6 answers were lost"
    config = world.config(f"run_dir={tmp_path}/broken", *lengths, "stages.pretrain.micro_batch=1")
    at_step(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(config, "pretrain")
    monkeypatch.undo()
    run(config, "pretrain")
    counted = [
        [(line["samples"], line["samples_cut"], line["answers_cut"]) for line in read(tmp_path / name / "pretrain")]
        for name in ("whole", "broken")
    ]
    assert counted[0] == counted[1]
    assert counted[0][-1] == (48, 6, 6)


def test_samples_without_room_for_an_answer_stop_no_stage(world: Any, tmp_path: Path) -> None:
    """Every question about an image is too long: its targets are learned all the same, its answer is not."""
    short = ("stages.pretrain.max_length=24", "stages.finetune.max_length=24")
    config = world.config(
        f"run_dir={tmp_path}", *short, "stages.finetune.global_batch=1", "stages.finetune.micro_batch=1"
    )
    run(config, "pretrain")
    assert all(line["depth/1/smooth_l1"] > 0 for line in read(tmp_path / "pretrain"))
    run(config, "finetune")
    texts = [line["text"] for line in read(tmp_path / "finetune")]
    assert len(texts) == 24
    assert sum(text > 0 for text in texts) == 3  # of samples without an image; the others' steps learn nothing
    done = runs.finished(tmp_path / "finetune")
    assert done is not None
    assert (done["samples_cut"], done["answers_cut"]) == (21, 21)


def test_a_full_disk_while_checkpointing_leaves_the_older_ones(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.config(f"run_dir={tmp_path}")
    real = os.fsync
    folder = tmp_path / "pretrain" / "checkpoints"

    def fsync(fd: int) -> None:
        if (folder / "step-4").exists():
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        run(config, "pretrain")
    monkeypatch.undo()
    assert complete(folder) == [2, 4]
    run(config, "pretrain")
    assert complete(folder) == [4, 6]


def test_what_snapshot_json_and_done_json_vouch_for_is_on_the_disk_before_them(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced, vouched = tmp_path / "pretrain", set(), []
    fsync, replace = os.fsync, os.replace

    def state(stat: os.stat_result) -> tuple[int, int]:
        return stat.st_ino, stat.st_mtime_ns

    def note(fd: int) -> None:
        fsync(fd)
        synced.add(state(os.fstat(fd)))

    def check(source: Path, target: Path) -> None:
        files = {
            "snapshot.json": [*folder.glob("*.npy"), *folder.glob("*.parquet")],
            "done.json": [*folder.glob("model"), *folder.glob("model/*")],
        }.get(target.name, [])
        assert [file for file in files if state(file.stat()) not in synced] == []
        vouched.append(len(files))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    run(world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1"), "pretrain")
    assert [count > 2 for count in vouched if count] == [True, True]


def test_the_folder_of_a_stage_that_is_being_trained_is_left_alone(
    world: Any, tmp_path: Path, at_step: Callable[[int, Callable[[], None]], None]
) -> None:
    """By a second job, even of another configuration."""
    config, other = (world.config(f"run_dir={tmp_path}", *more) for more in ((), ("stages.pretrain.lr=1",)))

    def again() -> None:
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        with pytest.raises(OlaError, match=f"{tmp_path}/pretrain: another process is at work in this folder"):
            run(other, "pretrain")
        assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    at_step(3, again)
    run(config, "pretrain")
    assert runs.finished(tmp_path / "pretrain")


def test_a_stage_says_what_it_starts_from_is_missing(world: Any, tmp_path: Path) -> None:
    config = world.config(f"run_dir={tmp_path}")
    with pytest.raises(OlaError, match="pretrain has not finished; run it first"):
        run(config, "finetune")
    with pytest.raises(OlaError, match=r"stages\.vpt: this pipeline has no such stage"):
        run(config, "vpt")


def test_a_stage_does_not_start_from_one_of_another_configuration(world: Any, tmp_path: Path) -> None:
    short = [f"run_dir={tmp_path}", "stages.pretrain.max_steps=1", "stages.finetune.max_steps=1"]
    run(world.config(*short), "pretrain")
    changed = world.config(*short, "stages.pretrain.losses={}")
    for start in (lambda: run(changed, "finetune"), lambda: probe(changed)):
        with pytest.raises(
            OlaError, match=r"pretrain/config\.yaml .*stages\.pretrain\.losses\.gen: 0\.5 there, None now"
        ):
            start()
    assert not (tmp_path / "probe").exists()
    assert {file.name for file in (tmp_path / "finetune").iterdir()} == {".lock", "config.yaml"}
    run(world.config(*short), "finetune")
    folder = f"stages.finetune.init={tmp_path}/pretrain/model"  # what a folder was made with is another run's business
    run(world.config(*short, f"run_dir={tmp_path}/other", "stages.pretrain.losses={}", folder), "finetune")


def test_init_from_a_folder_checks_the_tasks(world: Any, tmp_path: Path) -> None:
    run(world.config(f"run_dir={tmp_path}/a", "stages.pretrain.max_steps=1"), "pretrain")
    init = f"stages.pretrain.init={tmp_path}/a/pretrain/model"
    run(world.config(f"run_dir={tmp_path}/b", init, "stages.pretrain.max_steps=1"), "pretrain")
    with pytest.raises(OlaError, match=r"task depth has layers .*1, 2.*\[2\]"):
        run(world.config(f"run_dir={tmp_path}/c", init, "student.layers.depth=[2]"), "pretrain")


def test_losses_of_weight_zero_are_off(world: Any, tmp_path: Path) -> None:
    off = [f"stages.pretrain.losses.{task}=0" for task in ("depth", "gen")]
    run(world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=2", *off), "pretrain")
    assert not any("/" in key for key in read(tmp_path / "pretrain")[0])
    assert json.loads((tmp_path / "pretrain" / "snapshot.json").read_text())["tasks"] == []


def test_a_refused_student_leaves_nothing_that_a_corrected_one_would_stumble_over(world: Any, tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"depth\.layers: 9; expected integers from 1 to 2"):
        run(world.config(f"run_dir={tmp_path}", "student.layers.depth=[9]"), "pretrain")
    assert sorted(os.listdir(tmp_path / "pretrain")) == [".lock", "config.yaml"]
    run(world.config(f"run_dir={tmp_path}", "stages.pretrain.max_steps=1"), "pretrain")
    assert runs.finished(tmp_path / "pretrain")
