"""Numbers of the published implementation, to 1e-4 in fp32.

tests/data/reference_*.safetensors hold tensors recorded from its unmodified code as ``<case>/{state,in,out,…}/<name>``.
`heads`: predictors and the gradient of the sum of the squared output. `losses`: see test_losses.py. `full_model`: one
row (26 system tokens, an image, text; no padding) through a Llama of six layers; hidden states at every 32nd position.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig

from olavlm.model import EmbeddingPredictor, OlaVlmConfig, OlaVlmForConditionalGeneration, find_images

Reference = Callable[[str], dict[str, Tensor]]

PREDICTOR_NAMES = {
    "layers.0.0.norm1.": "norm_hidden.",
    "layers.0.0.norm2.": "norm_latents.",
    "layers.0.0.to_q.": "to_query.",
    "layers.0.0.to_kv.": "to_key_value.",
    "layers.0.0.to_out.": "to_out.",
    "layers.0.1.0.": "norm_mlp.",
    "layers.0.1.1.": "mlp_up.",
    "layers.0.1.3.": "mlp_down.",
    "proj_in.": "project_in.",
    "proj_out.": "project_out.",
}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def predictor_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names of one predictor → ours."""
    state = {}
    for name, tensor in published.items():
        name = name.removeprefix("projector.")
        for old, new in PREDICTOR_NAMES.items():
            name = name.replace(old, new)
        state[name] = tensor
    return state


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
    predictor.load_state_dict(predictor_state(under(tensors, "state/")))
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
def full(reference: Reference) -> tuple[OlaVlmForConditionalGeneration, dict[str, Tensor]]:
    tensors = reference("full_model")
    text = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=24, patch_size=1
    )
    config = OlaVlmConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=-200,
        image_seq_length=576,
        # Published ids mark the image only; any free ids will do for the task tokens.
        task_token_ids={"gen": range(-8, 0), "depth": range(-16, -8), "seg": range(-24, -16)},
        tasks=[  # in the order of this recording
            {"name": "depth", "kind": "dense", "queries": 576, "width": 24, "layers": [5], "depth_mlps": True},
            {"name": "seg", "kind": "dense", "queries": 576, "width": 16, "layers": [4]},
            {"name": "gen", "kind": "pooled", "queries": 1, "width": 40, "layers": [6]},
        ],
    )
    model = OlaVlmForConditionalGeneration(config).eval()
    state = {}
    for name, tensor in under(tensors, "A/state/").items():
        head, rest = name.split("_heads.1.") if "_heads.1." in name else ("", name)
        if head:
            task = head.removeprefix("image_")
            layer = {"gen": 6, "depth": 5, "seg": 4}[task]
            state |= {f"predictors.{task}.{layer}.{k}": v for k, v in predictor_state({rest: tensor}).items()}
        elif name.startswith("model.special_"):
            state["task_tokens." + name.removeprefix("model.special_").removesuffix("_tokens")] = tensor
        elif name.startswith("model.mm_projector."):
            number, part = name.split(".")[2:]
            state[f"model.multi_modal_projector.linear_{ {'0': 1, '2': 2}[number] }.{part}"] = tensor
        elif name.startswith("model."):
            state["model.language_model." + name.removeprefix("model.")] = tensor
        else:
            state[name] = tensor
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(key.startswith(("model.vision_tower", "logit_scales")) or ".linear_" in key for key in left.missing_keys)
    return model, tensors


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
