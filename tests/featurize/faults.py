"""What goes wrong inside Ray's workers in test_faults: loaded by each (Ray's ``worker_process_setup_hook``).

A fault is a file in the folder OLAVLM_FAULTS names. ``oom`` and ``stop`` happen once, to whoever removes the file;
``nan`` happens for as long as it is there.
"""

import os
import signal
from pathlib import Path

import torch

from featurize.teachers.unclip import UnClip

encode = UnClip.encode


def faulty(self: UnClip, pixels: torch.Tensor) -> torch.Tensor:
    """A teacher's forward pass in which something goes wrong."""
    faults = Path(os.environ["OLAVLM_FAULTS"])
    if _once(faults / "oom"):
        raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
    if _once(faults / "stop"):
        (faults / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    features = encode(self, pixels)
    if (faults / "nan").exists():
        features = features.clone()
        features[1] = torch.nan
    return features


def _once(fault: Path) -> bool:
    try:
        fault.unlink()
    except FileNotFoundError:
        return False
    return True


def arm() -> None:
    """Make the teacher faulty in this process."""
    UnClip.encode = faulty
