"""Corpora of the demo world, as LLaVA JSON with an image folder; `featurize.corpus.pack` makes tars of them."""

import io
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from olavlm.errors import OlaError
from olavlm.eval.cv_bench import build_prompt
from pipelines.demo_world.captions import caption
from pipelines.demo_world.matching import deal, evenly, matched
from pipelines.demo_world.places import WHERE, layout, places, segment_names
from pipelines.demo_world.processes import CHUNK, in_processes
from pipelines.demo_world.questions import DESCRIBE, TASKS, Question, questions, text_only
from pipelines.demo_world.scenes import LEVELS, SPLITS, Rendering, Scene, render, sample_scene, scene_seed

TURNS = 4  # most questions in one conversation
SCENES_PER_TEXT = 10  # a row without an image for so many scenes
SCENES_PER_CAPTION = 10  # a row that is a description and nothing else for so many scenes
DESCRIBED = 0.2  # share of conversations in which one turn asks for a description
MOST = 0.4  # questions of a task per scene of a benchmark, at most

IMAGE = "<image>\n"

Turn = dict[str, str]
Rng = np.random.Generator


@dataclass(frozen=True)
class Told:
    """What one scene gives to a corpus."""

    name: str
    png: bytes
    caption: list[Turn]
    places: list[Turn]  # none if no object fills a cell of the map
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
    level: str = "easy",
) -> Path:
    """Render a split and write ``out/images/*.png`` and ``out/<split>.json``; same arguments, same bytes.

    ``pretrain`` and ``probe`` hold a caption per scene and, in a second turn, where everything is; ``finetune`` holds
    conversations of up to 4 turns, mostly multiple-choice questions matched as the benchmark's are but for their texts,
    and text-only rows.

    Args:
        split: ``pretrain``, ``finetune`` or ``probe``; scenes of different splits are never the same.
        scenes: how many.
        out: a folder, made if need be.
        seed: another seed, other scenes.
        workers: rendering processes; changes nothing but the time taken.
        progress: called with the number of scenes just finished.
        level: how hard the scenes are, a key of `LEVELS`.
        truth: also write ``out/truth/<name>.npz`` (depth in metres, panoptic ids, segment ids and classes).

    Raises:
        OlaError: an unknown split.
    """
    if split not in ("pretrain", "finetune", "probe"):
        raise OlaError(f"demo world: split is {split!r}, expected pretrain, finetune or probe")
    (out / "images").mkdir(parents=True, exist_ok=True)
    told: list[Told] = []
    for chunk in tell(split, scenes, seed, workers, level):
        for scene in chunk:
            (out / "images" / f"{scene.name}.png").write_bytes(scene.png)
            if truth:
                _write_truth(out / "truth" / f"{scene.name}.npz", scene.rendering)
        told += chunk
        if progress:
            progress(len(chunk))
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    rows = (
        conversations(told, split, rng)
        if split == "finetune"
        else [_row(t.name, t.name, t.caption, t.places) for t in told]
    )
    file = out / f"{split}.json"
    file.write_text(json.dumps(rows, indent=1))
    return file


def build_benchmark(scenes: int, out: Path, seed: int, workers: int = 2, level: str = "easy") -> None:
    """Write ``test_2d.parquet``, ``test_3d.parquet`` and ``baselines.json`` about scenes seen nowhere else.

    Up to `MOST` × `scenes` questions per task, in groups that share text, choices and two-dimensional cues and have
    every answer once. The baselines are fitted on questions about as many scenes of the finetune split.

    Raises:
        OlaError: too few scenes for questions of every task.
    """
    from pipelines.demo_world.benchmark import write_benchmark  # scikit-learn: no rendering process should wait for it

    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index("benchmark")]))
    known = [q for chunk in tell("finetune", scenes, seed, workers, level) for t in chunk for q in t.questions]
    told = [t for chunk in tell("benchmark", scenes, seed, workers, level) for t in chunk]
    groups = matched((q for t in told for q in t.questions), rng, same_text=True)
    if missing := [task for task in TASKS if task not in {group[0].task for group in groups}]:
        raise OlaError(
            f"demo world: {scenes} scenes give no two {missing[0]} questions of one text; expected some hundred scenes"
        )
    asked = deal(evenly(groups, int(MOST * scenes)), rng)
    fitting = deal(matched(known, rng, same_text=False), rng)
    pictures = {t.scene.seed: (t.name, t.png) for t in told}
    write_benchmark(asked, pictures, list(itertools.chain(*fitting)), out)


