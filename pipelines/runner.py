"""Runs a pipeline's stages in order, each in a process of its own.

A process per stage keeps the promise *Lean* true in the demo too: what trains has never imported a teacher. A stage
that finished with this very configuration is skipped without starting a process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    for number, stage in enumerate(stages, 1):
        title = f"[bold]{number}/{len(stages)} {stage}[/bold]"
        if runs.begin(runs.stage_dir(config, stage), runs.depends_on(config, stage)):
            done = runs.finished(runs.stage_dir(config, stage)) or {}
            console.print(f"{title}: done ({done.get('seconds', 0):.0f} s, {done.get('peak_memory_gib', 0):.1f} GiB)")
            continue
        console.print(f"{title}")
        if code := start(stage, pipeline, overrides):
            return code
        ran += 1
    page = Path(config.run_dir) / "report.html"
    if ran or not page.exists():
        if code := start("report", pipeline, overrides):
            return code
    else:
        console.print(f"report: {page}")
    console.print(f"{ran} of {len(stages)} stages ran, {time.monotonic() - started:.0f} s in all")
    return 0


def start(stage: str, pipeline: str, overrides: list[str]) -> int:
    """Run one stage to its end in a process of its own; Ctrl-C reaches it by the terminal, SIGTERM is passed on.

    Returns:
        Its exit code; 130 after Ctrl-C or SIGTERM, whatever the stage made of it.

    Raises:
        OlaError: a signal ended it.
    """
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        if process:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        process = subprocess.Popen([sys.executable, "-m", *COMMANDS[stage], pipeline, *overrides], env=os.environ)
        if asked:  # before there was a process to tell
            process.terminate()
        code = process.wait()
    except KeyboardInterrupt:
        if process:
            process.wait()  # it has had the same Ctrl-C and says how to resume
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    if asked:
        return 130
    if code < 0:
        raise OlaError(f"stage {stage} was ended by {signal.Signals(-code).name}; run the same command again to resume")
    return code
