"""Published checkpoints become students.

tests/data/published_names.json has every tensor of the published checkpoints as ``name: [count, shape]``; ``*`` stands
for the number of a layer or a head. Tiny checkpoints are laid out after it by `publish`, with values of a student.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor, build_student
from olavlm.model.convert import assign, convert, expected_tensors, student_config, token_ids
from olavlm.model.published import chat_template, read_config

NAMES = json.loads((Path(__file__).parents[2] / "data" / "published_names.json").read_text())
TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2, 4]},
    {"name": "depth", "kind": "dense", "queries": 16, "width": 20, "layers": [3, 1], "depth_mlps": True},
    {"name": "seg", "kind": "dense", "queries": 16, "width": 8, "layers": [1, 4]},
]
#: Keys that training adds to a language model's configuration (of `full_model` in the reference, but for sizes).
SETTINGS: dict[str, Any] = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 4096,
    "image_aspect_ratio": "square",
    "aux_mode": "gen-depth-seg",
    "contrastive_loss_weight": 0.3,
    "num_task_tokens": 8,
    "task_token_format": "expand_emb",
    "pass_text_to_aux": True,
    "use_contrastive": True,
    "use_cache": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
}
TURNS = [
    {"from": "human", "value": "<image>\nwhat"},
    {"from": "gpt", "value": "this"},
    {"from": "human", "value": "is"},
]
HEAD = {"depth": 1, "dim_head": 32, "num_heads": 4, "ff_mult": 1}
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
}
TEACHERS = {
    "da_v2_head.depth_head.projects.0.weight": torch.ones(2, 2, 1, 1),
    "dav2_backbone.pretrained.cls_token": torch.ones(1, 1, 4),
    "oneformer.pixel_level_module.encoder.embeddings.norm.weight": torch.ones(3),
    "gen_encoder.vision_model.embeddings.class_embedding": torch.ones(3),
}
CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
LLAMA3: dict[str, Any] = SETTINGS | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "image_gen": HEAD | {"num_tokens": 1, "output_dim": 1024, "img_layer_indices": "12-20"},
    "image_depth": HEAD | {"num_tokens": 576, "output_dim": 1024, "depth_layer_indices": "18-20"},
    "image_seg": HEAD | {"num_tokens": 576, "output_dim": 1536, "seg_layer_indices": "10-18"},
}
Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
State = dict[str, Tensor]


def publish(student: OlaVlmForConditionalGeneration, rows: int) -> State:
    """A student's tensors under their published names, the vocabulary without the rows added for its markers."""
    subs = [
        (r"^model\.language_model\.", "model."),
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^task_tokens\.(\w+)$", r"model.special_\1_tokens"),
        (r"^logit_scales\.(\w+)$", r"\1_logit_scale"),
        (r"^predictors\.(\w+)\.(\d+)\.(linear_\d)\.", r"image_\1_heads.@\2.\3."),
        (r"^predictors\.(\w+)\.(\d+)\.", r"image_\1_heads.@\2.projector."),
        (r"projector\.project_in\.", "projector.proj_in."),
        (r"projector\.project_out\.", "projector.proj_out."),
        (r"projector\.norm_hidden\.", "projector.layers.0.0.norm1."),
        (r"projector\.norm_latents\.", "projector.layers.0.0.norm2."),
        (r"projector\.to_query\.", "projector.layers.0.0.to_q."),
        (r"projector\.to_key_value\.", "projector.layers.0.0.to_kv."),
        (r"projector\.to_out\.", "projector.layers.0.0.to_out."),
        (r"projector\.norm_mlp\.", "projector.layers.0.1.0."),
        (r"projector\.mlp_up\.", "projector.layers.0.1.1."),
        (r"projector\.mlp_down\.", "projector.layers.0.1.3."),
    ]
    state = {}
    for name, tensor in student.state_dict().items():
        for pattern, replacement in subs:
            name = re.sub(pattern, replacement, name)
        for task in student.config.task_configs:  # heads are numbered in the order of the layers' configuration
            for number, layer in enumerate(task.layers):
                name = name.replace(f"image_{task.name}_heads.@{layer}.", f"image_{task.name}_heads.{number}.")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:rows]
        state[name] = tensor.squeeze().clone() if name.endswith("_logit_scale") else tensor.clone()
    return state


