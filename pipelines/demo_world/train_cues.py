"""The cue model: what ground-truth 2-D boxes alone tell about depth and distance, fitted on rendered scenes."""

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pipelines.demo_world.cues import THREE_D, features, first_is_right
from pipelines.demo_world.processes import CHUNK, in_processes
from pipelines.demo_world.questions import Question, questions
from pipelines.demo_world.samples import fit
from pipelines.demo_world.scenes import LEVELS, render, sample_scene, scene_seed

HIDDEN = 64


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the networks of all tasks, ``<task>.<layer>.weight`` and ``bias``, as hub folders are written."""
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["CueModel"], "hidden_size": HIDDEN, "tasks": list(THREE_D)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def gather(split: str, scenes: dict[str, int], seed: int = 0, workers: int = 2) -> list[Question]:
    """All 3-D questions about the first scenes of a split, so many of each level; in order."""
    chunks = [
        (level, range(start, min(start + CHUNK, count)))
        for level, count in scenes.items()
        for start in range(0, count, CHUNK)
    ]
    return [q for found in in_processes(partial(_ask, split, seed), chunks, workers) for q in found]


def train(task: str, asked: Sequence[Question], steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights and biases of a network with two hidden layers, by the names `cues` reads: ``0.weight`` …

    What is fitted is the network's value for a question less that for the same turned round: the order in which two
    objects are named cannot matter.
    """
    torch.manual_seed(seed)
    x = torch.from_numpy(features(asked))
    turned = torch.from_numpy(features([q.turned() for q in asked]))
    first = torch.from_numpy(first_is_right(asked).astype(np.float32))
    mean, scale = x.mean(0), x.std(0)
    widths = (x.shape[1], HIDDEN, HIDDEN, 1)
    layers = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def loss(rows: NDArray[np.int64]) -> Tensor:
        chosen = torch.from_numpy(rows)
        odds = network((x[chosen] - mean) / scale) - network((turned[chosen] - mean) / scale)
        return binary_cross_entropy_with_logits(odds[:, 0], first[chosen])

    fit(f"cues {task}", [*network.parameters()], loss, len(asked), min(1024, len(asked)), steps, lr=3e-3, seed=seed)
    with torch.no_grad():  # inputs come as they are: their scale becomes the first layer's
        layers[0].weight.div_(scale)
        layers[0].bias.sub_(layers[0].weight @ mean)
    return {f"{i}.{name}": t.detach() for i, layer in enumerate(layers) for name, t in layer.named_parameters()}


def _ask(split: str, seed: int, chunk: tuple[str, range]) -> list[Question]:
    level, indices = chunk
    scenes = [sample_scene(scene_seed(split, index, seed), LEVELS[level]) for index in indices]
    rng = np.random.Generator(np.random.PCG64([seed, indices.start]))
    return [q for scene in scenes for q in questions(scene, render(scene), rng) if q.task in THREE_D]
