"""Measured ratios, both sides in one run: targets read from the store against teachers inside the training step.

    features      one image's three targets, decoded: read from the store | the teachers, batched | one image at a time
    step          one optimizer step of the demo student with targets from each of the three, and without any: time, and
                  the peak memory of a process that does only that
    loaders       our loader | bare reading | other loaders, on samples of the published size (`pipelines.loaders`)
    operations    of a pretraining step of Llama-3-8B's shape, with embedding losses and without; counted, not run
    scenes        how many the demo world renders per second and core, at each level
    featurizing   a worker | the published way | Ray Data | a bare forward; by number of tars (`pipelines.throughput`)
    full size     (--full-size) the published teachers, random weights, one image | reading a stored row of that size

"One image at a time" is how the published code runs its teachers inside the step.
"""

import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from featurize import teachers
from featurize.stage import run_pipeline
from featurize.teachers.base import Teacher
from featurize.teachers.published import write_random
from olavlm import runs
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data import codec
from olavlm.data.atomic import replace
from olavlm.data.commit import TarWriter
from olavlm.data.images import decode_image
from olavlm.data.targets import TargetStore
from olavlm.model.configuration import parse_tasks
from olavlm.model.distill import EmbeddingStack
from olavlm.provenance import peak_memory_gib, provenance
from pipelines import corpus as corpora
from pipelines import loaders, throughput
from pipelines.demo_world.processes import scenes_per_second
from pipelines.demo_world.scenes import LEVELS
from train import stage, student
from train.distributed import World
from train.loader import Loader, MicroBatch, Targets
from train.order import Ints
from train.snapshot import Snapshot
from train.step import Objective, accumulate, stored

RUNS = 7  # of each side, taken in turn; the median is reported
BATCH = 32


def bench(full_size: bool) -> dict[str, Any]:
    """Run the benchmarks, print them, and keep them in ``runs/bench/bench.json``.

    Args:
        full_size: also time the published sizes; takes some 6 GB of memory and a minute.
    """
    sizes = [f"data.{name}.source.scenes={n}" for name, n in {"pretrain": 256, "finetune": 32, "probe": 32}.items()]
    config = load_pipeline("demo", ["run_dir=runs/bench", "eval=null", "featurize.executor=inprocess", *sizes])
    corpora.build(config)
    run_pipeline(config)
    parts: dict[str, Callable[[], Any]] = {
        "demo_scale": lambda: _demo_scale(config),
        "memory_mib": lambda: _memory(config),
        "loaders": lambda: loaders.loaders(Path("runs/bench/loaders")),
        "operations": _operations,
        "scenes_per_second": lambda: {name: scenes_per_second(level) for name, level in LEVELS.items()},
        "throughput": lambda: throughput.throughput(Path("runs/bench")),
    }
    if full_size:
        parts["full_size"] = _full_size
    result: dict[str, Any] = {**provenance(), "runs": RUNS, "batch": BATCH}
    for name, measure in parts.items():
        result[name] = measure()
        replace(Path("runs/bench/bench.json"), json.dumps(result, indent=2).encode())  # whatever becomes of the rest
    _print(result)
    return result


class Online:
    """Targets from the teachers, computed inside the step from the same images that the store was made from."""

    def __init__(self, loaded: dict[str, Teacher], snapshot: Snapshot, batch: int):
        self._teachers, self._snapshot, self._batch = loaded, snapshot, batch
        self.samples: Ints = np.empty(0, np.int64)  # of the micro-batch that is about to be trained on

    def __call__(self, batch: MicroBatch) -> dict[str, Targets]:
        """Features of every image of `samples`; `batch` images a forward pass."""
        pictures = []
        for number in self.samples:
            sample = self._snapshot.sample(int(number))
            for image in sample.images:
                data = self._snapshot.corpora[sample.data].read(sample.tar, image.offset, image.bytes)
                pictures.append(decode_image(data))
        valid = torch.ones(len(pictures), dtype=torch.bool)
        found = {}
        for task, teacher in self._teachers.items():
            chunks = [pictures[i : i + self._batch] for i in range(0, len(pictures), self._batch)]
            features = [teacher.encode(torch.stack([teacher.preprocess(p) for p in chunk])) for chunk in chunks]
            found[task] = Targets(torch.cat(features).clone(), None, valid, "fp16")
        return found


def _demo_scale(config: PipelineConfig) -> dict[str, Any]:
    """`features` and `step` at the demo's size."""
    sides = _sides(config)
    loss_gap = abs(sides["step/stored"]() - sides["step/online, batched"]())
    return {"seconds": _in_turn(sides), "loss_gap": loss_gap}


