"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard scalars, and one line on the terminal."""

import json
import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from olavlm.provenance import peak_memory_gib

#: Keys of a line that measure the machine, not the training; everything else is the same in a resumed run.
TIME_KEYS = ("samples_per_s", "data_wait", "memory_gib", "gpu_memory_gib", "seconds")


class Metrics:
    """Logs steps to ``metrics.jsonl``, ``tensorboard/`` and the terminal; keeps the time between the logged steps.

    A line holds the values of its own step (no running means) and what was counted since the run began, so that a
    resumed run writes the lines of an unbroken one. Losses by task and layer are named ``task/layer/term``.

    Attributes:
        counts: samples, samples_cut (at max_length) and answers_cut (that they lost), over all steps so far.
    """

    def __init__(
        self, folder: Path, title: str, step: int, steps: int, counts: dict[str, int] | None = None, quiet: bool = False
    ):
        """Open the log of a run that has done `step` of `steps` steps; later lines, and a torn one, are dropped.

        Args:
            folder: the stage's run folder.
            title: shown before the bar.
            step: steps done so far.
            steps: steps in all.
            counts: over the steps done so far; default: none.
            quiet: write nothing at all (every rank but the first).
        """
        self._quiet = quiet
        self._start = self._last = time.perf_counter()
        self._samples = self._total_samples = 0
        self._waited = self._total_waited = 0.0
        self._first = self._step = step
        self._steps = steps
        self.counts = Counter(counts or {})
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

    def advance(self, counts: dict[str, int], waited: float) -> None:
        """Count a finished step.

        Args:
            counts: of its global batch, named as in `counts`.
            waited: seconds this process has waited for data since it started.
        """
        self._step += 1
        self.counts.update(counts)
        self._samples += counts["samples"]
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
            **_memory(),
            "seconds": now - self._start,
        }
        self._total_samples += self._samples
        self._total_waited = self._waited
        self._samples, self._last = 0, now
        if self._quiet:
            return
        told = {**values, **self.counts, **speed}
        line = {"step": step} | {k: v if isinstance(v, int) else float(f"{v:.8g}") for k, v in told.items()}
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in told.items():
            self._board.add_scalar(key, value, step)
        text = (
            f"loss {values['loss']:.3f} text {values['text']:.3f}{_by_task(values)}{self._cut()}"
            f"  {speed['samples_per_s']:.1f} samples/s  wait {speed['data_wait']:.0%}  {speed['memory_gib']:.1f} GiB"
            + (f" + {speed['gpu_memory_gib']:.1f} GiB GPU" if "gpu_memory_gib" in speed else "")
        )
        self._progress.update(self._bar, line=text)
        if not self._console.is_terminal:
            left = (now - self._start) / (self._step - self._first) * (self._steps - step)
            self._console.print(
                f"step {step:,}/{self._steps:,}  {text}  ETA {timedelta(seconds=round(left))}", soft_wrap=True
            )

    def _cut(self) -> str:
        """The share of the samples that were cut, for the terminal; nothing where there are none."""
        cut = self.counts["samples_cut"]
        return f" cut {cut / self.counts['samples']:.1%}" if cut else ""

    def close(self) -> dict[str, float]:
        """Close the files; the counts of the run, and samples_per_s and data_wait of this process."""
        seconds = max(self._last - self._start, 1e-9)
        if not self._quiet:
            self._progress.stop()
            self._board.close()
        return {
            **self.counts,
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


def _memory() -> dict[str, float]:
    """Peak memory of this process so far in GiB: resident, and of the GPU where there is one."""
    resident = peak_memory_gib()
    if not torch.cuda.is_available():
        return {"memory_gib": resident}
    return {"memory_gib": resident, "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
