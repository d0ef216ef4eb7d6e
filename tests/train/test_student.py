"""What a stage's student is refused for before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from olavlm.errors import OlaError
from train import student


def test_stated_image_tokens_must_be_the_towers(world: Any) -> None:
    with pytest.raises(OlaError, match=r"student.image_tokens: 9; .* makes \d+ per image"):
        student.create(world.config("student.image_tokens=9"))
    made = student.create(world.config())[0].config.image_seq_length
    student.create(world.config(f"student.image_tokens={made}"))


def test_samples_may_not_be_longer_than_the_language_models_context(world: Any) -> None:
    student.start(world.config("stages.pretrain.max_length=2048"), "pretrain")
    with pytest.raises(OlaError, match=r"stages\.pretrain\.max_length: 2049; the language model's context has 2048"):
        student.start(world.config("stages.pretrain.max_length=2049"), "pretrain")


def test_a_model_folder_must_agree_on_what_an_image_is(world: Any, tmp_path: Path) -> None:
    model, processor = student.create(world.config())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    student.load(tmp_path)
    for file, message in (
        ("processor_config.json", r"the processor writes \d+ tokens per image \(9 image tokens\), the model reads"),
        ("config.json", r"image_seq_length: 9; expected \d+ for a clip_vision_model"),
    ):
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | {"image_seq_length": 9}))
        with pytest.raises(OlaError, match=message):
            student.load(tmp_path)
