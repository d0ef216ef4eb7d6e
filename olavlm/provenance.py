"""Which code, on which machine: what a number must be read with."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("olavlm", "torch", "transformers", "zarr", "pyarrow", "numpy", "pillow", "ray")


def provenance() -> dict[str, Any]:
    """The commit, package versions and machine that this process runs on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{_processor()}, {os.cpu_count()} threads, {memory:.0f} GiB"
    torch = sys.modules.get("torch")  # what has not been imported has not computed anything
    if torch and torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return {"commit": _commit(), "versions": versions, "machine": machine, "system": platform.platform()}


def peak_memory_gib() -> float:
    """The most memory in GiB that was resident in this process so far.

    Linux counts what `getrusage` tells from the process that started this one; what it tells in `status` is its own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) / 2**20
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def _commit() -> str | None:
    """The checked-out commit, with ``+`` behind it if tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
