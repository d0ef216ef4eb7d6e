"""Per-layer probes: how well a teacher's feature can be read from each layer of a frozen student.

For every layer and task one plain embedding predictor (latents of its own, no task tokens) is trained with smooth-L1 on
stored targets, and judged by the cosine of the flattened prediction to the target on held-out images. All layers and
tasks share one forward pass; the held-out images are the same for every student, so that students are compared image by
image.

The published probes train and evaluate against different targets and sequence layouts. Here every image stands in one
and the same sequence, in training, on the held-out images and in the probe tasks: the image and `REQUEST`. What the
corpus says of it is not read: a caption names what is in the image, and a probe that reads it need not see.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from olavlm import runs
from olavlm.config import PipelineConfig, ProbeConfig
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.bootstrap import LEVEL, RESAMPLES, Estimate, bootstrap_mean
from olavlm.model import (
    EmbeddingPredictor,
    OlaVlmForConditionalGeneration,
    OlaVlmProcessor,
    cosine,
    find_images,
    smooth_l1,
)
from train import student
from train.distributed import World
from train.loader import Loader
from train.order import Ints, Order, permute
from train.snapshot import Request, Snapshot
from train.step import fed_features, learning_rate

#: What is asked of every image; the predictors read it or not, as the pipeline says.
REQUEST = "Describe the image."

COSINES = pa.schema(
    [
        ("student", pa.string()),
        ("task", pa.string()),
        ("layer", pa.int32()),
        ("key", pa.string()),  # tar, sample and image: ``000000.tar/demo-000012.0``
        ("cosine", pa.float32()),
    ]
)

#: Smooth-L1 only, as published; warm-up as in the stages.
_WARMUP = 0.03
_THREADS = 2

Predictors = dict[str, dict[str, EmbeddingPredictor]]  # task → layer → predictor


def probe(config: PipelineConfig) -> None:
    """Probe every student of ``probe.students``; those done before are kept.

    In ``probe/``: ``probe.json`` (means with intervals), ``cosines.parquet`` (every held-out image), the trained
    ``predictors/<student>/<task>-<layer>.safetensors``, and ``mean.safetensors``, the mean target of each task.

    Raises:
        OlaError: no `probe` section, a student that is not trained yet, or not as configured, or not of the others'
            kind, missing targets; somebody else probes.
    """
    settings = _settings(config)
    world = World.join()
    if world.size > 1:
        raise OlaError("probe: runs on one process; start it with python, not torchrun")
    for name in settings.students:
        if name != "initial":
            _model_folder(config, name)  # before anything is written
    folder = runs.stage_dir(config, "probe")
    with world.alone(folder):
        if runs.begin(folder, runs.depends_on(config, "probe")):
            Console().print(f"probe: finished already, see {folder / 'done.json'}")
            return
        _probe(config, settings, folder, world.device)


def _probe(config: PipelineConfig, settings: ProbeConfig, folder: Path, device: torch.device) -> None:
    """Every student that ``probe.json`` does not name yet."""
    allow, missing = settings.allow_view_mismatch, settings.max_missing
    tasks, encoders = tuple(settings.tasks), tuple(config.student.encoders)
    request = Request("probe", (settings.data,), tasks, settings.view, allow, missing, encoders)
    snapshot = Snapshot.open(folder, config, request)
    file, table = folder / "probe.json", folder / "cosines.parquet"
    result: dict[str, Any] = {"students": {}, "floor": {}}
    if file.exists():
        result = json.loads(file.read_text())
    for name in settings.students:
        if name in result["students"]:
            continue
        found = _probe_student(config, settings, name, snapshot, device, result)
        rows = [pq.read_table(table)] if table.exists() else []
        known = [of.filter(pc.is_in(of["student"], pa.array([*result["students"]], pa.string()))) for of in rows]
        replace(table, _parquet(pa.concat_tables([*known, found.cosines])))
        result["students"][name] = _means(found.cosines)
        result["floor"] = {task: asdict(bootstrap_mean(values)) for task, values in found.floor.items()}
        result |= {"held_out": found.held_out, "resamples": RESAMPLES, "level": LEVEL}
        replace(file, json.dumps(result, indent=2).encode())  # last: a student that it does not name is probed again
    _print(result, pq.read_table(table))
    runs.finish(folder, result)


def split(samples: int, held_out: float, seed: int) -> tuple[Ints, Ints]:
    """Disjoint training and held-out samples; a function of the arguments only."""
    shuffled = permute(np.arange(samples, dtype=np.int64), samples, seed, "held-out")
    count = min(max(round(held_out * samples), 1), samples - 1)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


@dataclass(frozen=True)
class Probed:
    """A frozen student, and a predictor for every layer and task that is probed."""

    model: OlaVlmForConditionalGeneration
    processor: OlaVlmProcessor
    predictors: Predictors
    read_text: bool
    request: Tensor  # (1, L) int64, what every image stands in

    @classmethod
    def create(cls, config: PipelineConfig, name: str, device: torch.device) -> "Probed":
        """A student of ``probe.students`` with untrained predictors, alike for every student.

        Raises:
            OlaError: no such student, or one that cannot stand beside the others: it has other widths or layers, is fed
                other features, or predicts a task in another shape than this pipeline's teacher.
        """
        settings = _settings(config)
        model, processor = _open_student(config, name)
        processor.view = settings.view
        model.eval().requires_grad_(False).to(device)  # type: ignore[no-untyped-call]
        depth = model.config.llm.num_hidden_layers
        layers = settings.layers or list(range(1, depth + 1))
        if max(layers) > depth:
            raise OlaError(f"probe.layers: {max(layers)}; the student {name} has {depth} layers")
        predictors: Predictors = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for task in settings.tasks:
                teacher = config.teachers[task]
                dim = config.student.dims.get(task, teacher.width)
                shape = (model.config.llm.hidden_size, dim, teacher.width, teacher.tokens, task == "depth")
                predictors[task] = {str(layer): EmbeddingPredictor(*shape).to(device) for layer in layers}
        text = processor.prompt([{"from": "human", "value": f"<image>\n{REQUEST}"}])
        request = processor(images=[Image.new("RGB", (1, 1))], text=[text])["input_ids"].to(device)
        return cls(model, processor, predictors, config.student.predictors_read_text, request)

    @classmethod
    def load(cls, config: PipelineConfig, name: str, device: torch.device) -> "Probed":
        """A student whose probes are trained. Raises as `create`, and if they are not, or were of another student."""
        probed = cls.create(config, name, device)
        for task, layer, predictor in probed._each():
            file = _predictor_file(config, name, task, layer)
            if not file.is_file():
                raise OlaError(f"{file}: no trained probe of {name} there; run the probe stage first")
            try:
                predictor.load_state_dict(load_file(file, str(device)))
            except RuntimeError as error:
                raise OlaError(f"{file}: not a probe of the student {name}: {str(error).splitlines()[-1]}") from None
            predictor.requires_grad_(False)
        return probed

    def save(self, config: PipelineConfig, name: str) -> None:
        """Write the predictors, each to a file of its own."""
        for task, layer, predictor in self._each():
            replace(_predictor_file(config, name, task, layer), save(predictor.state_dict()))

    def predict(self, pixel_values: Tensor, fed: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """Every predictor's output as (task, layer, (n, queries, width)), after one forward pass; none for no image.

        Task tokens, and features that are fed, are in the sequence but not among the predictors' keys, so that students
        with and without them are probed at the same places.

        Args:
            pixel_values: (n, 3, S, S), as the processor makes them, on the device.
            fed: encoder → (n, tokens, width) features, for a student with encoders.
        """
        if not len(pixel_values):
            return
        ids = self.request.expand(len(pixel_values), -1)
        layers = {int(layer) for of_task in self.predictors.values() for layer in of_task}
        with torch.no_grad(), self.model.capture(layers) as hidden:
            self.model(
                input_ids=ids,
                pixel_values=pixel_values.to(self.model.dtype),
                encoder_features=dict(fed),
                logits_to_keep=1,
            )
        layout = find_images(ids, self.model.config)
        keys = layout.key_mask(None, None, self.read_text)
        for task, layer, predictor in self._each():
            yield task, layer, predictor(layout.rows(hidden[int(layer)]), keys)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those of the predictors."""
        for _, _, predictor in self._each():
            yield from predictor.parameters()

    def _each(self) -> Iterator[tuple[str, str, EmbeddingPredictor]]:
        for task, of_task in self.predictors.items():
            for layer, predictor in of_task.items():
                yield task, layer, predictor


