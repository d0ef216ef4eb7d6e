import os
import subprocess
import sys
from pathlib import Path

import pytest

from olavlm.data import lease as module
from olavlm.data.lease import STALE, Lease, LeaseLost


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _rewrite(path: Path, host: str, pid: int) -> None:
    path.write_text(f"{host} {pid} {'0' * 16}")


def _age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_only_one_holds_it(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, "tar") as first:
        assert Lease.acquire(tmp_path, "tar") is None
        assert Lease.acquire(tmp_path, "tar.1") is not None  # another tar, though its name begins the same
        first.check()
    assert [name for name in os.listdir(tmp_path) if name.startswith("tar.1.")] == ["tar.1.1"]
    with Lease.acquire(tmp_path, "tar") as second:
        second.check()


def test_release_leaves_no_file(tmp_path: Path) -> None:
    with Lease.acquire(tmp_path, "[a] b"):
        assert os.listdir(tmp_path) == ["[a] b.1"]
    assert os.listdir(tmp_path) == []


def test_a_dead_process_on_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    zombie = Lease.acquire(tmp_path, "tar")
    _rewrite(zombie.path, module._host(), _dead_pid())
    (tmp_path / ".tar.1.12-ab.tmp").touch()
    with Lease.acquire(tmp_path, "tar") as successor:
        assert successor.path.name == "tar.2"
        assert sorted(os.listdir(tmp_path)) == ["tar.1", "tar.2"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("age", "taken"), [(STALE - 30, False), (STALE + 30, True)])
def test_another_host_is_taken_over_when_its_heart_has_stopped(tmp_path: Path, age: float, taken: bool) -> None:
    zombie = Lease.acquire(tmp_path, "tar")
    _rewrite(zombie.path, "elsewhere", 1)
    _age(zombie.path, age)
    successor = Lease.acquire(tmp_path, "tar")
    assert (successor is not None) == taken
    if successor:
        successor.release()
    zombie.release()


def test_promise_3_once_a_zombie_is_fenced_off(tmp_path: Path) -> None:
    zombie = Lease.acquire(tmp_path, "tar")
    _age(zombie.path, STALE + 30)
    successor = Lease.acquire(tmp_path, "tar")
    with pytest.raises(LeaseLost):
        zombie.check()
    zombie.release()  # must not free what it no longer has
    successor.check()
    successor.release()
    with pytest.raises(LeaseLost):
        zombie.check()  # the successor is done and its file gone: still lost
    with Lease.acquire(tmp_path, "tar") as third:
        assert third.path == zombie.path  # generations begin anew, which must not revive the zombie
        with pytest.raises(LeaseLost):
            zombie.check()


def test_a_heartbeat_keeps_it_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT", 0.01)
    with Lease.acquire(tmp_path, "tar") as held:
        _age(held.path, STALE + 30)
        before = held.path.stat().st_mtime
        while held.path.stat().st_mtime == before:
            pass
        assert Lease.acquire(tmp_path, "tar") is None
