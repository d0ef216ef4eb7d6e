"""``python -m train``."""

import sys
from pathlib import Path
from typing import Any

import pytest

from olavlm import cli
from train.__main__ import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", *args])
        return cli.run(main)

    return run


def test_errors_are_one_line(world: Any, tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("finetune", str(world.file), f"run_dir={tmp_path}") == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/pretrain: pretrain has not finished; run it first (make pretrain)\n"
    )
    assert command("vpt", str(world.file), f"run_dir={tmp_path}") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_how_to_run_it(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--help")
    assert "torchrun" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(world: Any, tmp_path: Path, command: Any) -> None:
    assert command("pretrain", str(world.file), "--dry-run", f"run_dir={tmp_path}/r") == 0
    assert not (tmp_path / "r").exists()


def test_a_stage_and_its_probe(world: Any, tmp_path: Path, command: Any) -> None:
    overrides = [str(world.file), f"run_dir={tmp_path}", "stages.pretrain.max_steps=1", "probe.steps=1"]
    assert command("pretrain", *overrides) == 0
    assert command("probe", *overrides) == 0
    assert (tmp_path / "probe" / "probe.json").exists()
