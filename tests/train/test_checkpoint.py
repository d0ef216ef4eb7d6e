"""Checkpoints are complete or invisible."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from olavlm.errors import OlaError
from train import checkpoint
from train.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
COUNTS = {"samples": 16, "samples_cut": 2, "answers_cut": 3}


def trained(steps: int = 2, width: int = 3) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(width, 2)) for name in ("a.weight", "b.weight")}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters.values()], lr=0.1)
    for _ in range(steps):
        advance(parameters, optimizer)
    return parameters, optimizer


def advance(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    torch.stack([(p**2).sum() for p in parameters.values()]).sum().backward()
    optimizer.step()


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 2, COUNTS, parameters, optimizer, keep=2, world=ALONE)
    others, other_optimizer = trained(steps=0)
    assert checkpoint.resume(tmp_path, others, other_optimizer, ALONE) == (2, COUNTS)
    advance(parameters, optimizer)
    advance(others, other_optimizer)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, COUNTS, parameters, optimizer, keep=2, world=ALONE)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-100"]
    assert checkpoint.complete(tmp_path) == [10, 100]


FILES = ["model.safetensors", "optimizer.safetensors", "counts.json", "state.json"]


def damage(folder: Path, how: str, name: str) -> None:
    """Of one file of a checkpoint: it is gone, cut or longer, one bit of it is flipped; or there is no file at all."""
    file = folder / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        os.truncate(file, len(data) // 2)
    elif how == "longer":
        file.write_bytes(data + b"\n")
    elif how == "flipped":
        data[len(data) * 3 // 4] ^= 1
        file.write_bytes(data)
    else:
        for other in folder.iterdir():
            other.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["gone", "cut", "longer", "flipped", "empty folder"])
def test_promise_5_resumable_torn_checkpoints_are_never_gone_on_from(tmp_path: Path, how: str, name: str) -> None:
    if (how, name) == ("longer", "state.json"):
        pytest.skip("a line more changes nothing it says")
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 1, COUNTS, parameters, optimizer, keep=3, world=ALONE)
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for step in (2, 3):
        advance(parameters, optimizer)
        checkpoint.save(tmp_path, step, {"samples": step}, parameters, optimizer, keep=3, world=ALONE)
        damage(tmp_path / f"step-{step}", how, name)
    others, other_optimizer = trained(steps=0)
    assert checkpoint.resume(tmp_path, others, other_optimizer, ALONE) == (1, COUNTS)
    assert all(torch.equal(before[key], others[key]) for key in before)
    checkpoint.save(tmp_path, 2, COUNTS, others, other_optimizer, keep=1, world=ALONE)  # not taken for the newer one's
    assert checkpoint.resume(tmp_path, *trained(steps=0), ALONE)[0] == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path, 2, COUNTS, *trained(), keep=1, world=ALONE)
    damage(tmp_path / "step-2", "flipped", "optimizer.safetensors")
    assert checkpoint.resume(tmp_path, *trained(steps=0), ALONE) == (0, {})
    assert "step-2: optimizer.safetensors damaged" in capsys.readouterr().out.replace("\n", "")


def test_a_torn_checkpoint_is_written_again(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 2, COUNTS, parameters, optimizer, keep=2, world=ALONE)
    (tmp_path / "step-2" / "state.json").write_text(json.dumps({})[:-1])
    checkpoint.save(tmp_path, 2, COUNTS, parameters, optimizer, keep=2, world=ALONE)
    assert checkpoint.complete(tmp_path) == [2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 1, COUNTS, parameters, optimizer, keep=1, world=ALONE)

    def full(tensors: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        checkpoint.save(tmp_path, 2, COUNTS, parameters, optimizer, keep=1, world=ALONE)
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == ["step-1"]
    assert checkpoint.complete(tmp_path) == [1]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-1.123.tmp").mkdir()
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 1, COUNTS, parameters, optimizer, keep=1, world=ALONE)
    assert os.listdir(tmp_path) == ["step-1"]


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, COUNTS, *trained(), keep=1, world=ALONE)
    with pytest.raises(OlaError, match="another model"):
        checkpoint.load(tmp_path, 2, *trained(width=4))