def mean_targets(config: PipelineConfig) -> dict[str, Tensor]:
    """The mean target of the images that the probes were trained on: task → (tokens, width) float32.

    Raises:
        OlaError: nothing has been probed.
    """
    file = runs.stage_dir(config, "probe") / "mean.safetensors"
    if not file.is_file():
        raise OlaError(f"{file}: missing; run the probe stage first")
    return load_file(file)


@dataclass(frozen=True)
class _Found:
    """What probing one student gives."""

    cosines: pa.Table  # as `COSINES`
    floor: dict[str, list[float]]  # task → cosine of the mean target to every held-out image's
    held_out: int


def _probe_student(
    config: PipelineConfig,
    settings: ProbeConfig,
    name: str,
    snapshot: Snapshot,
    device: torch.device,
    before: Mapping[str, Any],
) -> _Found:
    """Train one student's probes, keep them, and judge them on the held-out images; `before` is what probe.json has."""
    probed = Probed.create(config, name, device)
    _check_alike(config, probed, name, before["students"])
    train, held_out = split(sum(snapshot.sizes), settings.held_out, config.seed)
    optimizer = torch.optim.AdamW(probed.parameters(), lr=settings.lr, weight_decay=0.0)
    means = {task: _Mean() for task in settings.tasks}

    def load(steps: range, share: Any) -> Loader:
        read, length = list(snapshot.tasks), settings.max_length + len(probed.processor.image_block)
        return Loader(snapshot, probed.processor, read, length, steps, lambda s: [share(s)], _THREADS)

    order = Order((len(train),), (len(train),), config.seed, settings.batch)
    steps = range(settings.steps)
    with closing(iter(load(steps, lambda s: train[order.batch(s)]))) as fetched:
        for step, (batch,) in zip(track(steps, f"probe {name}"), fetched, strict=True):
            batch = batch.each(lambda t: t.to(device))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * learning_rate(step, settings.steps, _WARMUP)
            losses = []
            for task, _, prediction in probed.predict(batch.pixel_values, fed_features(probed.model, batch.targets)):
                of_task = batch.targets[task]
                losses.append(smooth_l1(prediction, of_task.features(), of_task.valid, int(of_task.valid.sum())))
            if not losses:  # samples without an image
                continue
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for task, mean in means.items():
                mean.add(batch.targets[task].features()[batch.targets[task].valid])
    probed.save(config, name)
    floor = {task: mean.value(task) for task, mean in means.items()}
    replace(runs.stage_dir(config, "probe") / "mean.safetensors", save({t: m.cpu() for t, m in floor.items()}))

    chunks = [held_out[i : i + settings.batch] for i in range(0, len(held_out), settings.batch)]
    rows: dict[str, list[Any]] = {column: [] for column in COSINES.names}
    of_floor: dict[str, list[float]] = {task: [] for task in settings.tasks}
    with torch.no_grad(), closing(iter(load(range(len(chunks)), lambda s: chunks[s]))) as fetched:
        for chunk, (batch,) in zip(chunks, fetched, strict=True):
            images = find_images(batch.input_ids, probed.model.config).row.tolist()
            keys = np.array(_names(snapshot, chunk, images), object)
            batch = batch.each(lambda t: t.to(device))
            for task, layer, prediction in probed.predict(
                batch.pixel_values, fed_features(probed.model, batch.targets)
            ):
                of_task = batch.targets[task]
                values = cosine(prediction, of_task.features())[of_task.valid].tolist()
                found = name, task, int(layer)
                for column, value in zip(COSINES.names[:3], found, strict=True):
                    rows[column] += [value] * len(values)
                rows["key"] += keys[of_task.valid.cpu().numpy()].tolist()
                rows["cosine"] += values
            for task, mean_target in floor.items():
                of_task = batch.targets[task]
                targets = of_task.features()[of_task.valid]
                of_floor[task] += cosine(mean_target.expand_as(targets), targets).tolist()
    for task, values in of_floor.items():
        if not values:
            raise OlaError(f"probe.held_out: none of the {len(held_out)} held-out samples has a {task} target")
    return _Found(pa.table(rows, COSINES), of_floor, len(held_out))