def tell(split: str, scenes: int, seed: int, workers: int, level: str = "easy") -> Iterable[list[Told]]:
    """Render scenes and say and ask all there is about each, in chunks; the same whatever the number of processes."""
    chunks = [range(start, min(start + CHUNK, scenes)) for start in range(0, scenes, CHUNK)]
    return in_processes(partial(_tell_chunk, split, seed, level), chunks, workers)


def _tell_chunk(split: str, seed: int, level: str, indices: range) -> list[Told]:
    return [_tell_one(split, seed, level, index) for index in indices]


def _tell_one(split: str, seed: int, level: str, index: int) -> Told:
    scene = sample_scene(scene_seed(split, index, seed), LEVELS[level])
    rendering = render(scene)
    rng = np.random.Generator(np.random.PCG64([scene.seed, 2]))
    told = places(layout(rendering.panoptic, segment_names(scene, rendering)), rng)
    stream = io.BytesIO()
    Image.fromarray(rendering.image).save(stream, "PNG")
    return Told(
        name=f"{split}-{index:06d}",
        png=stream.getvalue(),
        caption=_describe(scene, rng),
        questions=questions(scene, rendering, rng),
        places=_exchange(WHERE, told) if told else [],
        scene=scene,
        rendering=rendering,
    )


def conversations(told: list[Told], split: str, rng: Rng) -> list[dict[str, object]]:
    """LLaVA JSON rows in random order: matched questions and descriptions in up to 4 turns, some without an image."""
    groups = deal(matched((q for t in told for q in t.questions), rng, same_text=False), rng)
    by_scene: dict[int, list[Question]] = defaultdict(list)
    for question in itertools.chain(*groups):
        by_scene[question.scene].append(question)
    rows = []
    for number, scene in enumerate(told):
        asked = by_scene[scene.scene.seed]
        asked = [asked[i] for i in rng.permutation(len(asked))]
        part = 0
        while asked:
            described = rng.random() < DESCRIBED
            some, asked = asked[: TURNS - described], asked[TURNS - described :]
            turns = [_ask(question) for question in some]
            if described:
                turns.insert(int(rng.integers(len(turns) + 1)), _describe(scene.scene, rng))
            rows.append(_row(f"{scene.name}-{part}", scene.name, *turns))
            part += 1
        if number % SCENES_PER_CAPTION == 0:
            rows.append(_row(f"{scene.name}-caption", scene.name, _describe(scene.scene, rng)))
    for index in range(len(told) // SCENES_PER_TEXT):
        rows.append(_row(f"{split}-text-{index:05d}", None, _exchange(*text_only(rng))))
    return [rows[i] for i in rng.permutation(len(rows))]


def _describe(scene: Scene, rng: Rng) -> list[Turn]:
    return _exchange(DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scene, rng))


def _ask(question: Question) -> list[Turn]:
    """A question exactly as the benchmark puts it, and its answer."""
    return _exchange(build_prompt(question.prompt).removeprefix(IMAGE), question.reply)


def _exchange(question: str, answer: str) -> list[Turn]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _row(name: str, image: str | None, *exchanges: list[Turn]) -> dict[str, object]:
    """LLaVA's schema; the image stands in the first turn only."""
    first, *others = itertools.chain(*exchanges)
    if not image:
        return {"id": name, "conversations": [first, *others]}
    turns = [{**first, "value": IMAGE + first["value"]}, *others]
    return {"id": name, "image": f"images/{image}.png", "conversations": turns}


def _write_truth(path: Path, rendering: Rendering) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        depth=rendering.depth,
        panoptic=rendering.panoptic,
        segment_ids=np.array([s.id for s in rendering.segments], np.int32),
        segment_classes=np.array([s.category for s in rendering.segments]),
    )
