"""What a teacher costs: counted against arithmetic by hand, and the command that prints it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from featurize.__main__ import main
from featurize.teachers import published
from featurize.teachers.measure import measure
from olavlm import cli
from olavlm.config import TeacherConfig
from olavlm.errors import OlaError

SIZE, PATCH, WIDTH, BLOCKS, MLP = 64, 16, 24, 3, 4
TINY = {
    "config.json": {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH, "mlp_ratio": MLP,
    },
    "preprocessor_config.json": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}  # fmt: skip


def test_arithmetic_and_parameters_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published.PUBLISHED, "tiny/dino", TINY)
    published.write_random("tiny/dino", tmp_path / "dino")
    config = TeacherConfig(
        teacher="vision_model", weights=str(tmp_path / "dino"), input_size=SIZE, grid=4, width=WIDTH, layers=[0, 1]
    )
    cost = measure(config, Image.new("RGB", (50, 40)), batch=2, device="cpu")
    patches, used = (SIZE // PATCH) ** 2, 2  # the third block is not run
    tokens = patches + 1
    block = 2 * tokens * (4 + 2 * MLP) * WIDTH**2 + 4 * tokens**2 * WIDTH
    assert cost.gflop * 1e9 == 2 * patches * 3 * PATCH**2 * WIDTH + used * block
    assert (cost.tokens, cost.width) == (16, WIDTH)
    assert cost.seconds > 0
    assert cost.memory >= 0


def test_unknown_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"weights 'some/repo': no configuration is known here; known: depth-anything/"):
        published.write_random("some/repo", tmp_path)


def test_the_command_measures_every_teacher_of_a_pipeline(
    world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["featurize", "measure", str(world.file)])
    assert cli.run(main) == 0
    printed = capsys.readouterr().out
    for row in ("depth_anything, float32", "36 × 64", "unclip, float32", "GFLOP / image"):
        assert row in printed
    monkeypatch.setattr(sys, "argv", ["featurize", "measure", str(world.file), "--image", "no/such.jpg"])
    assert cli.run(main) == 2
    assert "error: --image no/such.jpg: " in capsys.readouterr().err
