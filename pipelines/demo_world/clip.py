"""The architecture of two CLIPs, trained apart: the generation teacher's image encoder and the student's tower."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from pipelines.demo_world.captions import caption, surfaces
from pipelines.demo_world.samples import SIZE, Samples
from pipelines.demo_world.scenes import Scene

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
WIDTH, PATCH, TEXT_LENGTH = 96, 8, 96
PHRASINGS = 3  # captions per scene


def build(words: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP: 4 layers of 96 over 64 patches; the text side is just big enough for captions."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    model = CLIPModel(config)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = positions(SIZE // PATCH, WIDTH) / 2
    return model


def positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of rows and columns, float32 (grid², width), waves of 4 to 40 patches.

    What positions start from (Beyer et al. 2022, arXiv 2205.01580), about as large as what patches show: from CLIP's
    own start, a fourteenth of that, so few steps do not make patches know where they are.
    """
    waves = math.pi / 2 * 10 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(grid)[:, None] * waves
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = code[:, None].expand(grid, grid, -1), code.expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, -1)


def captions(scenes: Sequence[Scene], whole: bool, seed: int) -> list[str]:
    """`PHRASINGS` captions of every scene, phrasing by phrasing; if `whole`, all speak of floor and wall, too."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def text(scene: Scene) -> str:
        told, around = caption(scene, rng), surfaces(scene)
        return f"{told} {around}" if whole and around not in told else told

    return [text(scene) for _ in range(PHRASINGS) for scene in scenes]


def encode(texts: list[str], words: PreTrainedTokenizerFast) -> Tensor:
    """Ids between BOS and EOS, padded, int64 (n, TEXT_LENGTH)."""
    marked = [f"<s>{text}</s>" for text in texts]
    ids: Tensor = words(
        marked, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return ids


def cut(ids: Tensor, pad: int) -> Tensor:
    """Padded ids (n, length) without the columns that are padding in all rows."""
    return ids[:, : int((ids != pad).sum(1).max())]


def contrast(model: CLIPModel, images: Tensor, ids: Tensor, pad: int) -> Tensor:
    """CLIP's loss (arXiv 2103.00020) of image embeddings (n, 96) and the ids (n, length) of their captions."""
    said = model.get_text_features(input_ids=ids, attention_mask=(ids != pad).long()).pooler_output
    cosines = F.normalize(images, dim=-1) @ F.normalize(said, dim=-1).T
    logits = model.logit_scale.exp().clamp(max=100) * cosines
    own = torch.arange(len(images))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def recall(model: CLIPModel, words: PreTrainedTokenizerFast, data: Samples, whole: bool, among: int = 256) -> float:
    """Gate: share of images whose own caption is the most similar of `among`, over all full groups of `data`.

    Args:
        model: in eval mode.
        words: its tokenizer.
        data: images and scenes it has not seen.
        whole: of `captions`, as it was trained.
        among: size of a group.
    """
    texts = encode(captions(data.scenes, whole, seed=1)[: len(data.scenes)], words)
    right = []
    for start in range(0, len(data.images) - among + 1, among):
        rows = np.arange(start, start + among)
        ids = texts[rows]
        images = model.get_image_features(pixel_values=data.pixels(rows, MEAN, STD)).pooler_output
        said = model.get_text_features(input_ids=ids, attention_mask=(ids != words.pad_token_id).long()).pooler_output
        best = (F.normalize(images, dim=-1) @ F.normalize(said, dim=-1).T).argmax(1)
        right.append((best == torch.arange(among)).float().mean())
    return float(torch.stack(right).mean())
