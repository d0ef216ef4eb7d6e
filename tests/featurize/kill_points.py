"""Helper of test_kill: SIGKILLs a command at its n-th change of the disk, runs it again, and tells what became of it.

Run as ``python kill_points.py PIPELINE FOLDER COMMAND:EVERY …``; prints one JSON object per kill point. A command works
on a copy of FOLDER/<command>/start, if that is there. Every run is a process of its own, forked from this one so that
the imports and the teachers' weights are paid once. With TARGETS_URL in the environment the stores lie below that URL,
and what they became is for the caller to see: this process must not talk to an object store before it forks.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from gc import freeze
from pathlib import Path

import torch
from rich.console import Console

from featurize import stage, teachers
from featurize.export import export
from featurize.lifecycle import drop, find_sets, gc, withdraw_damaged
from featurize.teachers.base import Teacher
from olavlm.config import PipelineConfig, TeacherConfig, load_pipeline
from olavlm.data.manifest import compact
from olavlm.data.objects import ObjectPath
from olavlm.errors import OlaError

torch.set_num_threads(1)  # nothing below this process may have started a thread pool when it forks
stage.Console = lambda **_: Console(quiet=True)
pipeline, folder = sys.argv[1], Path(sys.argv[2])
url = os.environ.get("TARGETS_URL")
loaded = {teacher.teacher: teachers.load(teacher) for teacher in load_pipeline(pipeline).teachers.values()}
for teacher in loaded.values():
    _ = teacher.model


def load(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher that this process has loaded."""
    return loaded[config.teacher]


teachers.load = load
freeze()  # a child that collects garbage would copy every page it looks at


def repair(config: PipelineConfig) -> None:
    list(withdraw_damaged(config))
    stage.run_pipeline(config)


def drop_and_collect(config: PipelineConfig) -> None:
    with suppress(OlaError):  # it was killed when the set was gone already
        for target in find_sets(config, "seg"):
            drop(target)
    list(gc(config))


def compact_all(config: PipelineConfig) -> None:
    for job in stage.open_jobs(config):
        for target in job.sets.values():
            compact(target)
    list(gc(config))


COMMANDS = {
    "run": stage.run_pipeline,
    "retry": lambda config: stage.run_pipeline(config, retry_failed=True),
    "repair": repair,
    "drop": drop_and_collect,
    "gc": lambda config: list(gc(config)),
    "compact": compact_all,
    "export": lambda config: list(export(config, "all", Path(config.run_dir) / "exported")),
}


def run(command: str, root: Path, kill_at: int = 0, after: bool = False) -> int:
    """Run a command on `root` in a child; returns how it ended, as os.waitpid says."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    count, lock = 0, threading.Lock()  # tars are written by several threads, and none may step over `kill_at`

    def counted(owner, name: str, is_inside) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments, **more):
            nonlocal count
            inside = is_inside(*arguments, **more)
            with lock:
                count += inside
                here = inside and count == kill_at
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                real(*arguments, **more)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, wrapped)

    def below_tops(*paths, **more) -> bool:
        path = Path(os.fsdecode(paths[-1]))
        return more.get("dir_fd") is not None or any(path.is_relative_to(root / top) for top in TOPS)

    for name in ("link", "replace", "rename", "unlink", "rmdir"):
        counted(os, name, below_tops)
    counted(ObjectPath, "_put", lambda *_: True)
    store = [f"data.all.targets={url}/{root.name}"] if url else []
    try:
        COMMANDS[command](load_pipeline(pipeline, [f"run_dir={root}", *store]))
        (root / "count").write_text(str(count))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


TOPS = ("targets", "exported")


def tree(root: Path) -> dict[str, bytes | None]:
    """What a command leaves; a manifest holds times."""
    paths = [path for top in TOPS for path in sorted((root / top).rglob("*")) if path.name != "manifest.parquet"]
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}


def committed(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit, and of nothing else."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(root.glob("targets/*/commits/*.parquet"))}


def fresh(command: str, name: str) -> Path:
    start, root = folder / command / "start", folder / command / name
    if start.exists():
        shutil.copytree(start, root)
    return root


for command, _, every in (argument.partition(":") for argument in sys.argv[3:]):
    unbroken = fresh(command, "unbroken")
    assert run(command, unbroken) == 0
    whole = tree(unbroken)
    total = int((unbroken / "count").read_text())
    for number, kill_at in enumerate(range(1, total + 1, int(every))):
        root, after = fresh(command, f"killed-{kill_at}"), bool(number % 2)
        ended = run(command, root, kill_at, after)
        before, left = committed(root), tree(root)
        again = run(command, root)
        now = tree(root)
        point = {
            "command": command,
            "kill_at": kill_at,
            "of": total,
            "killed": os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL,
            "finished": again == 0,
            "commits_untouched": {path: stamp for path, stamp in committed(root).items() if path in before} == before,
            "left_behind": len(left),
            "differs": sorted(path for path in whole.keys() | now.keys() if whole.get(path, 0) != now.get(path, 0)),
        }
        print(json.dumps(point), flush=True)
        shutil.rmtree(root)
