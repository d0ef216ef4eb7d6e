"""The student's vision tower: a CLIP whose patches know what they show and where they are."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerFast

from pipelines.demo_world.clip import MEAN, PHRASINGS, STD, TEXT_LENGTH, WIDTH, build, captions, contrast, cut, encode
from pipelines.demo_world.language import layout
from pipelines.demo_world.places import places
from pipelines.demo_world.samples import Samples, fit
from pipelines.demo_world.scenes import CLASSES
from pipelines.demo_world.words import tokenizer, vocabulary


class Captioner(nn.Module):
    """A small decoder that must tell, from patch features, the caption or where everything is; dropped after training.

    The contrastive loss asks nothing of patch features; a language model that reads patches wants to find objects in
    them, and places. The same remedy as in CoCa (arXiv 2205.01917) and LocCa (arXiv 2403.19596).
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(torch.randn(TEXT_LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerDecoderLayer(WIDTH, 3, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, nn.LayerNorm(WIDTH))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, patches: Tensor, ids: Tensor, pad: int) -> Tensor:
        """Mean next-word cross-entropy of ids (n, length) given patches (n, patches, 96)."""
        read, told = ids[:, :-1], ids[:, 1:]
        length = read.shape[1]
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        out = self.decoder(self.words(read) + self.places[:length], patches, tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy((out @ self.words.weight.T).flatten(0, 1), told.flatten(), ignore_index=pad)


def maps(data: Samples) -> list[list[str]]:
    """`layout` of every sample."""
    found = []
    for scene, panoptic, semantic, ids in zip(data.scenes, data.panoptic, data.semantic, data.segment_ids, strict=True):
        seen, at = np.unique(panoptic, return_index=True)
        names = {int(id): CLASSES[semantic.flat[i]] for id, i in zip(seen, at, strict=True)}
        names |= {id: item.name for id, item in zip(ids, scene.objects, strict=True)}
        found.append(layout(panoptic, names))
    return found


def train(data: Samples, steps: int, batch: int = 64, seed: int = 0) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train from scratch, contrastively and by captioning; returns the model, in eval mode, and its tokenizer."""
    torch.manual_seed(seed)
    rng = np.random.Generator(np.random.PCG64(seed))
    told = captions(data.scenes, whole=False, seed=seed)
    found = [places(cells, rng) for cells in maps(data)]
    words = tokenizer(vocabulary([*told, *found]))
    model = build(words).train()
    captioner = Captioner(len(words))
    texts = encode(told, words).view(PHRASINGS, len(data.scenes), TEXT_LENGTH)
    wheres = encode(found, words)
    pad = words.pad_token_id

    def loss(rows: NDArray[np.int64]) -> Tensor:
        ids = cut(texts[int(rows[0]) % PHRASINGS, rows], pad)
        seen = model.vision_model(data.pixels(rows, MEAN, STD), output_hidden_states=True)
        to_tell = ids if rows[-1] % 2 else cut(wheres[rows], pad)
        captioned: Tensor = captioner(seen.hidden_states[-2][:, 1:], to_tell, pad)
        return contrast(model, model.visual_projection(seen.pooler_output), ids, pad) + captioned

    parameters = [*model.parameters(), *captioner.parameters()]
    fit("student", parameters, loss, len(data.images), batch, steps, lr=1e-3, seed=seed)
    return model.eval(), words
