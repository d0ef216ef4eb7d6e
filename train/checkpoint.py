"""Checkpoints: ``checkpoints/step-N/``, there in full or not at all (promise 5).

    model.safetensors      the trainable parameters; the others come from where the stage started
    optimizer.safetensors  AdamW's moments, ``<parameter>/<name>``
    counts.json            what was counted so far: samples, and what of them was cut
    state.json             written last: the step, and size and checksum of the other files

A checkpoint is written beside its final name, fsynced and renamed. There is no random state to save: what is random in
a step is seeded by (seed, step, rank).
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olavlm.data.atomic import replace
from olavlm.data.folder import fsync
from olavlm.errors import OlaError
from train.distributed import World
from train.sharding import collect, like

Named = dict[str, nn.Parameter]
Counts = dict[str, int]


def save(
    folder: Path,
    step: int,
    counts: Counts,
    parameters: Named,
    optimizer: torch.optim.Optimizer,
    keep: int,
    world: World,
) -> None:
    """Publish the checkpoint of `step` optimizer steps in ``folder/step-N`` and remove all but the last `keep`.

    Args:
        folder: the run's ``checkpoints``.
        step: optimizer steps done.
        counts: what was counted over these steps (samples, and so on), to be counted on from.
        parameters: the trained parameters by name.
        optimizer: an AdamW over exactly these parameters.
        keep: checkpoints to keep, this one included.
        world: all ranks must call, as the first gathers what is sharded; it alone writes, and the others wait for it.

    Raises:
        OSError: the disk is full; the older checkpoints are untouched and nothing of this one is left.
    """
    moments = {
        f"{name}/{key}": value
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()  # empty where a parameter never had a gradient
    }
    whole = collect(dict(parameters), world), collect(moments, world)
    if world.rank == 0:
        _publish(folder, step, counts, *whole, keep)
    world.barrier()


def _publish(
    folder: Path, step: int, counts: Counts, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int
) -> None:
    final = folder / f"step-{step}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    sweep(folder)
    shutil.rmtree(final, ignore_errors=True)  # torn: a sound one would have been gone on from
    temporary.mkdir(parents=True)
    try:
        _write(temporary / "model.safetensors", weights)
        _write(temporary / "optimizer.safetensors", moments)
        replace(temporary / "counts.json", json.dumps(counts, indent=2).encode())
        files = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(temporary.iterdir())}
        replace(temporary / "state.json", json.dumps({"step": step, "files": files}, indent=2).encode())
        os.rename(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete(folder)[:-keep]:
        _remove(folder, old)


def _remove(folder: Path, step: int) -> None:
    """Remove a checkpoint; renamed first, so that a half-removed one does not look like one."""
    doomed = folder / f".step-{step}.{os.getpid()}.tmp"
    os.rename(folder / f"step-{step}", doomed)
    shutil.rmtree(doomed)


def complete(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, in order; torn ones do not count. Tensors are not read."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match and _is_complete(folder / match[0]))


def resume(folder: Path, parameters: Named, optimizer: torch.optim.Optimizer, world: World) -> tuple[int, Counts]:
    """Load the newest sound checkpoint; damaged ones are said and removed. All ranks must call. Raises as `load` does.

    Returns:
        The optimizer steps done, and what was counted over them; 0 and {} where there is no checkpoint.
    """
    step = _newest_sound(folder) if world.rank == 0 else 0
    step = int(world.sum(torch.tensor(step, device=world.device)))  # every rank goes on from the same
    return (step, load(folder, step, parameters, optimizer)) if step else (0, {})


def _newest_sound(folder: Path) -> int:
    """The step of the newest checkpoint whose bytes are what was written, 0 if there is none."""
    for step in reversed(complete(folder)):
        source = folder / f"step-{step}"
        files = json.loads((source / "state.json").read_text())["files"]
        damaged = [name for name, (_, checksum) in files.items() if _checksum(source / name) != checksum]
        if not damaged:
            return step
        _remove(folder, step)
        Console().print(
            f"{source}: {', '.join(damaged)} damaged (another checksum than when written); removed", soft_wrap=True
        )
    return 0


def load(folder: Path, step: int, parameters: Named, optimizer: torch.optim.Optimizer) -> Counts:
    """Put the checkpoint of `step` into the parameters and the optimizer, in place; what was counted until then.

    Raises:
        OlaError: it was written by a training of other parameters; the names are given.
    """
    source = folder / f"step-{step}"
    saved = load_file(source / "model.safetensors")
    wrong = sorted(saved.keys() ^ parameters.keys()) or [n for n, p in parameters.items() if saved[n].shape != p.shape]
    if wrong:
        raise OlaError(
            f"{source}: of another model: {', '.join(wrong[:5])} missing, unknown or of another shape; "
            "remove the run's folder to start afresh"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(saved[name], parameter))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(source / "optimizer.safetensors").items():
        name, moment = key.rsplit("/", 1)
        moments.setdefault(name, {})[moment] = like(value, parameters[name])
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {index[parameters[name]]: values for name, values in moments.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    counts: Counts = json.loads((source / "counts.json").read_text())
    return counts


def sweep(folder: Path) -> None:
    """Remove what a killed writer left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)


def _is_complete(path: Path) -> bool:
    """Whether every file is there in the size that ``state.json`` gives."""
    try:
        files: dict[str, Any] = json.loads((path / "state.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(file: Path) -> int:
    """crc32c of a file's content."""
    value = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 24):
            value = google_crc32c.extend(value, chunk)
    return value


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write and fsync a safetensors file; its own error for a full disk or quota becomes the system's."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    except SafetensorError as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(file)) from None
    fsync(file)
