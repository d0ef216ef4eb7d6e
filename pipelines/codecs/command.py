"""``python -m pipelines codecs``: measure, train, and write the page."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from olavlm.data.atomic import replace
from olavlm.provenance import provenance
from pipelines.codecs.candidates import IMAGES
from pipelines.codecs.distortion import measure, time_published
from pipelines.codecs.sources import INSTALL
from pipelines.codecs.students import REFERENCE, Sizes, train_students

CONFIDENCE = 0.95

Rows = list[dict[str, Any]]


def codecs(folder: Path, seeds: int, sizes: Sizes) -> None:
    """Do what ``distortion.json`` and ``students.jsonl`` in `folder` lack, then write ``codecs.md`` there.

    Args:
        folder: made if need be; whatever it holds is not measured again.
        seeds: students per codec.
        sizes: of the students' data and training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "distortion.json"
    if not file.exists():
        found = {**provenance(), "features": measure(), "published": time_published()}
        replace(file, json.dumps(found, indent=1).encode())
    distortion = json.loads(file.read_text())
    lines = train_students(folder, sizes, range(seeds))
    replace(folder / "codecs.md", page(distortion, lines, sizes).encode())
    print(folder / "codecs.md")


def page(distortion: dict[str, Any], lines: Rows, sizes: Sizes) -> str:
    """The tables as Markdown."""
    versions = distortion["versions"]
    pretrained = any("EfficientNet" in row["source"] for row in distortion["features"])
    return PAGE.format(
        images=IMAGES,
        features=_features(distortion["features"]),
        missing="" if pretrained else f"\nThe pretrained encoder is not installed here; `{INSTALL}` adds its rows.\n",
        published=_published(distortion["published"]),
        students=students_table(lines),
        seeds=len({line["seed"] for line in lines}),
        commit=distortion["commit"],
        machine=distortion["machine"],
        torch=versions["torch"],
        sizes=sizes,
    )


def paired(lines: Rows, codec: str, metric: str) -> tuple[float, float]:
    """Mean and half the 95 % interval (Student's t) of the differences to `REFERENCE`, seed by seed.

    NaN for the interval of less than two seeds.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        values[line["codec"]][line["seed"]] = line["measured"][metric]
    both = values[codec].keys() & values[REFERENCE].keys()
    differences = np.array([values[codec][seed] - values[REFERENCE][seed] for seed in sorted(both)])
    if len(differences) < 2:
        return float(differences.mean()) if len(differences) else math.nan, math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return float(differences.mean()), quantile * float(differences.std(ddof=1)) / math.sqrt(len(differences))


def students_table(lines: Rows) -> str:
    """Reference values, then every codec's paired difference ± interval; bold where it excludes 0."""
    if not lines:
        return "None trained yet."
    metrics = list(lines[0]["measured"])
    reference = [line["measured"] for line in lines if line["codec"] == REFERENCE]
    rows = [["codec", *metrics], ["---"] * (len(metrics) + 1)]
    rows.append([f"{REFERENCE}: value", *(f"{np.mean([m[metric] for m in reference]):.4f}" for metric in metrics)])
    for codec in dict.fromkeys(line["codec"] for line in lines if line["codec"] != REFERENCE):
        cells = []
        for metric in metrics:
            mean, half = paired(lines, codec, metric)
            cell = f"{mean:+.4f} ± {half:.4f}"
            cells.append(f"**{cell}**" if abs(mean) > half else cell)
        rows.append([codec, *cells])
    return _table(rows)


def _features(found: Rows) -> str:
    header = ["features", "codec", "bytes", "bits/value", "of fp16", "cosine", "1 %", "rel. error", "99 %", "probes"]
    rows = [header, ["---"] * len(header)]
    for row in found:
        rows.append(
            [
                row["source"],
                row["codec"],
                f"{row['bytes']:,.0f}",
                f"{row['bits']:.2f}",
                f"1 / {16 / row['bits']:.1f}",
                f"{row['cosine']:.5f}",
                f"{row['cosine, 1 %']:.5f}",
                f"{row['error']:.4f}",
                f"{row['error, 99 %']:.4f}",
                ", ".join(f"{name} {value:.3f}" for name, value in row["probes"].items()),
            ]
        )
    return _table(rows)


def _published(found: Rows) -> str:
    header = ["target", "codec", "bytes", "of fp16", "side information", "encode, ms", "decode, ms"]
    rows = [header, ["---"] * len(header)]
    for row in found:
        side = f"{row['side_bytes'] / 1e6:.1f} MB" if row["side_bytes"] else ""
        times = [f"{row[key]:.2f}" for key in ("encode_ms", "decode_ms")]
        ratio = f"1 / {16 / row['bits']:.1f}"
        rows.append([row["source"], row["codec"], f"{row['bytes']:,.0f}", ratio, side, *times])
    return _table(rows)


def _table(rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


PAGE = """# Codecs: what storing targets in fewer bits costs, and what it does to a student

Written by `make codecs` at commit {commit} on {machine}, torch {torch}.

- **fp16**, **int8**, **int4** are in `olavlm.data.codec`; int8+zstd is int8 through zstd, level 1.
- **ternary**: signs, Hadamard, three levels, five to a byte, one scale per token; nothing is learned. *Unbiased*: the
  scale that does not shrink.
- **transform**: DCT over the grid, principal axes, bits by reverse water-filling, Lloyd's levels; 1.5 and 0.75 bits per
  value in all, every image equally many. Learned per teacher, on other scenes or photographs than those measured.

## On features

The demo world's trained teachers on scenes nothing was trained on, and a really pretrained encoder on photographs (the
transform learned from crops of just eight others). Bytes per image, side information spread over {images:,} images;
per token: cosine and relative error |x̂ − x| / |x|, mean and worst percentile; probes: what cross-fitted linear maps
read from the decoded target.

{features}
{missing}
## At the published sizes

CPU time per image on one thread. The features are noise, which times and sizes do not depend on, but for zstd: noise
hardly gets smaller.

{published}

## A student trained on them

Demo world, {sizes.scenes} scenes, {sizes.steps} pretraining steps of {sizes.batch}, {seeds} seeds, judged on
{sizes.held_out} other scenes against the teachers' own fp32 features. *smooth-L1*, *cosine*: of the predictions, mean
over the supervised layers. *Known*: what linear probes read of the objects from the language model's image tokens, mean
over its layers: R² of the log-depth, accuracy of the class. Differences to the student of the same seed trained on fp32
targets, mean ± 95 % interval; bold: the interval excludes 0, which one in twenty does by chance. int8+zstd is lossless
over int8: the same student.

{students}
"""
