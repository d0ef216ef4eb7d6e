import faulthandler
import subprocess
import sys

import pytest

from featurize.watchdog import Watchdog

STUCK = """
import threading
from featurize.watchdog import Watchdog

def read_from_a_dead_mount():
    threading.Event().wait()

with Watchdog(0.1):
    read_from_a_dead_mount()
"""


def test_a_process_that_hangs_ends_and_shows_where() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "in read_from_a_dead_mount" in done.stderr


def test_the_time_begins_anew_whenever_something_moves_and_runs_only_while_a_tar_is_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running: list[bool] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: running.append(True))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: running.append(False))
    watchdog = Watchdog(1)
    with watchdog:
        watchdog.moved()
        with watchdog:
            pass
        watchdog.moved()
    watchdog.moved()
    assert running == [True] * 5 + [False] * 2
