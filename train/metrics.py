"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard scalars, and one line on the terminal."""

import json
import os
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

#: Keys of a line that measure the machine, not the training; everything else is the same in a resumed run.
TIME_KEYS = ("samples_per_s", "data_wait", "memory_gib", "seconds")


class Metrics:
    """Logs steps to ``metrics.jsonl``, ``tensorboard/`` and the terminal; keeps the time between the logged steps.

    A line holds the values of its own step (no running means), so that a resumed run writes the lines of an
    unbroken one. Losses by task and layer are named ``task/layer/term``.
    """

    def __init__(self, folder: Path, title: str, step: int, steps: int, quiet: bool = False):
        """Open the log of a run that has done `step` of `steps` steps; later lines, and a torn one, are dropped.

        Args:
            folder: the stage's run folder.
            title: shown before the bar.
            step: steps done so far.
            steps: steps in all.
            quiet: write nothing at all (every rank but the first).
        """
        self._quiet = quiet
        self._start = self._last = time.perf_counter()
        self._samples = self._total_samples = 0
        self._waited = self._total_waited = 0.0
        self._step = step
        if quiet:
            return
        self._file = folder / "metrics.jsonl"
        _truncate(self._file, step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._console = Console()
        self._progress = Progress(
            TextColumn(title), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._bar = self._progress.add_task(title, total=steps, completed=step, line="")
        self._progress.start()

    def advance(self, samples: int, waited: float) -> None:
        """Count a finished step.

        Args:
            samples: in its global batch.
            waited: seconds this process has waited for data since it started.
        """
        self._step += 1
        self._samples += samples
        self._waited = waited
        if not self._quiet:
            self._progress.update(self._bar, completed=self._step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the values of `step` (1-based), and how fast the steps since the last line were."""
        now = time.perf_counter()
        elapsed = now - self._last
        speed = {
            "samples_per_s": self._samples / elapsed,
            "data_wait": (self._waited - self._total_waited) / elapsed,
            "memory_gib": _memory(),
            "seconds": now - self._start,
        }
        self._total_samples += self._samples
        self._total_waited = self._waited
        self._samples, self._last = 0, now
        if self._quiet:
            return
        line = {"step": step, **values, **speed}
        with open(self._file, "a") as file:
            file.write(json.dumps({k: v if k in ("step",) else float(f"{v:.8g}") for k, v in line.items()}) + "\n")
        for key, value in {**values, **speed}.items():
            self._board.add_scalar(key, value, step)
        text = (
            f"loss {values['loss']:.3f} text {values['text']:.3f}{_by_task(values)}"
            f"  {speed['samples_per_s']:.1f} samples/s  wait {speed['data_wait']:.0%}  {speed['memory_gib']:.1f} GiB"
        )
        self._progress.update(self._bar, line=text)
        if not self._console.is_terminal:
            self._console.print(f"step {step}  {text}", soft_wrap=True)

    def close(self) -> dict[str, float]:
        """Close the files; the totals of this process: seconds of training, samples, samples_per_s, data_wait."""
        seconds = max(self._last - self._start, 1e-9)
        if not self._quiet:
            self._progress.stop()
            self._board.close()
        return {
            "samples_per_s": round(self._total_samples / seconds, 2),
            "data_wait": round(self._total_waited / seconds, 4),
        }


def read(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _by_task(values: dict[str, float]) -> str:
    """Mean smooth-L1 of each task over its layers, for the terminal."""
    tasks: dict[str, list[float]] = {}
    for key, value in values.items():
        if key.endswith("/smooth_l1"):
            tasks.setdefault(key.split("/")[0], []).append(value)
    return "".join(f" {task} {sum(v) / len(v):.3f}" for task, v in tasks.items())


def _truncate(file: Path, step: int) -> None:
    """Keep the lines up to `step`; what a killed process wrote after its last checkpoint is written again."""
    kept = b""
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += line
    with open(file, "wb") as out:
        out.write(kept)
        os.fsync(out.fileno())


def _memory() -> float:
    """Peak memory of this process so far in GiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
