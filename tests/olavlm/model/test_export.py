"""A student exported as a stock LLaVA generates the same tokens where this package cannot be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor, build_student
from olavlm.model.export import export_plain, image_text

TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2], "task_tokens": 2},
    {"name": "depth", "kind": "dense", "queries": 16, "width": 20, "layers": [1], "task_tokens": 4},
]
BOS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
QUESTIONS = [("what is this", 1), ("is there a red cube", 0), ("what", 2), ("one", 1)]

#: Run where importing olavlm fails: loads every folder, asks the questions one by one and as one batch.
STOCK = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "olavlm":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
try:
    import olavlm
except ImportError:
    pass
else:
    raise SystemExit("olavlm could be imported")

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

torch.set_num_threads(1)
folders, images, questions = json.loads(sys.argv[1])
images = [Image.open(file).convert("RGB") for file in images]
replies = {}
for name, folder in folders.items():
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    texts, pictures = [], []
    for question, count in questions:
        content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        pictures.append(images[:count])
    def ask(texts, pictures):
        inputs = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        out = model.generate(**inputs.to(model.dtype), max_new_tokens=8)
        return {"ids": inputs["input_ids"].tolist(), "new": out[:, inputs["input_ids"].shape[1]:].tolist()}
    replies[name] = {
        "dtype": str(model.dtype),
        "single": [ask([t], p) for t, p in zip(texts, pictures)],
        "batch": ask(texts, sum(pictures, [])),
    }
print(json.dumps(replies))
"""
VARIANTS = ["llama", "tied", "bf16", "siglip", "plain"]


class Exported(NamedTuple):
    model: OlaVlmForConditionalGeneration
    processor: OlaVlmProcessor
    folder: Path


@pytest.fixture(scope="module")
def exported(
    tower: str, make_language_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """Students of every kind, exported."""
    root = tmp_path_factory.mktemp("exported")
    bos = make_language_model(chat_template=BOS_TEMPLATE)
    PreTrainedTokenizerFast.from_pretrained(bos, add_bos_token=True).save_pretrained(bos)
    torch.manual_seed(6)
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(siglip).save_pretrained(root / "siglip_tower")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "siglip_tower")
    students = {
        "llama": build_student(tower, make_language_model(), TASKS, view="squash"),
        "tied": build_student(tower, make_language_model(tie=True), TASKS, view="center_crop"),
        "bf16": build_student(tower, bos, TASKS, view="pad", dtype=torch.bfloat16),
        "siglip": build_student(str(root / "siglip_tower"), make_language_model(), TASKS),
        "plain": build_student(tower, make_language_model(), []),
    }
    assert [*students] == VARIANTS
    found = {}
    for name, (built, processor) in students.items():
        built.save_pretrained(root / f"{name}_student")
        model = OlaVlmForConditionalGeneration.from_pretrained(root / f"{name}_student")
        model.generation_config.eos_token_id = None  # go on to the end
        export_plain(model, processor, root / name)
        found[name] = Exported(model, processor, root / name)
    return found


@pytest.fixture(scope="module")
def stock_replies(
    exported: dict[str, Exported], images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What stock LLaVAs reply in a process that cannot import olavlm."""
    folder = tmp_path_factory.mktemp("stock")
    files = [folder / f"{i}.png" for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    folders = {name: str(one.folder) for name, one in exported.items()}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps([folders, [str(file) for file in files], QUESTIONS])],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replies: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return replies


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stock_model_generates_the_same_tokens(
    exported: dict[str, Exported], stock_replies: dict[str, Any], images: list[Image.Image], variant: str
) -> None:
    model, processor, _ = exported[variant]
    replies = stock_replies[variant]
    assert replies["dtype"] == str(model.dtype)
    texts, pictures = [], []
    for question, count in QUESTIONS:
        texts.append(processor.prompt([{"from": "human", "value": "<image>\n" * count + question}]))
        pictures.append(images[:count])

    def ask(texts: list[str], pictures: list[Image.Image]) -> dict[str, Any]:
        inputs = processor(text=texts, images=pictures).to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        return {"ids": inputs["input_ids"].tolist(), "new": out.tolist()}

    assert replies["single"] == [ask([text], own) for text, own in zip(texts, pictures, strict=True)]
    assert replies["batch"] == ask(texts, [image for own in pictures for image in own])
    assert len({tuple(reply["new"][0]) for reply in replies["single"]}) > 1  # the questions matter


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_what_is_baked_and_what_is_left_out(exported: dict[str, Exported], variant: str) -> None:
    model, processor, folder = exported[variant]
    saved = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    ours = model.state_dict()
    assert len(load_file(folder / "model.safetensors")) == len(saved)
    embeddings = "model.language_model.embed_tokens.weight"
    assert saved.keys() == {name for name in ours if name.startswith("model.")} | {"lm_head.weight"}
    assert all(torch.equal(saved[name], ours[name]) for name in saved if name != embeddings)
    baked = processor.image_block[processor.image_seq_length :]
    words = [i for i in range(len(saved[embeddings])) if i not in baked]
    assert torch.equal(saved[embeddings][words], ours[embeddings][words])
    assert torch.equal(saved[embeddings][baked], model.inserted_tokens())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == sorted({*processor.image_block})


def test_exporting_leaves_the_student_as_it_was(exported: dict[str, Exported]) -> None:
    model, processor, folder = exported["tied"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.llm.tie_word_embeddings
    assert exported["bf16"].processor.tokenizer("what").input_ids[0] == 1  # still begins texts with <s>
    assert AutoTokenizer.from_pretrained(exported["bf16"].folder)("what").input_ids[0] != 1
    with pytest.raises(OlaError, match="already there"):
        export_plain(model, processor, folder)


def test_the_text_of_an_image(exported: dict[str, Exported]) -> None:
    assert image_text(exported["llama"].processor) == "<image><gen_0><gen_1><depth_0><depth_1><depth_2><depth_3>"
    assert image_text(exported["plain"].processor) == "<image>"


def test_what_cannot_be_exported(exported: dict[str, Exported], tmp_path: Path) -> None:
    model, processor, _ = exported["siglip"]
    processor.view = "pad"
    with pytest.raises(
        OlaError, match=r"view 'pad' pads with \(122, 116, 104\), a stock LLaVA .* here \(127, 127, 127\)"
    ):
        export_plain(model, processor, tmp_path / "out")
    processor.view = "squash"
    with pytest.raises(OlaError, match="expected the model's own"):
        export_plain(exported["plain"].model, exported["llama"].processor, tmp_path / "out")
    assert not any(tmp_path.iterdir())
