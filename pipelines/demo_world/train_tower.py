"""The student's vision tower: a CLIP whose patches know what they show and where they are."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerFast

from pipelines.demo_world.clip import (
    MEAN,
    PATCH,
    PHRASINGS,
    STD,
    TEXT_LENGTH,
    WIDTH,
    build,
    captions,
    contrast,
    cut,
    encode,
)
from pipelines.demo_world.places import layout
from pipelines.demo_world.samples import SIZE, Samples, fit
from pipelines.demo_world.scenes import CLASSES, COLOURS
from pipelines.demo_world.words import tokenizer, vocabulary

GRID = SIZE // PATCH
OPTIONS = (len(CLASSES), 1 + len(COLOURS), GRID, GRID)  # classes, no or one colour, rows, columns


def maps(data: Samples) -> list[list[str]]:
    """`layout` of every sample."""
    found = []
    for scene, panoptic, semantic, ids in zip(data.scenes, data.panoptic, data.semantic, data.segment_ids, strict=True):
        seen, at = np.unique(panoptic, return_index=True)
        names = {int(id): CLASSES[semantic.flat[i]] for id, i in zip(seen, at, strict=True)}
        names |= {id: item.name for id, item in zip(ids, scene.objects, strict=True)}
        found.append(layout(panoptic, names))
    return found


def told_of_patches(cells: list[str]) -> list[tuple[int, int, int, int]]:
    """Which of `OPTIONS` every cell of a `layout` is."""
    colours = [None, *COLOURS]
    words = [cell.split() for cell in cells]
    return [
        (CLASSES.index(word[-1]), colours.index(word[0]) if len(word) == 2 else 0, *divmod(place, GRID))
        for place, word in enumerate(words)
    ]


def mirrored(shown: Tensor) -> Tensor:
    """`told_of_patches` of images, (n, patches, 4), as they are if the images are mirrored."""
    flipped = shown.view(-1, GRID, GRID, 4).flip(2).flatten(1, 2)
    flipped[..., 3] = GRID - 1 - flipped[..., 3]
    return flipped


def train(data: Samples, steps: int, batch: int = 64, seed: int = 0) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train from scratch; returns the model, in eval mode, and its tokenizer.

    The contrastive loss asks nothing of patch features, which after millions of images hold what is where all the same.
    After so few, they do only if a linear head, dropped afterwards, must read it from them. That costs half of what the
    contrastive loss does and takes more steps: for two thirds of them it is all that is learned.
    """
    torch.manual_seed(seed)
    told = captions(data.scenes, whole=False, seed=seed)
    words = tokenizer(vocabulary(told))
    model = build(words).train()
    reader = nn.Linear(WIDTH, sum(OPTIONS))
    texts = encode(told, words).view(PHRASINGS, len(data.scenes), TEXT_LENGTH)
    patches = torch.tensor([told_of_patches(cells) for cells in maps(data)])
    pad = words.pad_token_id
    reading = steps * 2 // 3  # steps without captions

    def loss(rows: NDArray[np.int64]) -> Tensor:
        nonlocal reading
        reading -= 1
        pixels, shown = data.pixels(rows, MEAN, STD), patches[rows]
        if reading >= 0 and rows[0] % 2:  # mirrored scenes are scenes, but not those of their captions
            pixels, shown = pixels.flip(3), mirrored(shown)
        seen = model.vision_model(pixels, output_hidden_states=True)
        read = reader(seen.hidden_states[-2][:, 1:]).flatten(0, 1).split(OPTIONS, dim=1)
        wrong = torch.stack([F.cross_entropy(logits, shown.flatten(0, 1)[:, i]) for i, logits in enumerate(read)]).sum()
        if reading >= 0:
            return wrong
        ids = cut(texts[int(rows[0]) % PHRASINGS, rows], pad)
        return contrast(model, model.visual_projection(seen.pooler_output), ids, pad) + wrong

    parameters = [*model.parameters(), *reader.parameters()]
    fit("student", parameters, loss, len(data.images), batch, steps, lr=2e-3, seed=seed)
    return model.eval(), words
