"""The embedding losses on models that are no student."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from olavlm.errors import OlaError
from olavlm.model import (
    EmbeddingDistiller,
    ImageLayout,
    OlaVlmForConditionalGeneration,
    OlaVlmProcessor,
    TaskTargets,
    find_images,
)

IMAGE = 60
WEIGHTS = {"depth": 0.5, "gen": 0.5}


def tasks(task_tokens: int) -> list[dict[str, Any]]:
    return [
        {
            "name": "depth",
            "kind": "dense",
            "queries": 8,
            "width": 6,
            "layers": [1, 2],
            "depth_mlps": True,
            "task_tokens": task_tokens,
        },
        {"name": "gen", "kind": "pooled", "queries": 1, "width": 5, "layers": [2], "task_tokens": task_tokens},
    ]


def targets(images: int) -> dict[str, TaskTargets]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"depth": (8, 6), "gen": (1, 5)}
    return {n: TaskTargets.of_batch(torch.randn(images, *s, generator=generator)) for n, s in shapes.items()}


def assert_learns(host: nn.Module, distiller: EmbeddingDistiller, loss_of: Callable[[], Tensor]) -> None:
    """Gradients reach everything there is to learn; a few steps lower the loss."""
    optimizer = torch.optim.AdamW([*host.parameters(), *distiller.parameters()], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in distiller.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_qwen2_vl_learns_the_features_of_images_of_different_sizes() -> None:
    """No task tokens, so nothing about the host changes: a row with images of 4 and of 8 tokens, and a row of text."""
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    text = {
        "vocab_size": 70,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    special = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    host = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
    distiller = EmbeddingDistiller(tasks(0), hidden_size=32, num_layers=2)
    rows = [[5, 62, *[IMAGE] * 4, 63, 7, 62, *[IMAGE] * 8, 63, 9], [4, 5, 6] + [0] * 16]
    input_ids = torch.tensor(rows)
    mask = (input_ids != 0).long()
    image = torch.zeros(2, 19, dtype=torch.bool)
    image[0, 2:6] = image[1, 9:17] = True
    layout = ImageLayout(batch=2, row=torch.tensor([0, 0]), image=image, columns={})
    pixels = {
        "pixel_values": torch.randn(16 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]),
        "mm_token_type_ids": (input_ids == IMAGE).int(),
    }

    def loss() -> Tensor:
        out = host(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, **pixels)
        assert_close(host.lm_head(out.hidden_states[2]), out.logits)  # the last layer's are after the final norm
        return distiller(out.hidden_states, layout, targets(2), WEIGHTS, attention_mask=mask).total

    loss().backward()
    assert host.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    assert_learns(host, distiller, loss)


def test_task_tokens_spliced_into_a_plain_language_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    host, projector = LlamaForCausalLM(config), nn.Linear(12, 32)
    distiller = EmbeddingDistiller(tasks(4), config.hidden_size, config.num_hidden_layers)
    features, words = torch.randn(3, 5, 12), torch.randint(1, 60, (3, 7))
    image = torch.zeros(3, 7 + 5 + 8, dtype=torch.bool)
    image[:, 2:7] = True
    columns = {"depth": torch.arange(7, 11).expand(3, -1), "gen": torch.arange(11, 15).expand(3, -1)}
    layout = ImageLayout(3, torch.arange(3), image, columns)

    def loss() -> Tensor:
        text = host.get_input_embeddings()(words)
        inserted = distiller.inserted_tokens().expand(3, -1, -1)
        embeds = torch.cat([text[:, :2], projector(features), inserted, text[:, 2:]], dim=1)
        out = host(inputs_embeds=embeds, output_hidden_states=True)
        return distiller(out.hidden_states, layout, targets(3), WEIGHTS).total

    loss().backward()
    assert projector.weight.grad is not None
    assert projector.weight.grad.abs().sum() > 0
    for table in distiller.task_tokens.values():
        assert table.grad.abs().sum() > 0
    assert_learns(host, distiller, loss)


def test_what_it_learns_fits_a_student(student: tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]) -> None:
    model = student[0].double()
    distiller = EmbeddingDistiller(model.config.tasks, hidden_size=32, num_layers=4).double()
    left = model.load_state_dict(distiller.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith(("model.", "lm_head.")) for name in left.missing_keys)
    ids = torch.tensor([[5, *model.config.image_block, 7, 8]])
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    out = model(input_ids=ids, pixel_values=pixels, predict=True, output_hidden_states=True)
    alone = distiller.predict(out.hidden_states, find_images(ids, model.config))
    for task, layers in out.predictions.items():
        for layer, prediction in layers.items():
            assert_close(alone[task][layer], prediction)


def test_no_image_no_loss() -> None:
    distiller = EmbeddingDistiller(tasks(0), hidden_size=16, num_layers=2)
    hidden = {layer: torch.randn(2, 3, 16, requires_grad=True) for layer in (1, 2)}
    layout = ImageLayout(2, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool), {})
    losses = distiller(hidden, layout, targets(0), WEIGHTS)
    assert losses.total.item() == 0
    losses.total.backward()
    for name, parameter in distiller.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name  # as DDP needs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": {1: torch.zeros(2, 6, 16)}}, r"hidden\[2\]: missing; task depth reads this layer"),
        ({"hidden": [torch.zeros(2, 6, 16)] * 2}, r"hidden\[2\]: missing"),
        ({"hidden": [torch.zeros(2, 6, 8)] * 3}, r"hidden\[1\]: \(2, 6, 8\); task depth .* expected \(2, 6, 16\)"),
        ({"hidden": [torch.zeros(2, 5, 16)] * 3}, r"hidden\[1\]: \(2, 5, 16\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: shape \(2, 5\); .* \(2, 6\)"),
        ({"columns": {}}, r"layout.columns.depth: missing; expected \(2, 2\)"),
        ({"columns": {"depth": torch.zeros(2, 3, dtype=torch.int64)}}, r"layout.columns.depth: \(2, 3\)"),
        ({"weights": {"seg": 1.0}}, "losses.seg: the student predicts no such task"),
        (
            {"targets": {"depth": TaskTargets.of_batch(torch.zeros(2, 9, 6))}},
            r"losses.depth: layer 1: target: shape \(2, 9, 6\); expected the prediction's \(2, 8, 6\)",
        ),
        (
            {"targets": {"depth": TaskTargets.of_batch(torch.zeros(2, 8, 7))}},
            r"losses.depth: layer 1: target: shape \(2, 8, 7\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    distiller = EmbeddingDistiller(tasks(2), hidden_size=16, num_layers=2)
    image = torch.zeros(2, 6, dtype=torch.bool)
    image[:, 0] = True
    columns = {"depth": torch.tensor([[1, 2]] * 2), "gen": torch.tensor([[3, 4]] * 2)}
    layout = ImageLayout(2, torch.arange(2), image, change.get("columns", columns))
    given = {"hidden": [torch.zeros(2, 6, 16)] * 3, "targets": targets(2), "weights": WEIGHTS}
    with pytest.raises(OlaError, match=message):
        distiller(layout=layout, **(given | {k: v for k, v in change.items() if k != "columns"}))


def test_a_layout_has_a_row_for_every_image() -> None:
    with pytest.raises(OlaError, match=r"layout.image: \(3, 6\) of torch.bool; expected 2 rows of bool"):
        ImageLayout(3, torch.arange(2), torch.zeros(3, 6, dtype=torch.bool), {})


def test_tasks_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(OlaError, match=r"tasks.depth.layers: 2; expected integers from 1 to 1"):
        EmbeddingDistiller(tasks(0), hidden_size=16, num_layers=1)
