from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.demo_world.cues import THREE_D, BoxModel, without_cues
from pipelines.demo_world.language import (
    TASKS,
    Question,
    balance,
    caption,
    deal_letters,
    plural,
    questions,
    text_only,
)
from pipelines.demo_world.scenes import Rendering, Scene, render, sample_scene, scene_seed

Seen = list[tuple[Scene, Rendering]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.fixture(scope="module")
def seen() -> Seen:
    scenes = [sample_scene(scene_seed("gates", index)) for index in range(300)]
    return [(scene, render(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def asked(seen: Seen) -> list[Question]:
    return [q for row, (scene, rendering) in enumerate(seen) for q in questions(scene, rendering, rng(row))]


def test_captions_name_everything_and_never_speak_of_depth(seen: Seen) -> None:
    for row, (scene, _) in enumerate(seen):
        text = caption(scene, rng(row))
        assert all(item.name in text for item in scene.objects), text
        for word in ("near", "close", "far", "front", "behind", "distance", "deep", "depth", "metre", "large", "small"):
            assert word not in text.lower(), text


def test_answers_are_true(seen: Seen) -> None:
    for row, (scene, rendering) in enumerate(seen):
        by_name = {item.name: index for index, item in enumerate(scene.objects)}
        for question in questions(scene, rendering, rng(row)):
            right = question.choices[question.answer]
            wrong = [choice for choice in question.choices if choice != right]
            if question.task == "Count":
                what = question.text.split()[2]
                number = sum(what in (plural(o.solid.shape), "objects") for o in scene.objects)
                assert int(right) == number
            elif question.task == "Depth":
                assert scene.depth_of(by_name[right]) < scene.depth_of(by_name[wrong[0]])
            elif question.task == "Distance":
                anchor = next(n for n in by_name if f"closer to the {n}," in question.text)
                middle = {name: scene.objects[i].solid.centre for name, i in by_name.items()}
                near, far = (np.linalg.norm(middle[n] - middle[anchor]) for n in (right, wrong[0]))
                assert near < far
            else:
                one = next(n for n in by_name if f"where is the {n} located" in question.text)
                other = next(n for n in by_name if f"respect to the {n}?" in question.text)
                a, b = rendering.box(by_name[one]), rendering.box(by_name[other])
                assert a is not None
                assert b is not None
                axis = 0 if right in ("left", "right") else 1
                assert (a[axis] + a[axis + 2] < b[axis] + b[axis + 2]) == (right in ("left", "above"))


def test_every_task_is_asked(asked: list[Question]) -> None:
    assert {q.task for q in asked} == set(TASKS)


def test_prompt_is_laid_out_as_the_benchmark_does() -> None:
    question = Question("Count", "cones", "How many cones are in the image?", ("2", "0"), 1)
    assert question.prompt == "How many cones are in the image? Select from the following choices.\n(A) 2\n(B) 0"
    assert question.letter == "(B)"


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans())), st.integers(0, 9))
def test_balance_makes_strata_equal_and_as_large_as_can_be(items: list[tuple[int, bool]], seed: int) -> None:
    kept = balance(list(enumerate(items)), lambda i: i[1][0], lambda i: i[1][1], (True, False), rng(seed))
    assert kept == sorted(kept)
    for group in range(3):
        have = Counter(flag for g, flag in items if g == group)
        found = Counter(flag for _, (g, flag) in kept if g == group)
        assert found[True] == found[False] == min(have[True], have[False])


def test_letters_are_dealt_evenly_and_keep_the_answer(asked: list[Question]) -> None:
    dealt = deal_letters(asked, rng())
    for before, after in zip(asked, dealt, strict=True):
        assert after.choices[after.answer] == before.choices[before.answer]
        assert sorted(after.choices) == sorted(before.choices)
    for kind in {q.kind for q in dealt}:
        letters = Counter(q.letter for q in dealt if q.kind == kind)
        assert max(letters.values()) - min(letters.values()) <= 1


def test_two_dimensional_cues_give_nothing_away(asked: list[Question]) -> None:
    """A model of the boxes answers the natural questions well, and those that are kept about as well as a coin."""

    def accuracy(model: BoxModel, task: str, among: list[Question]) -> float:
        return float((model.right([q for q in among if q.task == task]) > 0.5).mean())

    natural = BoxModel(asked)
    kept = without_cues(asked, rng())
    for task in THREE_D:
        assert accuracy(natural, task, asked) > 0.75
        assert abs(accuracy(natural, task, kept) - 0.5) < 0.1
        assert accuracy(BoxModel(kept), task, kept) < 0.65


def test_text_only_rows_are_answerable() -> None:
    for seed in range(50):
        question, answer = text_only(rng(seed))
        assert question.endswith("?")
        assert answer.endswith(".")
