"""Runs a pipeline's stages in order, each in a process of its own.

A process per stage keeps the promise *Lean* true in the demo too: what trains has never imported a teacher. A stage
that finished with this very configuration is skipped without starting a process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from olavlm import runs
from olavlm.config import PipelineConfig
from olavlm.errors import OlaError

#: The command behind each stage.
COMMANDS = {
    "corpus": ["pipelines", "corpus"],
    "featurize": ["featurize", "run"],
    "pretrain": ["train", "pretrain"],
    "vpt": ["train", "vpt"],
    "finetune": ["train", "finetune"],
    "probe": ["train", "probe"],
    "probe_tasks": ["pipelines", "probe-tasks"],
    "evaluate": ["pipelines", "evaluate"],
    "report": ["pipelines", "report"],
}


def run(config: PipelineConfig, pipeline: str, overrides: list[str]) -> int:
    """Run every stage of `config` that has not finished yet, then the report.

    Args:
        config: the validated pipeline.
        pipeline: its name or path, as the person gave it; handed to each stage's command.
        overrides: ``key.path=value`` strings, handed on as well.

    Returns:
        0, or the exit code of the stage that failed; later stages are not started.
    """
    console = Console()
    stages = runs.stages_of(config)
    started = time.monotonic()
    ran = 0
    with Processes() as processes:
        for number, stage in enumerate(stages, 1):
            title = f"[bold]{number}/{len(stages)} {stage}[/bold]"
            if runs.begin(runs.stage_dir(config, stage), runs.depends_on(config, stage)):
                done = runs.finished(runs.stage_dir(config, stage)) or {}
                took = f"{done.get('seconds', 0):.0f} s, {done.get('peak_memory_gib', 0):.1f} GiB"
                console.print(f"{title}: done ({took})")
                continue
            console.print(f"{title}")
            if code := processes.run(stage, pipeline, overrides):
                return code
            ran += 1
        page = Path(config.run_dir) / "report.html"
        if ran or not page.exists():
            if code := processes.run("report", pipeline, overrides):
                return code
        else:
            console.print(f"report: {page}")
    console.print(f"{ran} of {len(stages)} stages ran, {time.monotonic() - started:.0f} s in all")
    return 0


class Processes:
    """Stages as processes of their own. Ctrl-C reaches them by the terminal; SIGTERM is passed on to them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.RLock()  # a signal may come while it is held
        self._asked = False

    def __enter__(self) -> "Processes":
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def run(self, stage: str, pipeline: str, overrides: list[str], log: Path | None = None, **env: str) -> int:
        """Run one stage to its end; several threads may do so at the same time.

        Args:
            stage: one of `COMMANDS`.
            pipeline: name or path of the pipeline.
            overrides: ``key.path=value`` strings.
            log: a file that gets what the stage prints; default: this process's own output.
            env: environment variables it gets besides this process's own.

        Returns:
            Its exit code; 130 after Ctrl-C or SIGTERM, whatever the stage made of it.

        Raises:
            OlaError: a signal ended it.
        """
        command = [sys.executable, "-m", *COMMANDS[stage], pipeline, *overrides]
        output: Any = log.open("ab") if log else None
        try:
            with self._lock:
                if self._asked:
                    return 130
                process = subprocess.Popen(
                    command, stdout=output, stderr=output and subprocess.STDOUT, env=os.environ | env
                )
                self._running.add(process)
                if self._asked:  # before there was a process to tell
                    process.terminate()
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.wait()  # it has had the same Ctrl-C and says how to resume
                return 130
        finally:
            if output:
                output.close()
        with self._lock:
            self._running.discard(process)
        if self._asked:
            return 130
        if code < 0:
            name = signal.Signals(-code).name
            raise OlaError(f"stage {stage} was ended by {name}; run the same command again to resume")
        return code

    @property
    def closed(self) -> bool:
        """Whether no more are started."""
        return self._asked

    def close(self) -> None:
        """Start no more."""
        self._asked = True

    def stop(self) -> None:
        """Start no more, and ask those under way to stop."""
        with self._lock:
            self._asked = True
            for process in self._running:
                process.terminate()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()
