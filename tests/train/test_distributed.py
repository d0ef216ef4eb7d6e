"""How the processes of a run come together; what they do together is in test_kill.py, in real processes."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from train.distributed import World


def test_ranks_wait_for_hours_while_the_first_pins_a_snapshot_or_writes_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **settings: asked.update(settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert World.join().size == 2
    assert asked["timeout"] >= timedelta(hours=12)
