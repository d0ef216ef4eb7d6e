"""The segmentation teacher: OneFormer with a Swin backbone, trained on rendered truth for the semantic task."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTokenizer, OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

from pipelines.demo_world.samples import SIZE, Samples, fit
from pipelines.demo_world.scenes import CLASSES

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EMBED, HIDDEN = 32, 64
WIDTH = EMBED * 4  # of the last stage, which is the target
TASK, TASK_LENGTH = "the task is semantic", 32
QUERIES = len(CLASSES)


def build() -> OneFormerForUniversalSegmentation:
    """An untrained teacher: 64 px in, stages of 32², 16² and 8² tokens, so that the target's grid is the last stage's
    own; small decoders.
    """
    swin = SwinConfig(  # type: ignore[call-arg]
        image_size=SIZE,
        patch_size=2,
        embed_dim=EMBED,
        depths=[1, 1, 4],
        num_heads=[2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = OneFormerConfig(
        backbone_config=swin,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        num_queries=QUERIES + 1,  # the last is the task token
        conv_dim=HIDDEN,
        mask_dim=HIDDEN,
        hidden_dim=HIDDEN,
        encoder_feedforward_dim=2 * HIDDEN,
        dim_feedforward=2 * HIDDEN,
        num_attention_heads=4,
        encoder_layers=1,
        decoder_layers=3,
        query_dec_layers=1,
        dropout=0.0,
        task_seq_len=TASK_LENGTH,
        use_auxiliary_loss=False,
        output_auxiliary_logits=False,
        train_num_points=1024,
    )
    model = OneFormerForUniversalSegmentation(config)
    # Far apart, as DETR's are: started at 0.02, those for boxes and cylinders became one and the same.
    nn.init.normal_(model.model.transformer_module.queries_embedder.weight)
    return model


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single letters: all that the task prompt needs."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def task_tokens(words: CLIPTokenizer) -> Tensor:
    """The prompt as the processor hands it over: ids, zero where padded, float32 (1, 32)."""
    encoded = words(TASK, padding="max_length", max_length=TASK_LENGTH, truncation=True, return_tensors="pt")
    tokens: Tensor = encoded.input_ids * encoded.attention_mask
    return tokens.float()


def segment(model: OneFormerForUniversalSegmentation, maps: list[Tensor], task: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (n, queries, classes + 1) and mask logits (n, queries, 32, 32) from the backbone's four maps."""
    inner: Any = model.model
    pixel = inner.pixel_level_module.decoder(maps)
    out = inner.transformer_module(
        multi_scale_features=pixel.multi_scale_features,
        mask_features=pixel.mask_features,
        task_token=inner.task_encoder(task.expand(len(maps[0]), -1)),
    )
    return out.prediction_class, out.prediction_masks


def target_only(model: OneFormerForUniversalSegmentation, maps: list[Tensor]) -> list[Tensor]:
    """The maps a decoder gets when only the stored target is left: finer stages hold their LayerNorm's bias."""
    encoder: Any = model.model.pixel_level_module.encoder
    neutral = [
        encoder.hidden_states_norms[stage].bias.view(1, -1, 1, 1).expand_as(a)
        for stage, a in zip(encoder.out_features, maps, strict=True)
    ]
    return [*neutral[:-1], maps[-1]]


def train(
    data: Samples, steps: int, batch: int = 16, decoded: int = 4, seed: int = 0
) -> tuple[OneFormerForUniversalSegmentation, float]:
    """Train from scratch; returns (model in eval mode, CPU seconds).

    Query k answers for class k, so no matching is needed. A linear head, dropped afterwards, must read every patch's
    4 × 4 classes from the target itself: it is the features that are distilled. The decoders, which cost more than
    the backbone, run in half of the steps, on `decoded` images of the batch; in half of these they see the target
    alone, as they do when stored targets become pictures.
    """
    torch.manual_seed(seed)
    model = build().train()
    reader = nn.Linear(WIDTH, 16 * len(CLASSES))
    task = task_tokens(tokenizer())
    frequency = torch.from_numpy(
        np.bincount(data.semantic[:500].ravel(), minlength=len(CLASSES)) / data.semantic[:500].size
    )
    weight = (frequency.float() + 1e-3) ** -0.5
    weight /= (weight * frequency).sum()

    def loss(rows: NDArray[np.int64]) -> Tensor:
        pixels, truth = data.pixels(rows, MEAN, STD), torch.from_numpy(data.semantic[rows].astype(np.int64))
        if rows[0] % 2:  # mirrored scenes are scenes
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        maps = list(model.model.pixel_level_module.encoder(pixels).feature_maps)
        read = F.pixel_shuffle(reader(maps[-1].movedim(1, -1)).movedim(-1, 1), 4)
        patch = F.cross_entropy(F.interpolate(read, size=truth.shape[1:], mode="bilinear"), truth, weight)
        if rows[1] % 2:
            return patch
        if rows[2] % 2:
            maps = target_only(model, maps)
        classes, masks = segment(model, [m[:decoded] for m in maps], task)
        return patch + _query_loss(classes[:, :QUERIES], masks[:, :QUERIES], truth[:decoded], weight)

    parameters = [*model.model.parameters(), *reader.parameters()]
    seconds = fit("seg", parameters, loss, len(data.images), batch, steps, lr=2e-3, seed=seed)
    return model.eval(), seconds


def _query_loss(classes: Tensor, masks: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """OneFormer's class, mask and dice terms for query k ↔ class k, plus cross-entropy between the masks."""
    masks = F.interpolate(masks, size=truth.shape[1:], mode="bilinear", align_corners=False)
    wanted = F.one_hot(truth, QUERIES).movedim(-1, 1).float()
    there = wanted.flatten(2).any(-1)
    labels = torch.where(there, torch.arange(QUERIES), QUERIES)
    shares = masks.sigmoid().flatten(2)
    dice = 1 - (2 * (shares * wanted.flatten(2)).sum(-1) + 1) / (shares.sum(-1) + wanted.flatten(2).sum(-1) + 1)
    binary = F.binary_cross_entropy_with_logits(masks, wanted, reduction="none").flatten(2).mean(-1)
    present = there.float() / there.sum()
    return (
        F.cross_entropy(classes.flatten(0, 1), labels.flatten())
        + ((dice + 2 * binary) * present).sum()
        + F.cross_entropy(masks, truth, weight)
    )