def settings(student: OlaVlmForConditionalGeneration, kind: str, rows: int, **changes: Any) -> dict[str, Any]:
    """A published ``config.json``: the language model's keys, flat, and those of training beside them."""
    text = student.config.llm
    config = {
        key: getattr(text, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "max_position_embeddings",
        )
    }
    config |= SETTINGS | {
        "model_type": f"{kind}_{text.model_type}",
        "vocab_size": rows,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
    }
    for task, prefix in (("gen", "img"), ("depth", "depth"), ("seg", "seg")):
        for ours in student.config.task_configs:
            if ours.name == task:
                config[f"image_{task}"] = HEAD | {
                    "num_tokens": ours.queries,
                    "output_dim": ours.width,
                    f"{prefix}_layer_indices": "-".join(map(str, ours.layers)),
                    f"{prefix}_loss_weight": 0.5,
                }
    return config | changes


def write(folder: Path, state: State, config: dict[str, Any], tokenizer: str | None = None) -> str:
    """A published folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def build(tower: str, language_model: str, tasks: list[dict[str, Any]] = TASKS, **kwargs: Any) -> Student:
    """A student whose every tensor is random, logit scales and biases too."""
    model, processor = build_student(tower, language_model, tasks, view="center_crop", **kwargs)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("predictors.", "logit_scales.", "model.multi_modal_projector.")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model, processor


def rows_of(language_model: str) -> int:
    return int(json.loads((Path(language_model) / "config.json").read_text())["vocab_size"])


def after_finetuning(state: State) -> State:
    """What instruction tuning saves: neither predictors nor logit scales."""
    return {name: t for name, t in state.items() if "_heads." not in name and "_logit_scale" not in name}


def expand(patterns: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name.replace("*", str(i)): tuple(shape) for name, (count, shape) in patterns.items() for i in range(count)}


def account(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], vision_config: CLIPVisionConfig
) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """What becomes of a checkpoint's tensors, and all that the student needs; no values, no memory."""
    published = read_config(config, shapes, "config.json")
    ours = student_config(published, published.text_config, vision_config, token_ids(published, None))
    expected = expected_tensors(ours)
    return *assign(shapes, expected, "checkpoint"), {name for name, _ in expected.values()}


