"""Numbers of the published implementation, to 1e-4 in fp32.

tests/data/reference_*.safetensors hold tensors recorded from its unmodified code as ``<case>/{state,in,out,…}/<name>``.
`heads`: predictors and the gradient of the sum of the squared output. `losses`: see test_losses.py. `full_model`: one
row (26 system tokens, an image, text; no padding) through a Llama of six layers; hidden states at every 32nd position.
Names become ours through the converter.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from olavlm.model import EmbeddingPredictor, OlaVlmForConditionalGeneration, find_images
from olavlm.model.convert import convert
from olavlm.model.published import published_name

Reference = Callable[[str], dict[str, Tensor]]

HEAD = {"depth": 1, "dim_head": 32, "num_heads": 4, "ff_mult": 1}
#: The recorded configuration, with the second of its two layers per task.
PUBLISHED = {
    "model_type": "ola_llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 48,
    "aux_mode": "depth-seg-gen",
    "num_task_tokens": 8,
    "task_token_format": "expand_emb",
    "pass_text_to_aux": True,
    "use_contrastive": False,  # its logit scales were not kept
    "image_gen": HEAD | {"num_tokens": 1, "output_dim": 40, "img_layer_indices": "6"},
    "image_seg": HEAD | {"num_tokens": 576, "output_dim": 16, "seg_layer_indices": "4"},
    "image_depth": HEAD | {"num_tokens": 576, "output_dim": 24, "depth_layer_indices": "5"},
}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def predictor_state(predictor: EmbeddingPredictor, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """One published head's tensors under our names."""
    head = {f"image_depth_heads.0.{name}": tensor for name, tensor in published.items()}
    names = {name: published_name(f"predictors.depth.1.{name}", {"depth": [1]}) for name in predictor.state_dict()}
    assert {*names.values()} == head.keys()
    return {ours: head[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize(
    ("case", "dim", "width", "queries"),
    [
        ("depth_plain_n16", 24, 24, 16),
        ("seg_plain_n16", 16, 16, 16),
        ("seg_tt_n16", 16, 16, None),
        ("gen_tt", 40, 40, None),
    ],
)
def test_predictors_and_their_gradients(
    reference: Reference, case: str, dim: int, width: int, queries: int | None
) -> None:
    tensors = under(reference("heads"), f"{case}/")
    predictor = EmbeddingPredictor(64, dim, width, queries)
    predictor.load_state_dict(predictor_state(predictor, under(tensors, "state/")))
    x = tensors["in/x"].requires_grad_()
    latents = tensors["in/latents"].requires_grad_() if queries is None else None
    asked = latents.mean(1, keepdim=True) if latents is not None and case == "gen_tt" else latents
    out = predictor(x, torch.ones(x.shape[:2], dtype=torch.bool), asked)
    expected = tensors["out/0"]
    if expected.ndim == 4:  # (n, width, rows, columns)
        expected = expected.flatten(2).transpose(1, 2)
    assert_close(out, expected, atol=1e-4, rtol=1e-4)
    out.square().sum().backward()
    assert_close(x.grad, tensors["grad_in/x"], atol=1e-4, rtol=1e-4)
    if latents is not None:
        assert_close(latents.grad, tensors["grad_in/latents"], atol=1e-4, rtol=1e-4)


@pytest.fixture
def full(reference: Reference, tmp_path: Path) -> tuple[OlaVlmForConditionalGeneration, dict[str, Tensor]]:
    """The recorded checkpoint, with the second of its two predictors per task, converted; and everything recorded."""
    tensors = reference("full_model")
    published, tower = tmp_path / "published", tmp_path / "tower"
    published.mkdir()
    state = {name.replace("_heads.1.", "_heads.0."): t for name, t in under(tensors, "A/state/").items()}
    for unread in ("linear_2", "linear_3"):  # not kept in the recording; no prediction reads them
        state |= {name.replace("linear_1", unread): t.clone() for name, t in state.items() if "linear_1" in name}
    save_file(state, published / "model.safetensors")
    (published / "config.json").write_text(json.dumps(PUBLISHED))
    # The recording took image features from outside; any tower of 24 x 24 patches and their width will do.
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=24, patch_size=1
    )
    CLIPVisionModel(vision).save_pretrained(tower)
    account = convert(str(published), tmp_path / "ours", vision_tower=str(tower))
    assert account.renamed.keys() == state.keys()
    return OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").eval(), tensors


@torch.no_grad()
def test_full_model(full: tuple[OlaVlmForConditionalGeneration, dict[str, Tensor]]) -> None:
    model, tensors = full
    raw = tensors["batch/input_ids"].tolist()
    at = raw.index(-200)
    ids = torch.tensor([raw[:at] + model.config.image_block + raw[at + 1 :]])
    assert tensors["A/out/labels"].shape == ids.shape[1:]
    # The published table has no row for our marker ids: embed() looks words up, then overwrites every marker.
    words = ids.clamp(min=0)
    features = model.model.multi_modal_projector(tensors["batch/image_features"])[None]
    layout = find_images(ids, model.config)
    embeds = model.embed(words, layout, features)
    expected = tensors["A/out/inputs_embeds"]  # all but the image; of the image every 48th
    got = torch.cat([embeds[0, :26], embeds[0, 26:602:48], embeds[0, 602:]])
    assert_close(got, expected, atol=1e-4, rtol=1e-4)

    with model.capture({1, 2, 3, 4, 5, 6}) as hidden:
        out = model(input_ids=ids, inputs_embeds=embeds, predict=True)
    for layer, states in hidden.items():
        assert_close(states[0, ::32], tensors[f"A/out/hidden_states_row1/{layer}"], atol=1e-4, rtol=1e-4)
    assert_close(out.logits[0, -30:], tensors["A/out/logits_row1_last30"], atol=1e-4, rtol=1e-4)
    assert_close(out.predictions["depth"][5][0], tensors["A/out/depth_emb@5/0"], atol=1e-4, rtol=1e-4)
    assert_close(out.predictions["gen"][6][0], tensors["A/out/gen_emb@6"], atol=1e-4, rtol=1e-4)
    assert_close(out.predictions["seg"][4][0], tensors["A/out/seg_emb@4"].flatten(1).T, atol=1e-4, rtol=1e-4)
