"""Exit codes and messages that every command shares."""

import argparse
import errno

import pytest

from olavlm import cli
from olavlm.errors import OlaError


def _raise(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OlaError("demo.yaml: key: wrong"), 2, "error: demo.yaml: key: wrong\n"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "no space left on the disk of /data/x"),
    ],
)
def test_one_line_and_an_exit_code(capsys, error, code, message):
    assert cli.run(_raise(error)) == code
    assert message in capsys.readouterr().err


def test_exit_code_of_main_is_kept():
    assert cli.run(lambda: 1) == 1
    assert cli.run(lambda: None) == 0


@pytest.mark.parametrize("line", ["-n 1 a b=1 c=2", "a -n 1 b=1 c=2", "a b=1 -n 1 c=2", "a b=1 c=2 -n 1"])
def test_options_of_a_command_may_stand_anywhere(line, capsys):
    parser = argparse.ArgumentParser()
    command = parser.add_subparsers(dest="command", parser_class=cli.Command).add_parser("do")
    command.add_argument("first")
    command.add_argument("rest", nargs="*")
    command.add_argument("-n", type=int)
    parsed = {"command": "do", "first": "a", "rest": ["b=1", "c=2"], "n": 1}
    for _ in range(2):
        assert vars(parser.parse_args(["do", *line.split()])) == parsed
    with pytest.raises(SystemExit):
        parser.parse_args(["do", *line.split(), "--no-such"])
    assert "unrecognized arguments: --no-such" in capsys.readouterr().err


def test_our_own_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(_raise(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (6400, "6.4 kB"),
        (2.951e6, "2.95 MB"),
        (1.65e12, "1.65 TB"),
        (1e15, "1 PB"),
    ],
)
def test_bytes_for_people(count, text):
    assert cli.human_bytes(count) == text
