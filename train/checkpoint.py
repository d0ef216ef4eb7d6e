"""Checkpoints: ``checkpoints/step-N/``, there in full or not at all (promise 5).

    model.safetensors      the trainable parameters; the others come from where the stage started
    optimizer.safetensors  AdamW's moments, ``<parameter>/<name>``
    state.json             written last: the step, and the size of the other two files

A checkpoint is written beside its final name, fsynced and renamed. There is no random state to save: what is random in
a step is seeded by (seed, step, rank).
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from olavlm.data.atomic import replace
from olavlm.data.folder import fsync
from olavlm.errors import OlaError
from train.distributed import World
from train.sharding import collect, like

Named = dict[str, nn.Parameter]


def save(folder: Path, step: int, parameters: Named, optimizer: torch.optim.Optimizer, keep: int, world: World) -> None:
    """Publish the checkpoint of `step` optimizer steps in ``folder/step-N`` and remove all but the last `keep`.

    Args:
        folder: the run's ``checkpoints``.
        step: optimizer steps done.
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
        _publish(folder, step, *whole, keep)
    world.barrier()


def _publish(folder: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int) -> None:
    final = folder / f"step-{step}"
    if _is_complete(final):
        return
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    sweep(folder)
    shutil.rmtree(final, ignore_errors=True)  # torn
    temporary.mkdir(parents=True)
    try:
        _write(temporary / "model.safetensors", weights)
        _write(temporary / "optimizer.safetensors", moments)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        replace(temporary / "state.json", json.dumps({"step": step, "files": files}, indent=2).encode())
        os.rename(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete(folder)[:-keep]:
        # Renamed first, so that a half-removed checkpoint does not look like one.
        doomed = folder / f".step-{old}.{os.getpid()}.tmp"
        os.rename(folder / f"step-{old}", doomed)
        shutil.rmtree(doomed)


def complete(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, in order; torn ones (a copy cut short) do not count."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match and _is_complete(folder / match[0]))


def resume(folder: Path, parameters: Named, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint; the optimizer steps done, 0 where there is none. Raises as `load` does."""
    steps = complete(folder)
    if not steps:
        return 0
    load(folder, steps[-1], parameters, optimizer)
    return steps[-1]


def load(folder: Path, step: int, parameters: Named, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint of `step` into the parameters and the optimizer, in place.

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


def sweep(folder: Path) -> None:
    """Remove what a killed writer left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)


def _is_complete(path: Path) -> bool:
    """Whether every file is there in the size that ``state.json`` gives."""
    try:
        files: dict[str, Any] = json.loads((path / "state.json").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write and fsync a safetensors file; its own error for a full disk becomes the operating system's."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
        raise
    fsync(file)