def _memory(config: PipelineConfig) -> dict[str, float]:
    """Peak resident MiB of a process of its own for each way to make a step."""
    names = ("step/no embedding loss", "step/stored", "step/online, batched", "step/online, one by one")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return {name: pool.submit(_peak, config, name).result() for name in names}


def _peak(config: PipelineConfig, name: str) -> float:
    side = _sides(config, online="online" in name)[name]
    for _ in range(3):
        side()
    return 2**10 * peak_memory_gib()


def _sides(config: PipelineConfig, online: bool = True) -> dict[str, Callable[[], Any]]:
    """What is measured at the demo's size, each ready to run; teachers are loaded for those online only."""
    settings = student.stage_config(config, "pretrain")
    tasks = tuple(settings.losses)
    world = World.join()
    request = stage.request("pretrain", settings, tasks)
    snapshot = stage.open_snapshot(runs.stage_dir(config, "pretrain"), config, request, world)
    model, processor = student.start(config, "pretrain")
    parts = student.prepare(model, settings, world.device)
    parameters = [p for pairs in parts.values() for _, p in pairs]
    samples = stage.order_of(snapshot, "pretrain", settings, config.seed).batch(0)[:BATCH]
    loader = Loader(snapshot, processor, list(tasks), settings.max_length, range(1), lambda _: [samples], 1)
    loaded = {task: teachers.load(config.teachers[task]) for task in tasks} if online else {}
    batched, single = Online(loaded, snapshot, BATCH), Online(loaded, snapshot, 1)
    batched.samples = single.samples = samples
    batch = loader.read(samples)

    def read() -> dict[str, torch.Tensor]:
        used = [(s, i) for s in map(snapshot.sample, map(int, samples)) for i in s.images]
        return {task: loader.read_targets(task, used).features() for task in tasks}

    def step(weights: dict[str, float], source: Callable[[MicroBatch], dict[str, Targets]], names: list[str]) -> float:
        reader = Loader(snapshot, processor, names, settings.max_length, range(1), lambda _: [samples], 1)
        terms, _ = accumulate(model, [reader.read(samples)], Objective(weights, targets=source), world)
        for parameter in parameters:
            parameter.grad = None
        return float(terms["loss"])

    losses = dict(settings.losses)
    return {
        "features/stored": read,
        "features/online, batched": lambda: batched(batch),
        "features/online, one by one": lambda: single(batch),
        "step/no embedding loss": lambda: step({}, stored, []),
        "step/stored": lambda: step(losses, stored, list(tasks)),
        "step/online, batched": lambda: step(losses, batched, []),
        "step/online, one by one": lambda: step(losses, single, []),
    }


