"""--dry-run tells what can be known."""

import re
from pathlib import Path
from typing import Any

import pytest

from olavlm.config import load_pipeline
from train.plan import plan


def test_the_published_setting_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_pipeline("llava558k-llama3-8b")
    plan(config, "pretrain")
    text = capsys.readouterr().out
    assert "558,128" in text
    assert "2,181" in text  # ceil(558128 / 256)
    assert "1.48 MB" in text  # 576 · (1024 + 1536) values, 2 · 576 scales of 4 bytes, 1024 halves
    plan(config, "finetune")
    assert "8.03" in capsys.readouterr().out


def test_with_the_parts_there_parameters_are_counted(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.config(f"run_dir={tmp_path}")
    plan(config, "pretrain")
    text = capsys.readouterr().out
    for expected in ("24 (counted)", "projector", "1,600 trained", "vision_tower", "memory per device"):
        assert expected in text
    plan(world.config(f"run_dir={tmp_path}", "stages.finetune.lora={rank: 2, layers: [q_proj]}"), "finetune")
    text = capsys.readouterr().out
    assert ", 256 of adapters trained" in text  # 2 layers · 2 · (32 + 32)
    assert re.search(r"each checkpoint.* 22\.3 kB", text)  # of them, and of the projector's 1,600, 12 bytes each
    plan(config, "probe")
    assert "initial, pretrain" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