def _settings(config: PipelineConfig) -> ProbeConfig:
    if config.probe is None:
        raise OlaError("probe: this pipeline has no probe section")
    return config.probe


def _open_student(config: PipelineConfig, name: str) -> student.Student:
    """A student by name, checked to be of the same kind as the pipeline's own."""
    dtype = student.DTYPES[next(iter(config.stages.values())).dtype]
    if name == "initial":
        return student.create(config, dtype)
    folder = _model_folder(config, name)
    model, processor = student.load(folder, dtype)
    if model.config.encoders != student.encoders(config):
        raise OlaError(f"student.encoders: {student.encoders(config)}; {folder} is fed {model.config.encoders}")
    for task in model.config.task_configs:
        teacher = config.teachers.get(task.name)
        if teacher and task.layers and (task.queries, task.width) != (teacher.tokens, teacher.width):
            raise OlaError(
                f"{folder}: predicts {task.name} as {task.queries} tokens of width {task.width}, teachers.{task.name} "
                f"gives {teacher.tokens} of width {teacher.width}"
            )
    return model, processor


def _model_folder(config: PipelineConfig, name: str) -> Path:
    """Where a student's model is.

    Raises:
        OlaError: neither a model folder nor a stage that has finished with this configuration.
    """
    if name in dict(config.stages):
        return runs.require(config, name) / "model"
    if not (Path(name) / "config.json").is_file():
        known = ", ".join(["initial", *config.stages])
        raise OlaError(f"probe.students: {name!r} is no model folder (config.json is missing) and none of {known}")
    return Path(name)


