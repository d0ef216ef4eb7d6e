"""Corpora of the demo world, as LLaVA JSON with an image folder; `featurize.corpus.pack` makes tars of them."""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from olavlm.errors import OlaError
from olavlm.eval.cv_bench import build_prompt
from pipelines.demo_world.cues import without_cues
from pipelines.demo_world.language import DESCRIBE, Question, balance, caption, deal_letters, questions, text_only
from pipelines.demo_world.processes import CHUNK, in_processes
from pipelines.demo_world.scenes import SPLITS, Rendering, Scene, render, sample_scene, scene_seed

TURNS = 4  # most questions in one conversation
SCENES_PER_TEXT = 10  # a row without an image for so many scenes
FITTING_SCENES = 600  # scenes whose questions the benchmark's baselines are fitted on

Turn = dict[str, str]
Rng = np.random.Generator


@dataclass(frozen=True)
class Told:
    """What one scene gives to a corpus."""

    name: str
    png: bytes
    caption: list[Turn]
    questions: list[Question]
    scene: Scene
    rendering: Rendering


def build_split(
    split: str,
    scenes: int,
    out: Path,
    seed: int,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    truth: bool = False,
) -> Path:
    """Render a split and write ``out/images/*.png`` and ``out/<split>.json``; same arguments, same bytes.

    ``pretrain`` and ``probe`` hold one caption per scene; ``finetune`` holds conversations of up to 4 multiple-choice
    questions, balanced as the benchmark's are, and text-only rows.

    Args:
        split: ``pretrain``, ``finetune`` or ``probe``; scenes of different splits are never the same.
        scenes: how many.
        out: a folder, made if need be.
        seed: another seed, other scenes.
        workers: rendering processes; changes nothing but the time taken.
        progress: called with the number of scenes just finished.
        truth: also write ``out/truth/<name>.npz`` (depth in metres, panoptic ids, segment ids and classes).

    Raises:
        OlaError: an unknown split.
    """
    if split not in ("pretrain", "finetune", "probe"):
        raise OlaError(f"demo world: split is {split!r}, expected pretrain, finetune or probe")
    (out / "images").mkdir(parents=True, exist_ok=True)
    told: list[Told] = []
    for chunk in tell(split, scenes, seed, workers):
        for scene in chunk:
            (out / "images" / f"{scene.name}.png").write_bytes(scene.png)
            if truth:
                _write_truth(out / "truth" / f"{scene.name}.npz", scene.rendering)
        told += chunk
        if progress:
            progress(len(chunk))
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    rows = conversations(told, split, rng) if split == "finetune" else [_row(t.name, t.name, t.caption) for t in told]
    file = out / f"{split}.json"
    file.write_text(json.dumps(rows, indent=1))
    return file


def build_benchmark(scenes: int, out: Path, seed: int, workers: int = 2) -> None:
    """Write ``test_2d.parquet``, ``test_3d.parquet`` and ``baselines.json`` about scenes seen nowhere else.

    Up to `scenes` questions per task, balanced; the baselines are fitted on questions about scenes of the finetune
    split.
    """
    from pipelines.demo_world.benchmark import write_benchmark  # scikit-learn: no rendering process should wait for it

    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index("benchmark")]))
    known = [q for chunk in tell("finetune", FITTING_SCENES, seed, workers) for t in chunk for q in t.questions]
    told = [t for chunk in tell("benchmark", scenes, seed, workers) for t in chunk]
    pictures = {id(q): (t.name, t.png) for t in told for q in t.questions}
    asked = _balanced([q for t in told for q in t.questions], rng, reference=known)
    chosen = [q for task in dict.fromkeys(q.task for q in asked) for q in _at_most(scenes, task, asked, rng)]
    dealt = deal_letters(chosen, rng)
    fitting = deal_letters(_balanced(known, rng), rng)
    write_benchmark([(q, *pictures[id(c)]) for q, c in zip(dealt, chosen, strict=True)], fitting, out)


def tell(split: str, scenes: int, seed: int, workers: int) -> Iterable[list[Told]]:
    """Render scenes and say and ask all there is about each, in chunks; the same whatever the number of processes."""
    chunks = [range(start, min(start + CHUNK, scenes)) for start in range(0, scenes, CHUNK)]
    return in_processes(partial(_tell_chunk, split, seed), chunks, workers)


