"""What a codec does to a student: the demo world's pretraining on decoded targets, judged on the features themselves.

Every codec's student of one seed starts from the same parameters and sees the same samples in the same order, so that
codecs are compared seed by seed. One line per (codec, seed) in a JSON-lines file: what is there is not trained again.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featurize import teachers
from olavlm.config import PipelineConfig, load_pipeline
from olavlm.data.images import decode_image
from olavlm.model import OlaVlmForConditionalGeneration
from olavlm.model.layout import find_images
from olavlm.model.losses import cosine, smooth_l1
from pipelines import corpus as corpora
from pipelines.codecs.candidates import candidates
from pipelines.demo_world.features import Objects
from pipelines.demo_world.probes import classify, r2, ridge
from pipelines.demo_world.samples import render_samples
from pipelines.demo_world.solids import SHAPES
from train import stage, student
from train.distributed import World
from train.loader import Loader, MicroBatch, Targets
from train.snapshot import Snapshot
from train.step import Objective, accumulate, learning_rate

#: The uncompressed targets every codec is compared with.
REFERENCE = "fp32"
BATCH = 32  # of what is computed without gradients

Features = dict[str, Tensor]  # task → (n, tokens, width) float32, sample by sample


@dataclass(frozen=True)
class Sizes:
    """How much is rendered and how long a student is trained; what lines in the results file belong together."""

    scenes: int = 384
    held_out: int = 96
    steps: int = 96
    batch: int = 8


@dataclass(frozen=True)
class _Data:
    """Pinned samples, each with one image, and the teachers' features of them."""

    snapshot: Snapshot
    features: Features