def _in_turn(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each side; one run of each after the other, so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(RUNS):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _operations() -> dict[str, float]:
    """Floating-point operations, per image, of a pretraining step's forward and backward pass at Llama-3-8B's shape.

    One image of 576 tokens and 64 of text; InfoNCE among 256 targets. The vision tower, whose cost is the same with
    and without, is left out, so that the ratio is rather too high.
    """
    config = load_pipeline("llava558k-llama3-8b")
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    tasks = parse_tasks(student.tasks(config), shape.hidden_size, shape.num_hidden_layers)
    stack = EmbeddingStack()
    with torch.device("meta"):
        language = LlamaForCausalLM(shape).requires_grad_(False)
        stack.add_stack(tasks, shape.hidden_size, config.student.predictors_read_text)

    def text(tokens: int) -> None:
        embeddings = torch.empty(1, tokens, shape.hidden_size, device="meta", requires_grad=True)
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")  # a ready one: none is looked into
        output = language(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, logits_to_keep=64)
        output.logits.sum().backward()

    def losses(tokens: int) -> None:
        mask = torch.ones(1, tokens, dtype=torch.bool, device="meta")
        for task in tasks:
            for predictor in cast(Any, stack.predictors[task.name]).values():
                hidden = torch.empty(1, tokens, shape.hidden_size, device="meta", requires_grad=True)
                prediction = predictor(hidden, mask, stack.task_tokens[task.name][None])
                candidates = torch.empty(256, prediction[0].numel(), device="meta")
                torch.nn.functional.linear(prediction.flatten(1), candidates).sum().backward()  # type: ignore[no-untyped-call]

    plain, inserted = config.student.image_tokens or 576, sum(task.task_tokens for task in tasks)
    plain += 64
    counts = {}
    for name, run in (
        ("text", partial(text, plain)),
        ("text, with task tokens", partial(text, plain + inserted)),
        ("embedding losses", partial(losses, plain + inserted)),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts[name] = float(counter.get_total_flops())
    return counts


def _full_size() -> dict[str, Any]:
    """Seconds of one image through each published teacher (random weights), and of reading a row of that size."""
    published = load_pipeline("llava558k-llama3-8b")
    found: dict[str, Any] = {}
    image = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)
    folder = Path(tempfile.mkdtemp(prefix="full-size-", dir="runs/bench"))
    try:
        for task, stated in published.teachers.items():
            weights = folder / task
            write_random(stated.weights, weights)
            config = stated.model_copy(update={"weights": str(weights), "dtype": "float32"})
            teacher = teachers.load(config)
            picture = Image.fromarray(image.numpy())
            features = teacher.encode(teacher.preprocess(picture)[None])  # the first pass loads the weights
            start = time.perf_counter()
            features = teacher.encode(teacher.preprocess(picture)[None])
            forward = time.perf_counter() - start
            found[task] = {
                "tokens": features.shape[1],
                "width": features.shape[2],
                "parameters": sum(p.numel() for p in teacher.model.parameters()),
                "teacher_s": forward,
                "stored_s": _read_row(folder / "store", teacher, task, features),
            }
            del teacher
            shutil.rmtree(weights)
    finally:
        shutil.rmtree(folder)
    return found


def _read_row(path: Path, teacher: Teacher, task: str, features: torch.Tensor) -> float:
    """Median seconds of reading, checking and decoding a row like `features` from a store."""
    target = TargetStore.create(path, "bench").add(teacher.identity(task), block=256)
    tar = _Tar("bench", "bench")
    writer = TarWriter.open(target, tar, range(1))
    assert writer is not None, "a fresh store is nobody's"
    with writer:
        for row in range(64):
            values, scales = codec.encode(features, target.identity.codec)
            writer.add(f"{row}", 0, f"{row}", values[0], None if scales is None else scales[0], 1.0, 1.0)
        writer.commit()
    commit = target.commit(tar)
    assert commit is not None, "just committed"
    times = []
    for row in commit.to_pylist():
        start = time.perf_counter()
        values, scales = target.read(row, row["key"])
        decoded = None if scales is None else torch.from_numpy(scales.copy())
        codec.decode(torch.from_numpy(values.copy()), decoded, target.identity.codec)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class _Tar:
    name: str
    hash: str


def _print(result: dict[str, Any]) -> None:
    """The ratios as tables."""
    console = Console()
    console.print(result["machine"], highlight=False)
    seconds, gap = result["demo_scale"]["seconds"], result["demo_scale"]["loss_gap"]
    for part, base in (("features", "features/stored"), ("step", "step/stored")):
        table = Table(part, "ms / image", f"× {base}", title=f"demo size, batch of {result['batch']}")
        for name, value in seconds.items():
            if name.startswith(part):
                table.add_row(name, f"{1e3 * value / result['batch']:.2f}", f"{value / seconds[base]:.2f}")
        console.print(table)
    console.print(f"loss with stored targets and with teachers online differs by {gap:.1e} (int8)")
    peaks = ", ".join(f"{name.partition('/')[2]}: {mib:.0f}" for name, mib in result["memory_mib"].items())
    console.print(f"peak memory of a process that makes such steps, MiB: {peaks}", highlight=False)
    loaders.show(result["loaders"], console)
    counts = result["operations"]
    more = (counts["text, with task tokens"] + counts["embedding losses"]) / counts["text"] - 1
    own = counts["embedding losses"] / counts["text"]
    console.print(
        f"operations of embedding losses at Llama-3-8B's shape: +{own:.1%} of a step without, +{more:.1%} with those "
        "of the task tokens in the sequence",
        highlight=False,
    )
    rendered = ", ".join(f"{level}: {rate:.0f}" for level, rate in result["scenes_per_second"].items())
    console.print(f"scenes rendered per second of one core: {rendered}")
    throughput.show(result["throughput"], console)
    if "full_size" in result:
        columns = ("published teacher", "parameters", "target", "forward, s", "stored row, ms", "ratio")
        table = Table(*columns, title="published size, one image")
        for task, row in result["full_size"].items():
            table.add_row(
                task,
                f"{row['parameters'] / 1e6:.0f} M",
                f"{row['tokens']} × {row['width']}",
                f"{row['teacher_s']:.2f}",
                f"{1e3 * row['stored_s']:.2f}",
                f"{row['teacher_s'] / row['stored_s']:,.0f}",
            )
        console.print(table)
