import argparse
import os
from pathlib import Path

import pytest

from featurize.corpus.cli import add_commands
from olavlm.cli import run
from olavlm.data.corpus import Corpus


@pytest.fixture
def command():
    """Runs a command line and returns its exit code."""

    def call(*arguments) -> int:
        parser = argparse.ArgumentParser(prog="featurize")
        add_commands(parser.add_subparsers(required=True))
        args = parser.parse_args([str(argument) for argument in arguments])
        return run(lambda: args.command(args))

    return call


def test_pack_says_what_it_did(source, tmp_path, command, capsys):
    source.add_many(range(3))
    source.add("gone", "gone.jpg")
    source.add("s0", "1.jpg")
    out = tmp_path / "out"
    pack = ["pack", "--llava-json", source.write(), "--images", source.images, "--out", out, "--samples-per-tar", 2]
    assert command(*pack) == 0
    said = capsys.readouterr().out
    assert "added 2 tars, 4 samples, 4 images" in said
    assert "1 left out or undecodable" in said
    assert "gone.jpg: not found in" in said
    assert "duplicate key" in said
    assert command(*pack) == 0
    assert "4 were there already" in capsys.readouterr().out


def test_captions_and_adoption(source, tmp_path, command, capsys):
    source.image("a.jpg")
    (source.images / "a.txt").write_text("A.")
    assert command("pack", "--captions", source.images, "--out", tmp_path / "packed") == 0
    assert command("adopt", tmp_path / "packed/tars/000000.tar", "--out", tmp_path / "adopted") == 0
    assert Corpus.open(tmp_path / "adopted").id == Corpus.open(tmp_path / "packed").id
    assert "added 1 tars, 1 samples, 1 images" in capsys.readouterr().out


def test_a_file_name_that_is_no_unicode_is_named_all_the_same(source, tmp_path, command, capsys):
    source.image("a.jpg")
    (source.images / "a.txt").write_text("A.")
    try:
        Path(os.fsdecode(bytes(source.images) + b"/caf\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes only Unicode")
    assert command("pack", "--captions", source.images, "--out", tmp_path / "out") == 0
    assert r"caf\udce9.jpg: no caption beside it" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, command, capsys):
    assert command("adopt", tmp_path / "no.tar", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: tar {tmp_path}/no.tar: there is no such file\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--llava-json", "a.json", "--out", "x"],
        ["--captions", "a", "--images", "b", "--out", "x"],
        ["--captions", "a", "--llava-json", "a.json", "--out", "x"],
        ["--captions", "a", "--out", "x", "--samples-per-tar", "0"],
        ["--captions", "a"],
    ],
)
def test_contradictory_arguments_print_the_usage(command, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        command("pack", *arguments)
    assert "usage: featurize pack" in capsys.readouterr().err