def train_students(folder: Path, sizes: Sizes, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Train whatever ``folder/students.jsonl`` lacks; returns its lines of these sizes.

    A line has ``codec``, ``seed``, the sizes, and ``measured``: name → value, see `_measure`.
    """
    file = folder / "students.jsonl"
    config = _config(folder, sizes)
    corpora.build(config)
    train, held_out = (_data(folder, config, name) for name in ("pretrain", "probe"))
    decoded: dict[str, Features] = {REFERENCE: train.features}
    for task, features in train.features.items():
        for name, codec in candidates(features).items():
            if codec.zstd is not None:
                continue  # lossless: the same student as without
            stored = codec.encode(features)
            decoded.setdefault(name, {})[task] = codec.decode(stored, *features.shape[1:])
    objects = Objects.of(render_samples("probe", sizes.held_out, config.seed))
    for seed in seeds:
        for name, targets in decoded.items():
            if any((line["codec"], line["seed"]) == (name, seed) for line in _lines(file, sizes)):
                continue
            model, loader = _train(config.model_copy(update={"seed": seed}), train.snapshot, targets, sizes.steps)
            measured = _measure(model, held_out, loader, objects)
            line = {"codec": name, "seed": seed, **asdict(sizes), "measured": measured}
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(f"students: seed {seed}, {name}: {measured}", flush=True)
    return _lines(file, sizes)


def _lines(file: Path, sizes: Sizes) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if asdict(sizes).items() <= line.items()]


def _config(folder: Path, sizes: Sizes) -> PipelineConfig:
    scenes = {"pretrain": sizes.scenes, "probe": sizes.held_out}
    own = folder / f"{sizes.scenes}-{sizes.held_out}"
    overrides = [f"data.{name}.source.scenes={count}" for name, count in scenes.items()]
    overrides += [f"stages.pretrain.{key}={sizes.batch}" for key in ("global_batch", "micro_batch")]
    return load_pipeline("demo", [f"run_dir={own}", "eval=null", "data.finetune.source.scenes=32", *overrides])


def _data(folder: Path, config: PipelineConfig, name: str) -> _Data:
    """A corpus of the pipeline and its features by the teachers, which are computed once."""
    settings = student.stage_config(config, "pretrain").model_copy(update={"data": [name]})
    pinned = Path(config.run_dir) / f"pinned-{name}"
    pinned.mkdir(parents=True, exist_ok=True)
    snapshot = stage.open_snapshot(pinned, config, stage.request("pretrain", settings, ()), World.join())
    file = pinned / "features.safetensors"
    if not file.exists():
        found: Features = {}
        for task, stated in config.teachers.items():
            teacher = teachers.load(stated)
            pixels = [teacher.preprocess(_picture(snapshot, i)) for i in range(sum(snapshot.sizes))]
            found[task] = torch.cat(
                [teacher.encode(torch.stack(pixels[i : i + BATCH])) for i in range(0, len(pixels), BATCH)]
            )
        save_file({task: features.contiguous() for task, features in found.items()}, file)
    return _Data(snapshot, load_file(file))


def _picture(snapshot: Snapshot, number: int) -> Any:
    sample = snapshot.sample(number)
    (image,) = sample.images
    return decode_image(snapshot.corpora[sample.data].read(sample.tar, image.offset, image.bytes))


def _train(
    config: PipelineConfig, snapshot: Snapshot, targets: Features, steps: int
) -> tuple[OlaVlmForConditionalGeneration, Loader]:
    """The demo's pretraining for so many steps, on targets given sample by sample; the student and its loader."""
    torch.manual_seed(config.seed)
    settings = student.stage_config(config, "pretrain")
    world = World.join()
    model, processor = student.create(config)
    processor.view = settings.view
    parts = student.prepare(model, settings, world.device)
    parameters = [p for pairs in parts.values() for _, p in pairs]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    order = stage.order_of(snapshot, "pretrain", settings, config.seed)
    loader = Loader(snapshot, processor, [], settings.max_length, range(0), lambda _: [], 1)
    objective = Objective(settings.losses, settings.contrastive)
    for step in range(steps):
        samples = order.batch(step)
        valid = torch.ones(len(samples), dtype=torch.bool)
        batch = loader.read(samples)
        batch.targets = {task: Targets(features[samples], None, valid, "fp16") for task, features in targets.items()}
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(step, steps, settings.warmup)
        optimizer.zero_grad()
        accumulate(model, [batch], objective, world)
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
    return model, loader


@torch.no_grad()
def _measure(model: OlaVlmForConditionalGeneration, data: _Data, trained: Loader, objects: Objects) -> dict[str, float]:
    """On held-out scenes.

    ``<task> smooth-L1`` and ``<task> cosine``: of the predictions to the teachers' own fp32 features, mean over the
    supervised layers. ``depth known`` and ``shape known``: what linear probes read of the objects from the language
    model's image tokens, mean over the layers: R² of the log-depth, accuracy of the class.
    """
    model.eval()  # type: ignore[no-untyped-call]
    reader = Loader(data.snapshot, trained._processor, [], trained._max_length, range(0), lambda _: [], 1)
    layers = set(range(1, model.config.llm.num_hidden_layers + 1))
    sums: dict[str, list[Tensor]] = {}
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    count = sum(data.snapshot.sizes)
    for rows in np.array_split(np.arange(count), math.ceil(count / BATCH)):
        batch: MicroBatch = reader.read(rows)
        with model.capture(layers) as hidden:
            out = model(batch.input_ids, batch.pixel_values, batch.attention_mask, predict=True, use_cache=False)
        layout = find_images(batch.input_ids, model.config)
        for layer, states in hidden.items():
            seen[layer].append(states[layout.row][layout.image].view(len(rows), -1, states.shape[-1]))
        for task, predictions in (out.predictions or {}).items():
            target, valid = data.features[task][rows], torch.ones(len(rows), dtype=torch.bool)
            for prediction in predictions.values():
                loss = smooth_l1(prediction, target, valid, len(rows)) * len(rows)
                sums.setdefault(f"{task} smooth-L1", []).append(loss / len(predictions))
                sums.setdefault(f"{task} cosine", []).append(cosine(prediction, target).sum() / len(predictions))
    found = {name: float(torch.stack(values).sum()) / count for name, values in sums.items()}
    known = [objects.seen_in(torch.cat(of_layer).double().numpy()) for of_layer in seen.values()]
    with torch.enable_grad():  # the probes are fitted by gradients
        depths = [r2(objects.log_depth, ridge(x, objects.log_depth, objects.scene)) for x in known]
        shapes = [classify(x, objects.shape, len(SHAPES), objects.scene, penalties=(1e-3,)) for x in known]
    found["depth known"] = float(np.mean(depths))
    found["shape known"] = float(np.mean([(shape == objects.shape).mean() for shape in shapes]))
    return {name: round(value, 6) for name, value in found.items()}