def _tell_chunk(split: str, seed: int, indices: range) -> list[Told]:
    return [_tell_one(split, seed, index) for index in indices]


def _tell_one(split: str, seed: int, index: int) -> Told:
    scene = sample_scene(scene_seed(split, index, seed))
    rendering = render(scene)
    rng = np.random.Generator(np.random.PCG64([scene.seed, 2]))
    ask = f"<image>\n{DESCRIBE[int(rng.integers(len(DESCRIBE)))]}"
    stream = io.BytesIO()
    Image.fromarray(rendering.image).save(stream, "PNG")
    return Told(
        name=f"{split}-{index:06d}",
        png=stream.getvalue(),
        caption=[_turn("human", ask), _turn("gpt", caption(scene, rng))],
        questions=questions(scene, rendering, rng),
        scene=scene,
        rendering=rendering,
    )


def _balanced(asked: list[Question], rng: Rng, reference: list[Question] | None = None) -> list[Question]:
    """Answers equally frequent within each kind, and no 3-D question that two-dimensional cues would answer."""
    counts = balance([q for q in asked if q.task == "Count"], lambda q: q.kind, lambda q: q.answer, range(4), rng)
    relations = balance([q for q in asked if q.task == "Relation"], lambda q: q.kind, lambda q: q.answer, range(2), rng)
    return counts + relations + without_cues(asked, rng, reference)


def _at_most(most: int, task: str, asked: list[Question], rng: Rng) -> list[Question]:
    """`most` questions of a task, its kinds and answers as evenly as they are in `asked`."""
    mine = [q for q in asked if q.task == task]
    by_cell: dict[tuple[str, int], list[Question]] = {}
    for row in rng.permutation(len(mine)).tolist():
        by_cell.setdefault((mine[row].kind, mine[row].answer), []).append(mine[row])
    share = min(1.0, most / max(len(mine), 1))
    return [q for cell in by_cell.values() for q in cell[: max(1, int(len(cell) * share))]]


def conversations(told: list[Told], split: str, rng: Rng) -> list[dict[str, object]]:
    """LLaVA JSON rows of up to 4 balanced questions each, and rows without an image, in random order."""
    owner = {id(q): t.name for t in told for q in t.questions}
    asked = _balanced([q for t in told for q in t.questions], rng)
    by_scene: dict[str, list[Question]] = {}
    for before, dealt in zip(asked, deal_letters(asked, rng), strict=True):
        by_scene.setdefault(owner[id(before)], []).append(dealt)
    rows = []
    for name in sorted(by_scene):
        turns = [by_scene[name][i] for i in rng.permutation(len(by_scene[name]))]
        for part, start in enumerate(range(0, len(turns), TURNS)):
            rows.append(_row(f"{name}-{part}", name, _ask(turns[start : start + TURNS])))
    for index in range(len(told) // SCENES_PER_TEXT):
        question, answer = text_only(rng)
        rows.append(_row(f"{split}-text-{index:05d}", None, [_turn("human", question), _turn("gpt", answer)]))
    return [rows[i] for i in rng.permutation(len(rows))]


def _ask(asked: list[Question]) -> list[Turn]:
    """Questions exactly as the benchmark puts them; the image stands in the first turn only."""
    turns = []
    for number, question in enumerate(asked):
        prompt = build_prompt(question.prompt)
        turns += [
            _turn("human", prompt if number == 0 else prompt.removeprefix("<image>\n")),
            _turn("gpt", question.letter),
        ]
    return turns


def _turn(speaker: str, text: str) -> Turn:
    return {"from": speaker, "value": text}


def _row(name: str, image: str | None, turns: list[Turn]) -> dict[str, object]:
    return {"id": name, **({"image": f"images/{image}.png"} if image else {}), "conversations": turns}


def _write_truth(path: Path, rendering: Rendering) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        depth=rendering.depth,
        panoptic=rendering.panoptic,
        segment_ids=np.array([s.id for s in rendering.segments], np.int32),
        segment_classes=np.array([s.category for s in rendering.segments]),
    )
