from pathlib import Path

import pytest
import torch

from olavlm.data.codec import CODERS
from pipelines.codecs import students
from pipelines.codecs.candidates import Candidate
from pipelines.codecs.students import Sizes, train_students


class _Zeros:
    """A codec that loses everything."""

    zstd = None

    def encode(self, x: torch.Tensor) -> list[bytes]:
        return [b""] * len(x)

    def decode(self, stored: list[bytes], tokens: int, width: int) -> torch.Tensor:
        return torch.zeros(len(stored), tokens, width)


def test_students_are_compared_on_the_teachers_own_features_and_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "candidates", lambda x: {"int8": Candidate(CODERS["int8"]), "nothing": _Zeros()})
    sizes = Sizes(scenes=16, held_out=12, steps=3)
    lines = train_students(tmp_path, sizes, range(1))
    assert [(line["codec"], line["seed"]) for line in lines] == [("fp32", 0), ("int8", 0), ("nothing", 0)]
    reference, close, nothing = (line["measured"] for line in lines)
    assert set(reference) == {f"{t} {m}" for t in ("depth", "seg", "gen") for m in ("smooth-L1", "cosine")} | {
        "depth known",
        "shape known",
    }
    assert close["depth smooth-L1"] == pytest.approx(reference["depth smooth-L1"], rel=1e-2)
    assert close != reference
    assert nothing["depth smooth-L1"] > 1.02 * reference["depth smooth-L1"]

    monkeypatch.setattr(students, "_train", None)  # would fail: nothing is trained again
    assert train_students(tmp_path, sizes, range(1)) == lines
