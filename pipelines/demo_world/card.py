"""``MODEL_CARD.md``: all that is known of a folder of trained weights, from its records and its gates alone."""

import heapq
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from pipelines.demo_world.gates import Measured
from pipelines.demo_world.recipe import JOBS
from pipelines.demo_world.records import Record, weights_file

MARGIN = 0.15  # by which a target should beat both the tower and the boxes
#: What the teachers' own outputs should reach.
AIMS = {
    "depth: nearer of two, balanced, decoded target": 0.92,
    "seg: mIoU, teacher": 0.75,
    "gen: R@1 of 256": 0.60,
}
TOLERANCE = 0.03  # of every gate, on another machine or with other software


def model_card(out: Path, records: dict[str, Record], gates: Measured, scenes: int) -> str:
    """Markdown.

    Args:
        out: the folder of weights.
        records: by job.
        gates: what was measured on the weights as stored.
        scenes: on how many.
    """
    any_record = next(iter(records.values()))
    total = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    return CARD.format(
        folders=_rows(_folder(out, name, record) for name, record in records.items()),
        hashes="\n".join(
            f"{r.sha256}  {weights_file(out / JOBS[n].folder).relative_to(out)}" for n, r in records.items()
        ),
        probes=probe_table(gates),
        outputs=output_table(gates),
        language=", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in records["llm"].measured.items()),
        total=total / 1e6,
        cpu=sum(r.cpu_seconds for r in records.values()) / 60,
        idle=_minutes(r.cpu_seconds for r in records.values()),
        wall=_minutes(r.wall_seconds for r in records.values()),
        scenes=scenes,
        margin=MARGIN,
        tolerance=TOLERANCE,
        torch=any_record.torch,
        transformers=any_record.transformers,
    )


def probe_table(gates: Measured) -> str:
    """What is read from the stored target, the student's tower and box geometry, as a Markdown table."""
    rows = []
    for name, found in gates.probes.items():
        gain = found["target"] - max(found["tower"], found["geometry"])
        values = [f"{found[source]:.3f}" for source in ("target", "tower", "geometry")]
        rows.append([name, *values, f"{gain:+.3f}", "pass" if gain >= MARGIN else "**miss**"])
    header = ["what is read", "target", "tower", "geometry", "target − best other", f"≥ {MARGIN}"]
    return _rows([header, ["---"] * len(header), *rows])


def output_table(gates: Measured) -> str:
    """What the teachers make of images and of stored targets, against the aims, as a Markdown table."""
    rows = []
    for name, value in gates.outputs.items():
        aim = AIMS.get(name)
        verdict = [f"≥ {aim}", "pass" if value >= aim else "**miss**"] if aim else ["", ""]
        rows.append([name, f"{value:.3f}", *verdict])
    header = ["output", "value", "aim", ""]
    return _rows([header, ["---"] * len(header), *rows])


def _folder(out: Path, name: str, record: Record) -> list[str]:
    file = weights_file(out / JOBS[name].folder)
    config = json.loads((file.parent / "config.json").read_text())
    with safe_open(file, "np") as tensors:
        count = sum(_product(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    about = f"{config['architectures'][0]}, {count / 1e6:.2f} M"
    numbers = [record.scenes, record.steps, record.seed, f"{record.cpu_seconds:.0f}"]
    return [f"`{JOBS[name].folder}`", about, f"{file.stat().st_size / 1e6:.2f}", *map(str, numbers)]


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _minutes(seconds: Iterable[float]) -> float:
    """When the last of these jobs ends, two at a time, in their order."""
    ends = [0.0, 0.0]
    for job in seconds:
        heapq.heapreplace(ends, ends[0] + job)
    return max(ends) / 60


def _rows(rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


CARD = """# Weights of the demo world

Small models of the real architectures, in the hub's own folder layouts, trained from nothing on rendered scenes. They
know this world only. Apache-2.0, as the code. Written by `make teachers` from the records beside the weights
(`*/training.json`) and from `gates.json`; `python -m pipelines teachers --measure --out FOLDER` writes it anew.

| folder | what | MB | scenes | steps | seed | CPU seconds |
|---|---|---|---|---|---|---|
{folders}

{total:.2f} MB in all, float16 safetensors. {cpu:.0f} CPU minutes; two trainings at a time, one thread each, that is
{idle:.0f} minutes on two idle cores, and was {wall:.0f} where these were made. Rendering comes on top: a minute or two.

![Six scenes nothing was trained on](teachers.png)

## What can be read from the stored target

Linear probes on {scenes} scenes that nothing was trained on; `target` is what a training reads back from the store
(after int8 or fp16), `tower` what the student's own CLIP tower gives, `geometry` what 2-D boxes give.

{probes}

- *object log-depth*: ridge regression from the features averaged over an object's pixels; from its box's centre,
  size and foot, their squares and products. *nearer of two*: the order of two objects by that probe; balanced: the mean
  over pairs in which the nearer one stands lower in the image or not, and looks bigger or not; as asked: over pairs
  that a fitted model of their 2-D boxes does not tell apart, as those of the benchmark.
- *object class*: softmax regression from the same averages. *counted*: how often that finds as many objects of a
  shape as there are, the mean over shapes and true numbers from 0 to 3. *masks*: from each patch, the class of each
  quarter of it; geometry: the patch's place, how far boxes cover its quarters, the covering box's size and where in it
  the patch is.
- *objects of each colour and shape*: ridge regression to 12 counts, mean R²; *patterns*: softmax regression; from the
  image embedding; from the tower's mean patch and pooled output; from all boxes, left to right.
- Every number is cross-fitted: scenes are dealt into 4 folds (masks: 2), each predicted by a map fitted on the others,
  whose penalty was chosen without it, too.

## What the teachers make of it

{outputs}

δ1: share of pixels whose depth is within a factor of 1.25. *decoded target*: by the teacher's own head or decoders,
from the stored target alone. *R@1*: an image's own caption among 256, by the text side it was trained with, which does
not ship. *R² of the target, read from the tower*: near 1, the generation target would be trivial for the student.

## The language model

`student/llm` has read no image, but scenes as 8 × 8 maps in words, each followed by captions and by questions on
counts and on left, right, above and below, with the right answers: so it can count and tell directions before it sees.
Depth is in none of it. On scenes held out: {language}.

## How to make it again

`make teachers` trains into `runs/teachers` and compares with this folder; `--out` takes another one. What a stopped run
finished is kept, what was made by another recipe is made anew. On the same machine with torch {torch} and
transformers {transformers} the files are the same bytes; elsewhere every number above is to be within
±{tolerance}. Image mean and standard deviation: ImageNet's for `depth` and `seg`, CLIP's for `gen` and
`student/vision`.

```
{hashes}
```
"""