def _check_alike(config: PipelineConfig, probed: Probed, name: str, students: Mapping[str, Any]) -> None:
    """Raise unless a student has as many layers, and as wide ones, as the first of those that were probed before."""
    for other, of_task in [*students.items()][:1]:
        task, _, predictor = next(probed._each())
        with safe_open(_predictor_file(config, other, task, next(iter(of_task[task]))), "pt") as opened:
            theirs = len(of_task[task]), opened.get_slice("project_in.weight").get_shape()[1]
        own = len(probed.predictors[task]), predictor.project_in.in_features
        if own != theirs:
            raise OlaError(
                f"probe.students: {name} has {own[0]} layers of width {own[1]} to probe, {other} {theirs[0]} of width "
                f"{theirs[1]}; students side by side are alike in both"
            )


def _predictor_file(config: PipelineConfig, name: str, task: str, layer: str) -> Path:
    """Where a trained predictor lies; a model folder's path becomes one name."""
    return runs.stage_dir(config, "probe") / "predictors" / quote(name, safe="") / f"{task}-{layer}.safetensors"


def _names(snapshot: Snapshot, samples: Ints, rows: list[int]) -> list[str]:
    """The keys of a batch's images, given which of its samples each one is of."""
    names = []
    for row, number in enumerate(samples):
        sample = snapshot.sample(int(number))
        names += [f"{sample.tar.name}/{sample.key}.{image.index}" for image in sample.images[: rows.count(row)]]
    return names


class _Mean:
    """A running mean over the first axis."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, rows: Tensor) -> None:
        total = rows.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    def value(self, task: str) -> Tensor:
        """The mean, float32."""
        if self._sum is None or not self._count:
            raise OlaError(f"probe.data: none of the samples that probes are trained on has a {task} target")
        return (self._sum / self._count).float()


def _means(cosines: pa.Table) -> dict[str, dict[str, dict[str, float]]]:
    """task → layer → the mean over images with its interval."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for task, layer in _cells(cosines):
        values = cosines.filter((pc.field("task") == task) & (pc.field("layer") == layer))["cosine"].to_numpy()
        means.setdefault(task, {})[str(layer)] = asdict(bootstrap_mean(values))
    return means


def _cells(cosines: pa.Table) -> list[tuple[str, int]]:
    """Tasks and layers, in the table's order."""
    pairs = zip(cosines["task"].to_pylist(), cosines["layer"].to_pylist(), strict=True)
    return list(dict.fromkeys(pairs))


def paired(cosines: pa.Table, one: str, other: str, task: str, layer: int) -> Estimate:
    """How much larger `one` student's cosines are than the `other`'s, on average over the images of both.

    Raises:
        OlaError: there is no such image.
    """
    of_cell = cosines.filter((pc.field("task") == task) & (pc.field("layer") == layer))
    values = [
        dict(zip(of["key"].to_pylist(), of["cosine"].to_pylist(), strict=True))
        for of in (of_cell.filter(pc.field("student") == name) for name in (one, other))
    ]
    both = [key for key in values[0] if key in values[1]]
    return bootstrap_mean([values[0][key] - values[1][key] for key in both])


def _print(result: dict[str, Any], cosines: pa.Table) -> None:
    """One table per task: a row per layer, the students side by side, then what each has more than the first."""
    first, *others = result["students"]
    for task, floor in result["floor"].items():
        title = f"{task}: cosine to the target, {LEVEL:.0%} interval (mean target: {Estimate(**floor)})"
        columns = ["layer", first, *others, *(f"{name} − {first}" for name in others)]
        table = Table(*columns, title=title, box=SIMPLE, padding=(0, 1, 0, 0))
        for layer in result["students"][first][task]:
            means = [Estimate(**of[task][layer]) for of in result["students"].values()]
            more = [paired(cosines, name, first, task, int(layer)) for name in others]
            table.add_row(layer, *map(str, means), *map(str, more))
        Console().print(table)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
