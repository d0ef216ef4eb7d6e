"""Per-layer probes: how well a teacher's feature can be read from each layer of a frozen student.

For every layer and task one plain embedding predictor (latents of its own, no task tokens) is trained with smooth-L1 on
stored targets, and judged by the mean cosine of the flattened prediction to the target on held-out images. All layers
and tasks share one forward pass. The published probes train and evaluate against different targets and sequence
layouts; here both are the student's own layout and the very same targets, the held-out images are
the same for every student.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from olavlm import runs
from olavlm.config import PipelineConfig, ProbeConfig
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.model import EmbeddingPredictor, OlaVlmForConditionalGeneration, cosine, find_images, smooth_l1
from train import student
from train.distributed import World
from train.loader import Loader, MicroBatch
from train.order import Ints, Order, permute
from train.snapshot import Request, Snapshot
from train.step import fed_features, learning_rate

#: Smooth-L1 only, as published; warm-up as in the stages.
_WARMUP = 0.03
_THREADS = 2

Predictors = dict[str, dict[str, EmbeddingPredictor]]  # task → layer → predictor
Cosines = dict[str, dict[str, float]]  # task → layer → mean cosine on the held-out images


def probe(config: PipelineConfig) -> None:
    """Probe every student of ``probe.students`` and write ``probe/probe.json``; students done before are kept.

    Raises:
        OlaError: no `probe` section, a student that is not trained yet, missing targets.
    """
    settings = config.probe
    if settings is None:
        raise OlaError("probe: this pipeline has no probe section")
    world = World.join()
    if world.size > 1:
        raise OlaError("probe: runs on one process; start it with python, not torchrun")
    folder = runs.stage_dir(config, "probe")
    if runs.begin(folder, runs.depends_on(config, "probe")):
        Console().print(f"probe: finished already, see {folder / 'done.json'}")
        return
    allow, missing = settings.allow_view_mismatch, settings.max_missing
    tasks, encoders = tuple(settings.tasks), tuple(config.student.encoders)
    request = Request("probe", (settings.data,), tasks, settings.view, allow, missing, encoders)
    snapshot = Snapshot.open(folder, config, request)
    train, held_out = split(sum(snapshot.sizes), settings.held_out, config.seed)
    file = folder / "probe.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"students": {}, "floor": {}}
    for name in settings.students:
        if name not in result["students"]:
            cosines, floor = _probe_student(config, settings, name, snapshot, train, held_out, world.device)
            result["students"][name], result["floor"] = cosines, floor
            result["held_out"] = len(held_out)
            replace(file, json.dumps(result, indent=2).encode())
    _print(result)
    runs.finish(folder, result)


def split(samples: int, held_out: float, seed: int) -> tuple[Ints, Ints]:
    """Disjoint training and held-out samples; a function of the arguments only."""
    shuffled = permute(np.arange(samples, dtype=np.int64), samples, seed, "held-out")
    count = min(max(round(held_out * samples), 1), samples - 1)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _probe_student(
    config: PipelineConfig,
    settings: ProbeConfig,
    name: str,
    snapshot: Snapshot,
    train: Ints,
    held_out: Ints,
    device: torch.device,
) -> tuple[Cosines, dict[str, float]]:
    """The cosines of one student by task and layer, and the cosine of predicting the mean target by task."""
    dtype = student.DTYPES[next(iter(config.stages.values())).dtype]
    if name == "initial":
        model, processor = student.create(config, dtype)
    else:
        model, processor = student.load(runs.stage_dir(config, name) / "model", dtype)
    processor.view = settings.view
    model.eval().requires_grad_(False).to(device)  # type: ignore[no-untyped-call]
    text: Any = model.config.text_config
    depth = text.num_hidden_layers
    layers = settings.layers or list(range(1, depth + 1))
    if max(layers) > depth:
        raise OlaError(f"probe.layers: {max(layers)}; the student {name} has {depth} layers")
    predictors = _predictors(config, settings, layers, text.hidden_size, device)
    parameters = [p for of_task in predictors.values() for m in of_task.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    means = {task: _Mean() for task in settings.tasks}

    read = list(snapshot.tasks)
    order = Order((len(train),), (len(train),), config.seed, settings.batch)
    steps = range(settings.steps)
    loader = Loader(snapshot, processor, read, settings.max_length, steps, lambda s: [train[order.batch(s)]], _THREADS)
    with closing(iter(loader)) as fetched:
        for step, (batch,) in zip(track(steps, f"probe {name}"), fetched, strict=True):
            batch = batch.each(lambda t: t.to(device))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * learning_rate(step, settings.steps, _WARMUP)
            loss = torch.zeros((), device=device)
            for task, _, prediction in _predict(model, predictors, batch, config):
                of_task = batch.targets[task]
                loss = loss + smooth_l1(prediction, of_task.features(), of_task.valid, int(of_task.valid.sum()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for task, mean in means.items():
                mean.add(batch.targets[task].features()[batch.targets[task].valid])

    chunks = [held_out[i : i + settings.batch] for i in range(0, len(held_out), settings.batch)]
    loader = Loader(snapshot, processor, read, settings.max_length, range(len(chunks)), lambda s: [chunks[s]], _THREADS)
    found: dict[str, dict[str, _Mean]] = {task: {str(layer): _Mean() for layer in layers} for task in settings.tasks}
    floor = {task: _Mean() for task in settings.tasks}
    with torch.no_grad(), closing(iter(loader)) as fetched:
        for (batch,) in fetched:
            batch = batch.each(lambda t: t.to(device))
            for task, layer, prediction in _predict(model, predictors, batch, config):
                of_task = batch.targets[task]
                found[task][layer].add(cosine(prediction, of_task.features())[of_task.valid])
            for task in settings.tasks:
                of_task = batch.targets[task]
                targets = of_task.features()[of_task.valid]
                floor[task].add(cosine(means[task].value().expand_as(targets), targets))
    cosines = {task: {layer: float(mean.value()) for layer, mean in of.items()} for task, of in found.items()}
    return cosines, {task: float(mean.value()) for task, mean in floor.items()}


def _predictors(
    config: PipelineConfig, settings: ProbeConfig, layers: list[int], hidden: int, device: torch.device
) -> Predictors:
    """task → layer → predictor; initialised alike for every student of the same width."""
    made: Predictors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for task in settings.tasks:
            teacher = config.teachers[task]
            dim = config.student.dims.get(task, teacher.width)
            made[task] = {
                str(layer): EmbeddingPredictor(hidden, dim, teacher.width, teacher.tokens, task == "depth").to(device)
                for layer in layers
            }
    return made


def _predict(
    model: OlaVlmForConditionalGeneration, predictors: Predictors, batch: MicroBatch, config: PipelineConfig
) -> Iterator[tuple[str, str, Tensor]]:
    """Every predictor's output as (task, layer, (n, queries, width)), after one forward pass of the frozen student.

    Predictors read the image and, as the pipeline says, the text; task tokens and features that are fed are in the
    sequence but not among their keys, so that students with and without them are probed at the same places.
    """
    layers = {int(layer) for of_task in predictors.values() for layer in of_task}
    with torch.no_grad(), model.capture(layers) as hidden:
        pixel_values = batch.pixel_values.to(model.dtype) if len(batch.pixel_values) else None
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=pixel_values,
            encoder_features=fed_features(model, batch.targets),
            logits_to_keep=1,
        )
    layout = find_images(batch.input_ids, model.config)
    keys = layout.key_mask(batch.attention_mask, None, config.student.predictors_read_text)
    for task, of_task in predictors.items():
        for layer, predictor in of_task.items():
            yield task, layer, predictor(layout.rows(hidden[int(layer)]), keys)


class _Mean:
    """A running mean over the first axis."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        total = rows.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    def value(self) -> Tensor:
        """The mean; NaN before the first row."""
        if self._sum is None or not self._count:
            return torch.tensor(torch.nan)
        return (self._sum / self._count).float()


def _print(result: dict[str, Any]) -> None:
    """The cosines as one table per task."""
    for task, floor in result["floor"].items():
        layers = list(next(iter(result["students"].values()))[task])
        title = f"{task}: cosine to the target (of the mean target: {floor:.3f})"
        table = Table("student", *(f"layer {layer}" for layer in layers), title=title)
        for name, cosines in result["students"].items():
            table.add_row(name, *(f"{cosines[task][layer]:.3f}" for layer in layers))
        Console().print(table)
