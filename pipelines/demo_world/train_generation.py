"""The generation teacher: a CLIP image encoder that knows the whole picture, floor and wall included."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerFast

from pipelines.demo_world.clip import MEAN, PHRASINGS, STD, TEXT_LENGTH, WIDTH, build, captions, contrast, cut, encode
from pipelines.demo_world.samples import Samples, fit
from pipelines.demo_world.scenes import COLOURS, PATTERNS, Scene
from pipelines.demo_world.solids import SHAPES
from pipelines.demo_world.words import tokenizer, vocabulary

READING = 4  # weight of what the linear head reads: as large a share of the clipped gradient as the contrast


def objects(scene: Scene) -> list[int]:
    """How many objects have each of `COLOURS` and each of `SHAPES`."""
    of_colours = [sum(item.colour == colour for item in scene.objects) for colour in COLOURS]
    return of_colours + [sum(item.solid.shape == shape for item in scene.objects) for shape in SHAPES]


def patterns(scene: Scene) -> list[int]:
    """Indices into `PATTERNS` of floor and wall."""
    return [PATTERNS.index(scene.floor.pattern), PATTERNS.index(scene.wall.pattern)]


def train(data: Samples, steps: int, batch: int = 64, seed: int = 0) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train from scratch; returns the model, in eval mode, and its text side's tokenizer.

    Captions alone teach the objects long before the patterns of floor and wall. So a linear head, dropped afterwards,
    must read both from the target itself, the image embedding; for a third of the steps it is all there is to learn.
    """
    torch.manual_seed(seed)
    told = captions(data.scenes, whole=True, seed=seed)
    words = tokenizer(vocabulary(told))
    model = build(words).train()
    reader = nn.Linear(WIDTH, len(COLOURS) + len(SHAPES) + 2 * len(PATTERNS))
    texts = encode(told, words).view(PHRASINGS, len(data.scenes), TEXT_LENGTH)
    pad = words.pad_token_id
    counts = torch.tensor([objects(scene) for scene in data.scenes], dtype=torch.float32)
    surfaces = torch.tensor([patterns(scene) for scene in data.scenes])

    def read(images: Tensor, rows: NDArray[np.int64]) -> Tensor:
        number, kind = reader(images).split([counts.shape[1], 2 * len(PATTERNS)], dim=1)
        return F.cross_entropy(kind.view(-1, len(PATTERNS), 2), surfaces[rows]) + F.mse_loss(number, counts[rows])

    def see(rows: NDArray[np.int64]) -> Tensor:
        images: Tensor = model.get_image_features(pixel_values=data.pixels(rows, MEAN, STD)).pooler_output
        return images

    def both(rows: NDArray[np.int64]) -> Tensor:
        images = see(rows)
        ids = cut(texts[int(rows[0]) % PHRASINGS, rows], pad)
        return contrast(model, images, ids, pad) + READING * read(images, rows)

    parameters = [*model.parameters(), *reader.parameters()]
    first = steps // 3
    fit(
        "gen, reading",
        parameters,
        lambda rows: read(see(rows), rows),
        len(data.images),
        batch,
        first,
        lr=1e-3,
        seed=seed,
    )
    fit("gen", parameters, both, len(data.images), batch, steps - first, lr=1e-3, seed=seed + 1)
    return model.eval(), words
