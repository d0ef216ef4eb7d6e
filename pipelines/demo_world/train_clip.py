"""Two CLIPs, trained apart from each other: the generation teacher's image encoder and the student's vision tower."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from pipelines.demo_world.language import caption, surfaces
from pipelines.demo_world.samples import SIZE, Samples, fit
from pipelines.demo_world.scenes import Scene
from pipelines.demo_world.words import tokenizer, vocabulary

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
    return CLIPModel(config)


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


class Captioner(nn.Module):
    """A small decoder that must tell the caption from patch features; dropped after training.

    The contrastive loss asks nothing of patch features; a language model that reads patches wants to find objects in
    them (the same remedy as in CoCa, arXiv 2205.01917, and SigLIP 2, arXiv 2502.14786).
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


def train(
    name: str, data: Samples, steps: int, whole: bool, batch: int = 64, seed: int = 0
) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train from scratch, contrastively and by captioning; returns the model, in eval mode, and its tokenizer.

    Args:
        whole: learn from captions that all speak of floor and wall, too (the generation teacher knows the whole
            picture, the student's tower above all the objects).
    """
    torch.manual_seed(seed)
    told = captions(data.scenes, whole, seed)
    words = tokenizer(vocabulary(told))
    model = build(words).train()
    captioner = Captioner(len(words))
    texts = encode(told, words).view(PHRASINGS, len(data.scenes), TEXT_LENGTH)
    pad = words.pad_token_id

    def loss(rows: NDArray[np.int64]) -> Tensor:
        ids = texts[int(rows[0]) % PHRASINGS, rows]
        ids = ids[:, : int((ids != pad).sum(1).max())]
        seen = model.vision_model(data.pixels(rows, MEAN, STD), output_hidden_states=True)
        read = model.text_model(input_ids=ids, attention_mask=(ids != pad).long())
        images = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        said = F.normalize(model.text_projection(read.pooler_output), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * images @ said.T
        own = torch.arange(len(rows))
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        captioned: Tensor = captioner(seen.hidden_states[-2][:, 1:], ids, pad)
        return contrast + captioned

    parameters = [*model.parameters(), *captioner.parameters()]
    fit(name, parameters, loss, len(data.images), batch, steps, lr=1e-3, seed=seed)
    return model.eval(), words


@torch.no_grad()
def recall(model: CLIPModel, words: PreTrainedTokenizerFast, data: Samples, whole: bool, among: int = 256) -> float:
    """Gate: share of images whose own caption is the most similar of `among`, over all full groups of `data`."""
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