@pytest.fixture(scope="module")
def llama(make_language_model: Callable[..., str]) -> str:
    return make_language_model()


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Phi-3 whose tokenizer knows the published conversation and lets texts begin with <s>."""
    folder = tmp_path_factory.mktemp("phi3")
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "what",
        "is",
        "this",
    ]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos_token=True,
    )
    tokenizer.add_tokens(words[4:8], special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    config = Phi3Config(
        vocab_size=64,  # larger than the tokenizer, as the real one's
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.2,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student(tower: str, llama: str) -> Student:
    return build(tower, llama)


@pytest.fixture(scope="module")
def state(student: Student, llama: str) -> State:
    """After pretraining, teachers and buffers inside."""
    return publish(student[0], rows_of(llama)) | TEACHERS | BUFFERS


@pytest.fixture
def config(student: Student, llama: str) -> dict[str, Any]:
    return settings(student[0], "ola", rows_of(llama))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("stage", ["pretraining", "finetuning"])
@torch.no_grad()
def test_a_converted_student_computes_what_the_published_one_did(
    request: pytest.FixtureRequest, tower: str, family: str, stage: str, images: list[Image.Image], tmp_path: Path
) -> None:
    language_model = request.getfixturevalue(family)
    model, processor = build(tower, language_model)
    rows = rows_of(language_model)
    state = publish(model, rows)
    assert (f"model.layers.0.self_attn.{'qkv' if family == 'phi3' else 'q'}_proj.weight") in state
    if stage == "finetuning":
        state, config = after_finetuning(state), settings(model, "llava", rows, image_aspect_ratio="pad")
        processor.view = "pad"
    else:
        config = settings(model, "ola", rows)
    checkpoint = write(tmp_path / "published", state, config, language_model)
    account = convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    assert account.renamed.keys() == state.keys()
    assert not account.dropped

    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    processor_again = OlaVlmProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(again, OlaVlmForConditionalGeneration)
    text = ["what <image> is this", "this is"]
    inputs, inputs_again = processor(text=text, images=images[:1]), processor_again(text=text, images=images[:1])
    for name in inputs:
        assert torch.equal(inputs_again[name], inputs[name])
    before, after = model(**inputs, predict=True), again(**inputs, predict=True)
    assert_close(after.logits[..., :rows], before.logits[..., :rows], atol=1e-6, rtol=1e-6)
    if stage == "pretraining":
        assert after.predictions.keys() == before.predictions.keys() == {"gen", "depth", "seg"}
        for task, by_layer in before.predictions.items():
            assert after.predictions[task].keys() == by_layer.keys()
            for layer, prediction in by_layer.items():
                assert_close(after.predictions[task][layer], prediction, atol=1e-6, rtol=1e-6)
        for task, scale in model.logit_scales.items():
            assert torch.equal(again.logit_scales[task], scale)
    else:
        assert after.predictions == {"gen": {}, "depth": {}, "seg": {}}
        assert {*account.initialised} == {"logit_scales.gen", "logit_scales.depth", "logit_scales.seg"}
        assert all(scale.item() == 2.0 for scale in again.logit_scales.values())
    prompt = "<image> what is this"
    replies = [
        one.generate(**p(text=prompt, images=images[:1]), max_new_tokens=6)
        for one, p in ((model, processor), (again, processor_again))
    ]
    assert torch.equal(*replies)
    assert again.generation_config.suppress_tokens == sorted({*again.config.image_block})
    assert again.config.llm.use_cache  # training had it off


@pytest.mark.parametrize(
    "checkpoint", ["ola_llama3_8b_clipL_pt", "ola_llama3_8b_no_task_tokens", "llava_llama3_8b_ift"]
)
def test_every_published_name_and_shape_is_a_tensor_of_the_full_size_student(checkpoint: str) -> None:
    shapes = expand(NAMES[checkpoint])
    config = LLAMA3 | {"num_task_tokens": 0 if "no_task" in checkpoint else 8}
    config["model_type"] = "llava_llama" if checkpoint.startswith("llava") else "ola_llama"
    renamed, dropped, expected = account(shapes, config, CLIP_L)
    assert renamed.keys() | dropped.keys() == shapes.keys()
    assert {name.split(".")[0] for name in dropped} <= {"da_v2_head"}
    left = expected - set(renamed.values())
    assert {name.split(".")[0] for name in left} == ({"logit_scales"} if checkpoint.startswith("llava") else set())


@pytest.mark.parametrize("task", ["gen", "seg"])
def test_every_published_probe_is_a_predictor(task: str) -> None:
    shapes = expand(NAMES[f"probe_{task}"])
    config = {k: v for k, v in LLAMA3.items() if k not in ("aux_mode", "num_task_tokens", "image_depth")}
    config |= {"model_type": "probe_dsg_llava_llama", "probe_mode": task}
    renamed, _, expected = account(shapes, config, CLIP_L)
    assert renamed.keys() == shapes.keys()
    assert set(renamed.values()) == {ours for ours in expected if ours.startswith("predictors.")}
    assert renamed[f"image_{task}_heads.31.projector.latents"] == f"predictors.{task}.32.latents"


@pytest.mark.parametrize("checkpoint", ["ola_llama3_8b_clipL_pt", "llava_llama3_8b_ift"])
def test_the_tiny_checkpoints_are_laid_out_as_published(state: State, checkpoint: str) -> None:
    ours = {name: t for name, t in state.items() if name not in BUFFERS and name not in TEACHERS}
    if checkpoint.startswith("llava"):
        ours = after_finetuning(ours)
    collapsed = {
        re.sub(r"(?<=layers\.)\d+(?=\.(self|mlp|input|post|layer))|(?<=_heads\.)\d+", "*", name) for name in ours
    }
    published = {name for name in NAMES[checkpoint] if not name.startswith("da_v2_head.")}
    assert collapsed == published


def test_teachers_and_buffers_are_dropped_and_named(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "published", state, config)
    account = convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    assert account.dropped.keys() == TEACHERS.keys() | BUFFERS.keys()
    assert account.dropped["gen_encoder.vision_model.embeddings.class_embedding"].startswith("generation teacher")
    assert account.renamed.keys() | account.dropped.keys() == state.keys()
    written = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert written["dropped"] == account.dropped
    assert written["renamed"] == account.renamed
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == set(account.renamed.values())
    for theirs, ours in account.renamed.items():
        assert torch.equal(saved[ours].squeeze(), state[theirs].squeeze())


def shards(state: State) -> tuple[State, State]:
    names = sorted(state)
    return {n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}


def index(parts: tuple[State, ...], files: list[str]) -> str:
    return json.dumps({"weight_map": {name: file for part, file in zip(parts, files, strict=True) for name in part}})


def sharded_safetensors(folder: Path, state: State) -> None:
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for part, file in zip(shards(state), files, strict=True):
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(index(shards(state), files))


def single_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def old_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_bin(folder: Path, state: State) -> None:
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for part, file in zip(shards(state), files, strict=True):
        torch.save(part, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(index(shards(state), files))


@pytest.mark.parametrize("layout", [sharded_safetensors, single_bin, old_bin, sharded_bin])
def test_all_layouts_give_the_same(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path, layout: Callable[[Path, State], None]
) -> None:
    expected = convert(write(tmp_path / "single", state, config), tmp_path / "expected", vision_tower=tower)
    published = tmp_path / "published"
    published.mkdir()
    layout(published, state)
    (published / "config.json").write_text(json.dumps(config))
    account = convert(str(published), tmp_path / "ours", vision_tower=tower, shard_bytes=40_000)
    assert account.renamed == expected.renamed
    assert account.dropped == expected.dropped
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    first = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "expected").state_dict()
    second = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize("content", [{"model.norm.weight": Unsafe()}, {"model.norm.weight": "text"}, [torch.ones(1)]])
def test_nothing_but_tensors_is_unpickled(
    config: dict[str, Any], tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OlaError, match=r"pytorch_model\.bin: (cannot be read|not a dictionary of tensors)"):
        convert(str(tmp_path), tmp_path / "ours", vision_tower=tower)
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()


def test_bf16_stays_bf16(tower: str, llama: str, tmp_path: Path) -> None:
    model, _ = build(tower, llama, dtype=torch.bfloat16)
    rows = rows_of(llama)
    checkpoint = write(tmp_path / "published", publish(model, rows), settings(model, "ola", rows), llama)
    convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    again = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours")
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, state[name]), name
    assert {t.dtype for t in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_projector_alone_takes_language_model_and_tower_from_elsewhere(
    tower: str, llama: str, tmp_path: Path
) -> None:
    model, _ = build(tower, llama, tasks=[])
    folder = tmp_path / "published"
    folder.mkdir()
    projector = {name: t for name, t in publish(model, rows_of(llama)).items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    given = settings(model, "llava", rows_of(llama))
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in given.items() if k not in ("aux_mode", "num_task_tokens")})
    )
    with pytest.raises(OlaError, match=r"no language model inside; .* --language-model"):
        convert(str(folder), tmp_path / "ours", vision_tower=tower)
    account = convert(str(folder), tmp_path / "ours", vision_tower=tower, language_model=llama)
    assert account.renamed.keys() == projector.keys()
    assert {Path(where) for where in account.supplied.values()} == {Path(tower), Path(llama)}
    again = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    state = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    processor = OlaVlmProcessor.from_pretrained(tmp_path / "ours")
    assert processor.image_token_id == rows_of(llama)


def test_without_a_tokenizer_the_vocabulary_stays_as_published(
    state: State, config: dict[str, Any], tower: str, llama: str, tmp_path: Path
) -> None:
    convert(write(tmp_path / "published", state, config), tmp_path / "ours", vision_tower=tower)
    again = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.lm_head.weight.shape[0] == rows_of(llama)
    assert again.config.image_token_index == -200
    assert again.config.image_block == [-200] * 16 + list(range(-201, -225, -1))
    assert not (tmp_path / "ours" / "tokenizer.json").exists()


@pytest.mark.parametrize("order", ["gen-depth-seg", "depth-seg-gen", "seg-gen"])
def test_task_order_and_layers_are_the_configurations(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path, order: str
) -> None:
    tasks = order.split("-")
    kept = {n: t for n, t in state.items() if all(task in tasks or task not in n for task in ("gen", "depth", "seg"))}
    convert(write(tmp_path / "published", kept, config | {"aux_mode": order}), tmp_path / "ours", vision_tower=tower)
    ours = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    layers = {"gen": (2, 4), "depth": (3, 1), "seg": (1, 4)}
    assert [(task.name, task.layers) for task in ours.task_configs] == [(task, layers[task]) for task in tasks]


def test_layer_0_is_the_last(state: State, config: dict[str, Any], tower: str, tmp_path: Path) -> None:
    config["image_gen"]["img_layer_indices"] = "2-0"
    convert(write(tmp_path / "published", state, config), tmp_path / "ours", vision_tower=tower)
    ours = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert ours.task_configs[0].layers == (2, 4)


def test_sizes_that_the_configuration_leaves_out_come_from_the_tensors(
    state: State, config: dict[str, Any], student: Student, tower: str, tmp_path: Path
) -> None:
    del config["num_task_tokens"]
    for task in ("gen", "depth", "seg"):
        for key in ("num_tokens", "output_dim"):
            del config[f"image_{task}"][key]
    convert(write(tmp_path / "published", state, config), tmp_path / "ours", vision_tower=tower)
    ours = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert ours.task_configs == student[0].config.task_configs


@pytest.mark.parametrize(("aspect", "view"), [("pad", "pad"), ("square", "center_crop"), (None, "center_crop")])
def test_the_view_is_the_one_it_was_trained_in(
    state: State, config: dict[str, Any], tower: str, llama: str, tmp_path: Path, aspect: str | None, view: str
) -> None:
    checkpoint = write(tmp_path / "published", state, config | {"image_aspect_ratio": aspect}, llama)
    convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    assert OlaVlmProcessor.from_pretrained(tmp_path / "ours").view == view


def test_the_published_conversation_is_the_chat_template(tower: str, phi3: str, tmp_path: Path) -> None:
    model, _ = build(tower, phi3)
    rows = rows_of(phi3)
    checkpoint = write(tmp_path / "published", publish(model, rows), settings(model, "ola", rows), phi3)
    convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    processor = OlaVlmProcessor.from_pretrained(tmp_path / "ours")
    assert processor.prompt(TURNS) == (
        "<s><|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nwhat<|end|>"
        "\n<|assistant|>\nthis<|end|>\n<|user|>\nis<|end|>\n<|assistant|>\n"
    )
    assert processor.prompt([{"from": "system", "value": "red"}, *TURNS]).startswith("<s><|system|>\nred<|end|>\n")
    _, labels, _ = processor.encode_conversation(TURNS, max_length=100)
    learned = processor.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert learned == ["this", "<|end|>"]
    ends = OlaVlmForConditionalGeneration.from_pretrained(tmp_path / "ours").generation_config.eos_token_id
    assert processor.tokenizer.convert_ids_to_tokens(ends) == ["</s>", "<|end|>"]


def test_the_published_conversation_of_llama_3(llama: str) -> None:
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in TURNS
    ]
    text = PreTrainedTokenizerFast.from_pretrained(llama).apply_chat_template(
        messages, chat_template=chat_template("llama", bos=False), tokenize=False, add_generation_prompt=True
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    said = [("system", system), ("user", "<image>\nwhat"), ("assistant", "this"), ("user", "is"), ("assistant", "")]
    assert text == "<|eot_id|>".join(header.format(*one) for one in said)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "multi_enc_llava_llama", "model_type: 'multi_enc_llava_llama'; expected ola_llama"),
        ("model_type", "llava_llama", "image_gen: .* 0 predictors .*; the checkpoint has 2 image_gen_heads"),
        ("mm_projector_type", "linear", "mm_projector_type: 'linear'; expected 'mlp2x_gelu'"),
        ("mm_vision_select_feature", "cls_patch", "mm_vision_select_feature: 'cls_patch'; expected 'patch'"),
        ("mm_patch_merge_type", "spatial_unpad", "mm_patch_merge_type: 'spatial_unpad'"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end: True"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio: 'anyres'; expected 'pad' or 'square'"),
        ("mm_vision_tower", "laion/CLIP-convnext_xxlarge", "mm_vision_tower: .* no ConvNeXt tower"),
        ("aux_mode", None, "aux_mode: missing; expected the order"),
        ("aux_mode", "gen-depth-sam", "aux_mode: 'gen-depth-sam'; expected some of gen, depth, seg"),
        ("num_task_tokens", 4, "num_task_tokens: 4; the tensors say 8"),
        ("task_token_format", "text", "task_token_format: 'text'; expected 'expand_emb'"),
        ("image_gen", "12-20", "image_gen: '12-20'; expected a dictionary"),
        ("image_gen.num_heads", 8, r"image_gen\.num_heads: 8; expected 4"),
        ("image_gen.output_dim", 99, r"image_gen\.output_dim: 99; the tensors say 12"),
        ("image_seg.num_tokens", 64, r"image_seg\.num_tokens: 64; the tensors say 16"),
        ("image_depth.use_intermediate_depth", False, r"use_intermediate_depth: False; the tensors say True"),
        ("image_seg.seg_layer_indices", "1", r"image_seg: .* 1 predictors \(layers 1\); the checkpoint has 2"),
        ("image_seg.seg_layer_indices", "1-5", "layers: 5; expected integers from 1 to 4"),
        ("image_seg.seg_layer_indices", "1,4", r"image_seg\.seg_layer_indices: '1,4'; expected layers joined by '-'"),
        ("vocab_size", 400, r"(embed_tokens|lm_head)\.weight: shape .*; expected \[400, 32\]"),
        ("hidden_size", "wide", "no configuration of a llama: .*hidden_size"),
    ],
)
def test_contradictions_and_what_the_student_cannot_be(
    state: State, config: dict[str, Any], tower: str, path: str, value: Any, message: str
) -> None:
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(OlaError, match=message):
        account(shapes, config, CLIPVisionConfig.from_pretrained(tower))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.extra.weight": torch.ones(2)}, r"model\.extra\.weight: unknown tensor, of shape \[2\]"),
        ({"image_gen_heads.0.projector.proj_in.bias": None}, r"image_gen_heads\.0\.projector\.proj_in\.bias: missing$"),
        ({"model.layers.1.mlp.up_proj.weight": None, "lm_head.weight": None}, r": missing \(and 1 more\)"),
        ({"seg_logit_scale": None}, "seg_logit_scale: missing"),
        (
            {"model.special_depth_tokens": torch.ones(16, 31)},
            r"special_depth_tokens: shape \[16, 31\]; expected \[16, 32\]",
        ),
        ({"model.mm_projector.0.weight": torch.ones(32, 17)}, r"mm_projector\.0\.weight: shape \[32, 17\]"),
    ],
)
def test_a_tensor_unknown_missing_or_of_another_shape(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    with pytest.raises(OlaError, match=message):
        convert(write(tmp_path / "published", changed, config), tmp_path / "ours", vision_tower=tower)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_files_that_are_missing_damaged_or_do_not_match(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path
) -> None:
    folder, out = tmp_path / "published", tmp_path / "ours"
    folder.mkdir()

    def refused(message: str) -> None:
        with pytest.raises(OlaError, match=message):
            convert(str(folder), out, vision_tower=tower)
        assert not out.exists()

    refused(r"no weights here; expected one of model\.safetensors\.index\.json")
    (folder / "model.safetensors").write_bytes(b"no such thing")
    refused(r"model\.safetensors: cannot be read")
    sharded_safetensors(folder, state)
    refused(r"config\.json: missing")
    (folder / "config.json").write_text("{")
    refused(r"config\.json: not JSON")
    (folder / "config.json").write_text("[]")
    refused(r"config\.json: not a dictionary")
    (folder / "config.json").write_text(json.dumps(config))
    write_index = (folder / "model.safetensors.index.json").write_text
    known = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(json.dumps({"weight_map": known | {"model.more": "model-00001-of-00002.safetensors"}}))
    refused(r"model\.more is named here but in no file")
    write_index(json.dumps({"weight_map": {k: v for k, v in known.items() if k != "model.norm.weight"}}))
    refused(r"model\.norm\.weight is not named here")
    write_index(json.dumps({"weight_map": known | {"model.norm.weight": "gone.safetensors"}}))
    refused(r"gone\.safetensors: missing; the index names it")
    write_index("[]")
    refused("not an index of weights")


def test_a_folder_that_is_there_is_not_overwritten(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "published", state, config)
    (tmp_path / "ours").mkdir()
    (tmp_path / ".ours.1-dead.tmp").mkdir()  # of a killed conversion
    (tmp_path / "ours" / "mine").touch()
    with pytest.raises(OlaError, match="ours: already there"):
        convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    (tmp_path / "ours" / "mine").unlink()
    convert(checkpoint, tmp_path / "ours", vision_tower=tower)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "published"]


def test_a_sentencepiece_tokenizer_without_sentencepiece(
    state: State, config: dict[str, Any], tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path / "published", state, config)
    (Path(checkpoint) / "tokenizer.model").touch()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(OlaError, match=r"tokenizer\.model: is read by sentencepiece, .* pip install sentencepiece"):
        convert(checkpoint, tmp_path / "ours", vision_tower=tower)


def test_a_tower_that_is_none(state: State, config: dict[str, Any], llama: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "published", state, config)
    with pytest.raises(OlaError, match="vision tower: 'llama'; expected 'clip_vision_model'"):
        convert(checkpoint, tmp_path / "ours", vision_tower=llama)
    with pytest.raises(OlaError, match=r"nowhere: cannot be loaded: .* Expected a folder in"):
        convert(checkpoint, tmp_path / "ours", vision_tower=str(tmp_path / "nowhere"))
