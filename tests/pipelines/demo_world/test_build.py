import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from olavlm.errors import OlaError
from olavlm.eval import cv_bench
from olavlm.eval.answers import parse_choice
from pipelines.demo_world.benchmark import SCHEMA
from pipelines.demo_world.build import TURNS, build_benchmark, build_split
from pipelines.demo_world.places import WHERE
from pipelines.demo_world.questions import DESCRIBE
from pipelines.demo_world.scenes import SPLITS, render, sample_scene, scene_seed

SCENES = 300  # of the benchmark


@pytest.fixture(scope="module")
def finetune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetune")
    build_split("finetune", 220, out, seed=0, workers=1)
    return out


@pytest.fixture(scope="module")
def asked(benchmark: Path) -> list[cv_bench.Question]:
    return cv_bench.load(benchmark)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    build_benchmark(SCENES, out, seed=0, workers=2)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_same_input_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    done: list[int] = []
    build_split("pretrain", 120, tmp_path / "one", seed=3, workers=1, progress=done.append)
    build_split("pretrain", 120, tmp_path / "two", seed=3, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(done) == 120
    build_split("pretrain", 5, tmp_path / "other", seed=4, workers=1)
    assert contents(tmp_path / "other").keys() & contents(tmp_path / "one").keys()
    assert not set(contents(tmp_path / "other").values()) & set(contents(tmp_path / "one").values())


def test_pretraining_rows_are_captions_of_the_rendered_scene(tmp_path: Path) -> None:
    rows = json.loads(build_split("pretrain", 3, tmp_path, seed=0, workers=1, truth=True).read_text())
    for index, row in enumerate(rows):
        human, gpt, where, there = row["conversations"]
        assert where["value"] == WHERE
        assert there["value"].count(", ") + 1 == len(sample_scene(scene_seed("pretrain", index)).objects)
        assert human["from"] == "human"
        assert human["value"].startswith("<image>\n")
        assert gpt["from"] == "gpt"
        truth = render(sample_scene(scene_seed("pretrain", index)))
        assert (np.asarray(Image.open(tmp_path / row["image"])) == truth.image).all()
        with np.load(tmp_path / "truth" / f"{row['id']}.npz") as stored:
            assert (stored["depth"] == truth.depth).all()
            assert (stored["panoptic"] == truth.panoptic).all()
            assert stored["segment_classes"].tolist() == [s.category for s in truth.segments]


def test_finetuning_rows_ask_as_the_benchmark_does(finetune: Path) -> None:
    rows = json.loads((finetune / "finetune.json").read_text())
    assert len({row["id"] for row in rows}) == len(rows)
    with_image = [row for row in rows if "image" in row]
    assert len(rows) - len(with_image) == 22
    for row in with_image:
        turns = row["conversations"]
        assert len(turns) in range(2, 2 * TURNS + 1, 2)
        for number, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            asked = human["value"].removeprefix("<image>\n")
            assert (asked != human["value"]) == (number == 0)
            if asked in DESCRIBE:
                assert gpt["value"].endswith(".")
                continue
            question, *_ = asked.split(f"\n{cv_bench.SUFFIX}")
            assert cv_bench.build_prompt(question) == f"<image>\n{asked}"
            said, letter = gpt["value"].rsplit(" ", 1)
            choice = said.rsplit(": ", 1)[-1]
            assert f"\n{letter} {choice}" in human["value"], "an answer is one of the choices, in words and by letter"
            derived = "How many" in asked or "relative positions" in asked
            assert (choice != said) == derived, "numbers and relations follow from what is said first"
            assert parse_choice(gpt["value"], re.findall(r"\n\(\w\) (.+)", human["value"])) == letter[1]
    for row in rows:
        if "image" not in row:
            assert "<image>" not in json.dumps(row)


def test_finetuning_also_asks_for_descriptions(finetune: Path) -> None:
    rows = [row for row in json.loads((finetune / "finetune.json").read_text()) if "image" in row]
    described = [[turn["value"].removeprefix("<image>\n") in DESCRIBE for turn in row["conversations"]] for row in rows]
    assert sum(len(turns) == 2 and any(turns) for turns in described) >= 22
    assert 0.1 < np.mean([any(turns) for turns in described if len(turns) > 2]) < 0.35


def test_finetuning_letters_are_balanced(finetune: Path) -> None:
    rows = [row for row in json.loads((finetune / "finetune.json").read_text()) if "image" in row]
    letters: Counter[tuple[str, str]] = Counter()
    for row in rows:
        turns = row["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            letters[human["value"].removeprefix("<image>\n").split()[0], gpt["value"].split()[-1]] += 1
    for word in ("Which", "Estimate", "Considering"):
        assert letters[word, "(A)"] == letters[word, "(B)"] > 20
    assert letters["How", "(A)"] == letters["How", "(B)"] == letters["How", "(C)"] == letters["How", "(D)"] > 20


@given(
    st.tuples(st.sampled_from(SPLITS), st.integers(0, 10**8 - 1), st.integers(0, 10**6)),
    st.tuples(st.sampled_from(SPLITS), st.integers(0, 10**8 - 1), st.integers(0, 10**6)),
)
def test_no_scene_is_in_two_splits(one: tuple[str, int, int], other: tuple[str, int, int]) -> None:
    assert (scene_seed(*one) == scene_seed(*other)) == (one == other)


def test_hard_scenes_are_larger_and_hold_more(tmp_path: Path) -> None:
    rows = json.loads(build_split("finetune", 40, tmp_path, seed=0, workers=1, level="hard").read_text())
    pictured = [row for row in rows if "image" in row]
    with Image.open(tmp_path / pictured[0]["image"]) as image:
        assert image.size == (128, 128)
    asked = [turn["value"] for row in pictured for turn in row["conversations"] if "How many objects" in turn["value"]]
    assert asked
    assert all(f") {number}\n" in text for text in asked for number in (4, 5, 6, 7))


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match="'benchmark', expected pretrain, finetune or probe"):
        build_split("benchmark", 1, tmp_path, seed=0)


def test_benchmark_has_the_published_layout(benchmark: Path) -> None:
    for file in cv_bench.FILES.values():
        assert pq.read_schema(benchmark / file).equals(SCHEMA)
    questions = cv_bench.load(benchmark)
    assert {(q.task, q.source) for q in questions} == {
        *((task, source) for task in ("Count", "Relation") for source in ("ADE20K", "COCO")),
        ("Depth", "Omni3D"),
        ("Distance", "Omni3D"),
    }
    rows = [row for file in cv_bench.FILES.values() for row in pq.read_table(benchmark / file).to_pylist()]
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    assert all(row["prompt"].startswith(row["question"]) for row in rows)
    assert all(row["filename"] == row["image"]["path"] for row in rows)


@given(st.integers())
def test_whoever_sees_no_picture_is_right_as_often_as_chance(asked: list[cv_bench.Question], seed: int) -> None:
    """Whatever was learnt from text: an answer that is any function of the prompt is exactly as good as guessing."""
    right: Counter[str] = Counter()
    for question in asked:
        guess = zlib.crc32(f"{seed}{question.prompt}".encode()) % len(question.choices)
        right[question.task] += question.answer == "ABCD"[guess]
    for task, n in Counter(question.task for question in asked).items():
        assert right[task] == n * (0.25 if task == "Count" else 0.5)


def test_answers_and_letters_are_balanced(asked: list[cv_bench.Question]) -> None:
    for task in cv_bench.TASKS:
        questions = [q for q in asked if q.task == task]
        assert len(questions) >= 0.08 * SCENES
        for source in {q.source for q in questions}:
            letters = Counter(q.answer for q in questions if q.source == source)
            assert len(letters) == len(questions[0].choices)
            assert len(set(letters.values())) == 1
        chosen = Counter((q.question, q.choices["ABCD".index(q.answer)]) for q in questions)
        for text in {q.question for q in questions if task in ("Count", "Depth", "Distance")}:
            assert len({n for (other, _), n in chosen.items() if other == text}) == 1


def test_baselines_see_no_depth(benchmark: Path, asked: list[cv_bench.Question]) -> None:
    baselines = json.loads((benchmark / "baselines.json").read_text())
    names = {"chance", "blind", "height", "size", "pedestal", "image distance", "2-D boxes"}
    assert baselines.keys() == names
    chance = {"Count": 0.25, "Relation": 0.5, "Depth": 0.5, "Distance": 0.5}
    assert baselines["chance"] == chance
    assert baselines["blind"] == pytest.approx(chance)
    for name in names - {"chance", "blind"}:
        assert baselines[name].keys() == chance.keys()
        for task in ("Depth", "Distance"):
            n = sum(q.task == task for q in asked)
            assert abs(baselines[name][task] - 0.5) < 3 * (0.25 / n) ** 0.5


def test_too_few_scenes_for_a_benchmark_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OlaError, match="3 scenes give no two Count questions of one text; expected some hundred"):
        build_benchmark(3, tmp_path, seed=0, workers=1)


def test_benchmark_is_reproducible(benchmark: Path, tmp_path: Path) -> None:
    build_benchmark(SCENES, tmp_path, seed=0, workers=1)
    assert contents(tmp_path) == contents(benchmark)
