"""What a teacher costs on this machine: parameters, memory, seconds and arithmetic per image."""

import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featurize import teachers
from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig

RUNS = 3


@dataclass(frozen=True)
class Cost:
    """A measured teacher. `memory` is what it added at its peak, in bytes of the GPU's memory or of the process's."""

    parameters: int
    tokens: int
    width: int
    memory: int
    seconds: float  # per image, median of `RUNS` passes
    gflop: float  # per image, a multiplication and an addition counted as two


def measure(config: TeacherConfig, image: Image.Image, batch: int, device: str) -> Cost:
    """Load a teacher, run it over `batch` copies of an image, and count.

    Raises:
        OlaError: see `featurize.teachers.load`.
    """
    before = _start_of_peak(device)
    teacher = teachers.load(config, device)
    pixels = torch.stack([teacher.preprocess(image)] * batch)
    features = teacher.encode(pixels)  # reads the weights
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        teacher.encode(pixels).cpu()
        times.append(time.perf_counter() - start)
    memory = _peak(device) - before
    parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
    seconds = statistics.median(times) / batch
    return Cost(parameters, features.shape[1], features.shape[2], memory, seconds, _gflop(teacher, pixels[:1]))


def _gflop(teacher: Teacher, pixels: torch.Tensor) -> float:
    """Of one forward pass; counted on shapes alone, so the teacher has no weights any more afterwards."""
    teacher.device = torch.device("meta")
    teacher.model.to(teacher.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter misses the CPU's own
        teacher.encode(pixels)
    return float(counter.get_total_flops()) / 1e9


def _start_of_peak(device: str) -> int:
    """Bytes in use; peaks are counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field of Linux's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
