"""Many runs on one corpus and one store: what sweeps and studies are made of.

Corpora, targets and benchmark are the pipeline's own and are never made again. A stage that two settings have in common
is trained once: in the second it is a link to the first. Stopped and started again, what is still missing is done.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from pipelines.runner import Processes

#: The stages that all settings share.
_SHARED = ("corpus", "featurize")


@dataclass(frozen=True)
class Setting:
    """A run that differs from its pipeline in what is trained, not in what it is trained on."""

    name: str  # of its folder
    config: PipelineConfig
    overrides: list[str]  # that make `config` of the pipeline's file
    stages: tuple[str, ...]  # its own


def make_setting(
    base: PipelineConfig, pipeline: str, overrides: list[str], name: str, own: list[str], folder: Path
) -> Setting:
    """A setting of `base`, in ``folder/name``.

    Args:
        base: the pipeline with `overrides`, whose corpora, targets and benchmark it shares.
        pipeline: name or path of the pipeline.
        overrides: ``key.path=value`` strings that hold for all settings.
        name: of its folder.
        own: its own overrides; the last word.
        folder: where the settings are.

    Raises:
        OlaError: a value that does not validate.
    """
    shared = []
    for key, data in base.data.items():
        shared += [f"data.{key}.source=null", f"data.{key}.corpus={data.corpus}"]
        shared += [f"data.{key}.targets={data.targets}"] if data.targets else []
    if base.eval:
        shared += [f"eval.{key}={path}" for key, path in base.eval.folders.items()] + ["eval.scenes=null"]
    wanted = [*overrides, *shared, *own, f"run_dir={folder / name}"]
    config = load_pipeline(pipeline, wanted)
    had = _SHARED if config.teachers == base.teachers else ("corpus",)  # other teachers are asked before they are used
    return Setting(name, config, wanted, tuple(stage for stage in runs.stages_of(config) if stage not in had))


def run_all(
    base: PipelineConfig, pipeline: str, overrides: list[str], chosen: Sequence[Setting], jobs: int = 1
) -> tuple[int, dict[str, str]]:
    """Make what the pipeline's own stages make, then train, probe and evaluate every setting.

    Args:
        base: the pipeline with `overrides`.
        pipeline: its name or path.
        overrides: ``key.path=value`` strings that hold for all settings.
        chosen: the settings.
        jobs: settings at the same time, which share the cores; of more than one, what the stages print goes to
            ``stages.log`` in their folders.

    Returns:
        An exit code: 0; 1 if a setting failed, after all others have been tried; that of a corpus or a featurization
        that failed; 130 after Ctrl-C or SIGTERM. And the stage that each failed setting failed in, by its name.

    Raises:
        OlaError: a signal ended a stage.
    """
    failed: dict[str, str] = {}
    with Processes() as processes:
        for stage in _SHARED:
            wanted = stage in runs.stages_of(base) and not _finished(base, stage)
            if wanted and (code := processes.run(stage, pipeline, overrides)):
                return code, failed
        with ThreadPoolExecutor(jobs) as pool:
            run_one = _Runner(processes, pipeline, jobs, len(chosen))
            begun = {pool.submit(run_one, setting): setting.name for setting in chosen}
            try:
                for future in as_completed(begun):
                    if failed_in := future.result():
                        failed[begun[future]] = failed_in
            except KeyboardInterrupt:
                processes.close()  # the stages have had the same Ctrl-C; a second signal would stop them at once
            except BaseException:
                processes.stop()
                raise
        return 130 if processes.closed else int(bool(failed)), failed


class _Runner:
    """Runs one setting after the other, or several at a time."""

    def __init__(self, processes: Processes, pipeline: str, jobs: int, total: int):
        self._processes, self._pipeline, self._console = processes, pipeline, Console()
        self._jobs, self._total, self._begun = jobs, total, 0
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by a stage's whole configuration

    def __call__(self, chosen: Setting) -> str | None:
        """The stage it failed in, if any."""
        if self._processes.closed:
            return None
        self._begun += 1
        self._console.print(f"[bold]setting {self._begun}/{self._total}: {escape(chosen.name)}[/bold]")
        several = self._jobs > 1
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._jobs))} if several else {}
        for stage in chosen.stages:
            wanted = json.dumps(runs.depends_on(chosen.config, stage), sort_keys=True)
            with self._locks[wanted]:  # the second to want it waits, and links it
                _adopt(chosen, stage, json.loads(wanted))
                if _finished(chosen.config, stage):
                    continue
                log = Path(chosen.config.run_dir) / "stages.log" if several else None
                code = self._processes.run(stage, self._pipeline, chosen.overrides, log, **env)
            if code == 130:
                self._processes.close()
            if self._processes.closed:
                return None
            if code:
                return stage
            if several:
                done = runs.finished(runs.stage_dir(chosen.config, stage)) or {}
                self._console.print(f"{escape(chosen.name)}: {stage}, {done.get('seconds', 0):,.0f} s")
        return None


def _finished(config: PipelineConfig, stage: str) -> bool:
    return runs.begin(runs.stage_dir(config, stage), runs.depends_on(config, stage))


def _adopt(chosen: Setting, stage: str, wanted: object) -> None:
    """Link a stage that another setting has finished with the very same configuration."""
    own = runs.stage_dir(chosen.config, stage)
    if own.exists():
        return
    for other in sorted(own.parent.parent.glob(f"*/{stage}")):
        if runs.finished(other) and OmegaConf.to_container(OmegaConf.load(other / "config.yaml")) == wanted:
            own.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.relpath(other.resolve(), own.parent.resolve()), own)
            return
