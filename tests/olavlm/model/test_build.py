"""Composing a student from saved parts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor, build_student

TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2]},
    {"name": "depth", "kind": "dense", "queries": 16, "width": 20, "layers": [1], "depth_mlps": True},
]
SMALL = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]


def test_pretrained_parts_arrive_unchanged(tower: str, make_language_model: Callable[..., str]) -> None:
    folder = make_language_model()
    model, _ = build_student(tower, folder, [])
    for name, tensor in CLIPVisionModel.from_pretrained(tower).state_dict().items():
        assert_close(model.model.vision_tower.state_dict()[name], tensor)
    language_model = LlamaForCausalLM.from_pretrained(folder)
    old = language_model.config.vocab_size
    for name, tensor in language_model.model.state_dict().items():
        assert_close(model.model.language_model.state_dict()[name][: len(tensor)], tensor)
    assert_close(model.lm_head.weight[:old], language_model.lm_head.weight)
    assert_close(model.lm_head.weight[old], language_model.lm_head.weight.mean(0))
    assert model.config.llm.vocab_size == old + 1  # <image>


def test_new_parts_depend_on_the_seed_only(tower: str, make_language_model: Callable[..., str]) -> None:
    folder = make_language_model()
    torch.manual_seed(1)
    first = build_student(tower, folder, TASKS, seed=3)[0].state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = build_student(tower, folder, TASKS, seed=3)[0].state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in first.items():
        assert_close(second[name], tensor, atol=0, rtol=0)
    other = build_student(tower, folder, TASKS, seed=4)[0].state_dict()
    for name in ("task_tokens.depth", "model.multi_modal_projector.linear_1.weight", "predictors.gen.2.to_out.weight"):
        assert not torch.equal(other[name], first[name])


def test_new_parts_start_as_published(make_student: Callable[..., Student]) -> None:
    model, _ = make_student()
    assert_close(model.task_tokens["depth"].std(), torch.tensor(1.0), atol=0.15, rtol=0)
    assert all(scale.item() == 2.0 for scale in model.logit_scales.values())
    for linear in (model.model.multi_modal_projector.linear_1, model.predictors["seg"]["4"].mlp_up):
        bound = linear.in_features**-0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound


def test_a_vocabulary_with_room_to_spare_keeps_its_size(
    tower: str, make_language_model: Callable[..., str], tmp_path: Path
) -> None:
    folder = make_language_model()
    language_model = LlamaForCausalLM.from_pretrained(folder)
    language_model.resize_token_embeddings(64, mean_resizing=False)
    language_model.save_pretrained(folder)
    model, processor = build_student(tower, folder, [])
    assert model.config.llm.vocab_size == model.lm_head.weight.shape[0] == 64
    assert processor.image_token_id < 64


def test_dtype_is_of_every_parameter(make_student: Callable[..., Student]) -> None:
    model, _ = make_student(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_siglip_has_no_cls_token_to_drop(
    make_language_model: Callable[..., str], tmp_path: Path, images: list[Image.Image]
) -> None:
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, processor = build_student(str(tmp_path), make_language_model(), [])
    assert model.image_features(processor.pixel_values(images)).shape == (3, 16, 32)


def test_generation_ends_where_the_language_models_does(make_student: Callable[..., Student]) -> None:
    model, processor = make_student()
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.do_sample) == (2, 0, None)
    assert set(model.config.image_block) == set(config.suppress_tokens)
    assert processor.image_block == model.config.image_block


def test_missing_folders_are_named(tower: str, make_language_model: Callable[..., str], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(OlaError, match=r"student.vision_tower: cannot load '.*nowhere' \(no such folder here"):
        build_student(nowhere, make_language_model(), [])
    with pytest.raises(OlaError, match=r"student.language_model: cannot load '.*nowhere' .*hf download"):
        build_student(tower, nowhere, [])


def test_incomplete_or_absent_weights_are_refused(tower: str, make_language_model: Callable[..., str]) -> None:
    folder = Path(make_language_model())
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(OlaError, match=r"lacks 1 tensors, among them model.layers.2.mlp.up_proj.weight"):
        build_student(tower, str(folder), [])
    torch.save(weights | {"model.layers.2.mlp.up_proj.weight": lost}, folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OlaError, match=r"student.language_model: cannot load folder .*safetensors"):
        build_student(tower, str(folder), [])


def test_models_of_another_kind_are_refused(
    tower: str, make_language_model: Callable[..., str], tmp_path: Path
) -> None:
    language_model = make_language_model()
    with pytest.raises(OlaError, match="holds a 'llama' model; expected CLIP or SigLIP"):
        build_student(language_model, language_model, [])
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(OlaError, match="holds a 'gpt2' model; expected a decoder with `layers`"):
        build_student(tower, str(tmp_path), [])


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(logits_scaling=8.0, pad_token_id=0, **SMALL),
        CohereConfig(logit_scale=0.1, **SMALL),
        Gemma2Config(final_logit_softcapping=0.1, head_dim=8, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_a_language_model_whose_logits_a_head_alone_does_not_give_is_refused(
    config: PreTrainedConfig, tower: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(OlaError, match=f"holds a '{config.model_type}' model, which scales or caps what its head"):
        build_student(tower, str(tmp_path), [])


def test_a_tower_without_its_preprocessing_is_refused(tower: str, make_language_model: Callable[..., str]) -> None:
    file = Path(tower) / "preprocessor_config.json"
    kept = json.loads(file.read_text())
    file.unlink()
    try:
        with pytest.raises(OlaError, match=r"student.vision_tower: cannot load folder .*preprocessor_config.json"):
            build_student(tower, make_language_model(), [])
    finally:
        file.write_text(json.dumps(kept))


def test_tasks_that_cannot_be_built_are_refused(make_student: Callable[..., Student]) -> None:
    with pytest.raises(OlaError, match=r"tasks.gen.layers: 9; expected integers from 1 to 4"):
        make_student([{"name": "gen", "kind": "pooled", "queries": 1, "width": 4, "layers": [9]}])
