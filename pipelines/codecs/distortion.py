"""What a codec costs and loses on features: bytes, CPU time, cosine, relative error, and what probes still read."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featurize.teachers.base import Teacher
from pipelines.codecs.candidates import IMAGES, Candidate, candidates
from pipelines.codecs.sources import Source, efficientnet
from pipelines.demo_world.features import Objects, in_batches, load_teachers
from pipelines.demo_world.probes import classify, r2, ridge
from pipelines.demo_world.samples import Samples, render_samples
from pipelines.demo_world.scenes import PATTERNS
from pipelines.demo_world.solids import SHAPES
from pipelines.demo_world.train_generation import objects as colours_and_shapes
from pipelines.demo_world.train_generation import patterns

WEIGHTS = Path(__file__).parents[1] / "demo_world" / "weights"
FITTED, MEASURED = 512, 256  # scenes
TIMED, RUNS = 16, 5  # images per run; the fastest run counts: what else the machine does only slows it down
#: tokens and width of the published targets.
PUBLISHED = {"depth": (576, 1024), "seg": (576, 1536), "gen": (1, 1024)}

Row = dict[str, Any]


def measure() -> list[Row]:
    """A row per source and codec: ``source``, ``codec``, ``bytes``, ``bits`` (per value), errors, times, ``probes``."""
    rows = []
    data = render_samples("gates", MEASURED)
    probes = _probes(data)
    for task, source in _demo_sources(data).items():
        rows += _measure(source, probes[task])
    pretrained = efficientnet()
    return rows + (_measure(pretrained, {}) if pretrained else [])


def time_published() -> list[Row]:
    """Bytes and times of every codec at the published sizes, on noise: both depend on shapes alone, but for zstd."""
    rows = []
    for task, (tokens, width) in PUBLISHED.items():
        noise = torch.randn(TIMED, tokens, width, generator=torch.Generator().manual_seed(0))
        for name, candidate in candidates(noise).items():
            rows.append({"source": f"{task}, {tokens} × {width}", "codec": name, **_cost(candidate, noise)})
    return rows


def errors(x: Tensor, decoded: Tensor) -> dict[str, float]:
    """Over tokens (n, tokens, width): cosine and relative error |x̂ − x| / |x|, mean and worst percentile."""
    cosine = F.cosine_similarity(x.flatten(0, 1), decoded.flatten(0, 1), dim=-1).double()
    error = ((decoded - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)).flatten().double()
    return {
        "cosine": float(cosine.mean()),
        "cosine, 1 %": float(cosine.quantile(0.01)),
        "error": float(error.mean()),
        "error, 99 %": float(error.quantile(0.99)),
    }


def _measure(source: Source, probes: dict[str, Callable[[Tensor], float]]) -> list[Row]:
    rows = []
    for name, candidate in candidates(source.fitted).items():
        decoded = candidate.decode(candidate.encode(source.measured), *source.measured.shape[1:])
        rows.append(
            {
                "source": source.name,
                "codec": name,
                **_cost(candidate, source.measured[:TIMED]),
                **errors(source.measured, decoded),
                "probes": {probe: read(decoded) for probe, read in probes.items()},
            }
        )
        print(f"codecs: {source.name}, {name}", flush=True)
    return rows


def _cost(candidate: Candidate, x: Tensor) -> dict[str, float]:
    """Bytes per image, side information included, and CPU milliseconds per image; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stored = candidate.encode(x)
        encode = _fastest(lambda: candidate.encode(x)) / len(x)
        decode = _fastest(lambda: candidate.decode(stored, *x.shape[1:])) / len(x)
    finally:
        torch.set_num_threads(threads)
    size = float(np.mean([len(row) for row in stored])) + candidate.side_bytes / IMAGES
    return {
        "bytes": size,
        "bits": 8 * size / x[0].numel(),
        "side_bytes": candidate.side_bytes,
        "encode_ms": 1000 * encode,
        "decode_ms": 1000 * decode,
    }


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def _demo_sources(data: Samples) -> dict[str, Source]:
    """The demo teachers' features: learned codecs are fitted to other scenes than the measured ones."""
    fitted = render_samples("pretrain", FITTED)
    return {
        task: Source(f"demo {task}", _encoded(teacher, fitted), _encoded(teacher, data))
        for task, teacher in load_teachers(WEIGHTS).items()
    }


def _encoded(teacher: Teacher, data: Samples) -> Tensor:
    return in_batches(lambda rows: teacher.encode(_pixels(teacher, data, rows)), data)


def _pixels(teacher: Teacher, data: Samples, rows: Any) -> Tensor:
    """Images as the teacher takes them."""
    return torch.stack([teacher.preprocess(Image.fromarray(image)) for image in data.images[rows]])


def _probes(data: Samples) -> dict[str, dict[str, Callable[[Tensor], float]]]:
    """By task: what a cross-fitted linear map reads from targets; those of the demo world's gates that have no peer."""
    objects, scene = Objects.of(data), np.arange(len(data.scenes))
    counts = np.array([colours_and_shapes(s) for s in data.scenes], np.float64)
    surfaces = np.array([patterns(s) for s in data.scenes])

    def depth(x: Tensor) -> float:
        seen = objects.seen_in(x.double().numpy())
        return r2(objects.log_depth, ridge(seen, objects.log_depth, objects.scene))

    def shape(x: Tensor) -> float:
        seen = objects.seen_in(x.double().numpy())
        return float((classify(seen, objects.shape, len(SHAPES), objects.scene) == objects.shape).mean())

    def things(x: Tensor) -> float:
        return r2(counts, ridge(x[:, 0].double().numpy(), counts, scene))

    def pattern(x: Tensor) -> float:
        return float((classify(x[:, 0].double().numpy(), surfaces, len(PATTERNS), scene) == surfaces).mean())

    return {
        "depth": {"log-depth, R²": depth},
        "seg": {"class, accuracy": shape},
        "gen": {"objects, R²": things, "patterns, accuracy": pattern},
    }
