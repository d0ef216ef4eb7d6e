"""Helper of test_stage: SIGKILLs a featurization at its n-th publication, reruns it, and tells what the store became.

Run as ``python kill_points.py PIPELINE FOLDER EVERY [URL]``; prints one JSON object per kill point. Every run is a
process of its own, forked from this one so that the imports are paid once. With a URL the stores lie below it, and what
they became is for the caller to see: this process must not talk to an object store before it forks.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from featurize import stage
from featurize.teachers import depth_anything, oneformer, unclip  # noqa: F401  imported here once, not in every child
from olavlm.config import load_pipeline
from olavlm.data.objects import ObjectPath

torch.set_num_threads(1)  # nothing below this process may have started a thread pool when it forks
pipeline, folder, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
url = sys.argv[4] if len(sys.argv) > 4 else None


def run(name: str, kill_at: int = 0, after: bool = False) -> int:
    """Featurize into FOLDER/name in a child; returns how it ended, as os.waitpid says."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    targets = folder / name / "targets"
    count = 0

    def counted(real, is_inside):
        def wrapped(*arguments):
            nonlocal count
            inside = is_inside(*arguments)
            count += inside
            if inside and count == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if inside and count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def in_targets(_, destination):
        return Path(destination).is_relative_to(targets)

    os.link, os.replace = counted(os.link, in_targets), counted(os.replace, in_targets)
    ObjectPath._put = counted(ObjectPath._put, lambda *_: True)
    stage.Console = lambda **_: Console(quiet=True)
    store = [f"data.all.targets={url}/{name}"] if url else []
    try:
        stage.run_pipeline(load_pipeline(pipeline, [f"run_dir={folder / name}", *store]))
        (folder / f"{name}.count").write_text(str(count))
        os._exit(0)
    finally:
        os._exit(1)


def tree(name: str) -> dict[str, bytes | None]:
    root = folder / name / "targets"
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def committed(name: str) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit, and of nothing else."""
    root = folder / name / "targets"
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(root.glob("*/commits/*.parquet"))}


assert run("unbroken") == 0
whole = tree("unbroken")
total = int((folder / "unbroken.count").read_text())
for number, kill_at in enumerate(range(1, total + 1, every)):
    name, after = f"killed-{kill_at}", bool(number % 2)
    ended = run(name, kill_at, after)
    before = committed(name)
    again = run(name)
    unchanged = {path: stamp for path, stamp in committed(name).items() if path in before} == before
    print(
        json.dumps(
            {
                "kill_at": kill_at,
                "of": total,
                "killed": os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL,
                "finished": again == 0,
                "commits_untouched": unchanged,
                "differs": sorted(
                    p for p in whole.keys() | tree(name).keys() if whole.get(p, 0) != tree(name).get(p, 0)
                ),
            }
        ),
        flush=True,
    )
