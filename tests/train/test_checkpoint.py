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
    checkpoint.save(tmp_path, 2, parameters, optimizer, keep=2, world=ALONE)
    others, other_optimizer = trained(steps=0)
    checkpoint.load(tmp_path, 2, others, other_optimizer)
    advance(parameters, optimizer)
    advance(others, other_optimizer)
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, parameters, optimizer, keep=2, world=ALONE)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-100"]
    assert checkpoint.complete(tmp_path) == [10, 100]


@pytest.mark.parametrize("damage", ["state.json", "model.safetensors", "optimizer.safetensors", "cut"])
def test_torn_checkpoints_are_not_picked_up(tmp_path: Path, damage: str) -> None:
    parameters, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, parameters, optimizer, keep=2, world=ALONE)
    if damage == "cut":
        os.truncate(tmp_path / "step-2" / "model.safetensors", 20)
    else:
        (tmp_path / "step-2" / damage).unlink()
    assert checkpoint.complete(tmp_path) == [1]


def test_a_torn_checkpoint_is_written_again(tmp_path: Path) -> None:
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 2, parameters, optimizer, keep=2, world=ALONE)
    (tmp_path / "step-2" / "state.json").write_text(json.dumps({})[:-1])
    checkpoint.save(tmp_path, 2, parameters, optimizer, keep=2, world=ALONE)
    assert checkpoint.complete(tmp_path) == [2]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 1, parameters, optimizer, keep=1, world=ALONE)

    def full(tensors: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        checkpoint.save(tmp_path, 2, parameters, optimizer, keep=1, world=ALONE)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step-1"]
    assert checkpoint.complete(tmp_path) == [1]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-1.123.tmp").mkdir()
    parameters, optimizer = trained()
    checkpoint.save(tmp_path, 1, parameters, optimizer, keep=1, world=ALONE)
    assert os.listdir(tmp_path) == ["step-1"]


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, *trained(), keep=1, world=ALONE)
    with pytest.raises(OlaError, match="another model"):
        checkpoint.load(tmp_path, 2, *trained(width=4))
