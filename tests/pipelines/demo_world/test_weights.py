"""What ships in ``pipelines/demo_world/weights``: it loads the usual way, is small, and knows its world."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    LlamaForCausalLM,
    OneFormerForUniversalSegmentation,
    OneFormerProcessor,
)

from pipelines.demo_world import gates
from pipelines.demo_world.build import tell
from pipelines.demo_world.language import text_only
from pipelines.demo_world.samples import Samples, render_samples

WEIGHTS = Path(__file__).parents[3] / "pipelines" / "demo_world" / "weights"
FOLDERS = ("depth", "seg", "gen/image_encoder", "student/vision", "student/llm")


@pytest.fixture(scope="module")
def unseen() -> Samples:
    return render_samples("gates", 100, seed=1, workers=1)


def test_all_together_stay_below_ten_megabytes() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 10e6


@pytest.mark.parametrize("folder", FOLDERS)
def test_stored_in_half_precision_safetensors(folder: str) -> None:
    config = json.loads((WEIGHTS / folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert (WEIGHTS / folder / "model.safetensors").is_file()


def test_depth_teacher_sees_depth(unseen: Samples) -> None:
    model = DepthAnythingForDepthEstimation.from_pretrained(WEIGHTS / "depth", dtype=torch.float32)
    found = gates.depth(model.eval(), unseen)
    assert found["delta1"] > 0.75
    assert found["delta1_from_target"] > 0.75


def test_segmentation_teacher_sees_classes(unseen: Samples) -> None:
    model = OneFormerForUniversalSegmentation.from_pretrained(WEIGHTS / "seg", dtype=torch.float32)
    found = gates.segmentation(model.eval(), unseen)
    assert found["miou"] > 0.4
    assert found["miou_from_target"] > 0.3


def test_segmentation_teacher_runs_by_its_own_processor(unseen: Samples) -> None:
    model = OneFormerForUniversalSegmentation.from_pretrained(WEIGHTS / "seg", dtype=torch.float32).eval()
    processor = OneFormerProcessor.from_pretrained(WEIGHTS / "seg")
    inputs = processor(Image.fromarray(unseen.images[0]), ["semantic"], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 64)])
    assert (labels.numpy() == unseen.semantic[0]).mean() > 0.8


def test_generation_target_is_not_trivial_for_the_student(unseen: Samples) -> None:
    teacher = CLIPVisionModelWithProjection.from_pretrained(WEIGHTS / "gen" / "image_encoder", dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(WEIGHTS / "student" / "vision", dtype=torch.float32)
    assert teacher.config.projection_dim == 96
    assert (tower.config.image_size // tower.config.patch_size) ** 2 == 64
    assert gates.generation(teacher.eval(), tower.eval(), unseen)["r2_from_tower"] < 0.9


def test_language_model_knows_every_word_of_the_world() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "student" / "llm")
    told = [t for chunk in tell("finetune", 100, 1, 1) for t in chunk]
    texts = [turn["value"].removeprefix("<image>\n") for t in told for turn in t.caption]
    texts += [q.prompt for t in told for q in t.questions]
    rng = np.random.default_rng(0)
    texts += [text for _ in range(50) for text in text_only(rng)]
    for text in texts:
        pieces = tokenizer.tokenize(text)
        assert not any(piece.startswith("##") for piece in pieces), pieces
        assert tokenizer.unk_token not in pieces


def test_language_model_answers_in_its_chat_format() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "student" / "llm")
    model = LlamaForCausalLM.from_pretrained(WEIGHTS / "student" / "llm", dtype=torch.float32).eval()
    question = "Which number is larger, 2 or 5?"
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    replies = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(replies[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply.startswith("The number"), reply


def test_nothing_points_to_where_it_was_made() -> None:
    for file in WEIGHTS.rglob("*.json"):
        assert "/tmp" not in file.read_text()
        assert "/work" not in file.read_text()
