from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.demo_world import cues
from pipelines.demo_world.matching import CALIPER, deal, evenly, matched
from pipelines.demo_world.questions import Question, questions
from pipelines.demo_world.scenes import render, sample_scene, scene_seed

NUMBERS, SIDES = ("0", "1", "2", "3"), ("left", "right")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def count(shape: str, answer: int) -> Question:
    return Question("Count", shape, (shape,), NUMBERS, answer, scene=0)


def relation(one: str, other: str, answer: int) -> Question:
    nowhere = (0.0, 0.0, 0.0, 0.0, 0.0)
    return Question("Relation", "left", (one, other), SIDES, answer, scene=0, views=(nowhere, nowhere))


counts = st.builds(count, st.sampled_from(["cones", "boxes"]), st.integers(0, 3))
relations = st.builds(relation, st.sampled_from("abc"), st.sampled_from("def"), st.integers(0, 1))
turned = st.builds(Question.turned, relations)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    scenes = [sample_scene(scene_seed("gates", index)) for index in range(250)]
    return [q for row, scene in enumerate(scenes) for q in questions(scene, render(scene), rng(row))]


@given(st.lists(counts | relations | turned), st.integers(0, 9))
def test_a_group_has_one_text_and_every_answer_once(asked: list[Question], seed: int) -> None:
    for group in deal(matched(asked, rng(seed), same_text=True), rng(seed)):
        assert len({q.prompt for q in group}) == 1
        assert sorted(q.answer for q in group) == list(range(len(group[0].choices)))
        assert {q.choices[q.answer] for q in group} == set(group[0].choices)


@given(st.lists(relations | turned), st.integers(0, 9))
def test_as_many_groups_as_can_be(asked: list[Question], seed: int) -> None:
    """Left of and right of, over any order of naming: the rarer of the two decides."""
    sides: Counter[tuple[str, str, bool]] = Counter()
    for q in asked:
        one, other = sorted(q.names)
        sides[one, other, (q.choices[q.answer] == "left") == (q.names[0] == one)] += 1
    pairs = {(one, other) for one, other, _ in sides}
    wanted = sum(min(sides[one, other, True], sides[one, other, False]) for one, other in pairs)
    assert len(matched(asked, rng(seed), same_text=True)) == wanted


@given(st.lists(counts, max_size=200), st.integers(0, 40))
def test_kinds_stay_even_when_there_are_too_many(asked: list[Question], most: int) -> None:
    groups = matched(asked, rng(), same_text=True)
    chosen = evenly(groups, most)
    assert len(chosen) == min(len(groups), most // 4)
    had, kept = (Counter(group[0].kind for group in some) for some in (groups, chosen))
    for kind, n in kept.items():
        assert n >= min(had[kind], len(chosen) // 2)


@given(st.integers(0, 5), st.integers(0, 9))
def test_every_answer_has_every_letter_equally_often(repeats: int, seed: int) -> None:
    asked = [count("cones", answer) for answer in range(4) for _ in range(4 * repeats)]
    dealt = deal(matched(asked, rng(seed), same_text=True), rng(seed))
    met = Counter((q.choices[q.answer], q.letter) for group in dealt for q in group)
    assert len(met) == (16 if repeats else 0)
    assert set(met.values()) <= {repeats}


def test_dealing_keeps_the_right_answer(asked: list[Question]) -> None:
    """Turned or not, the same object is closer, and the one named first is where it was."""
    groups = matched(asked, rng(), same_text=False)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for before, after in zip(groups, deal(groups, rng()), strict=True):
        for one, other in zip(before, after, strict=True):
            assert sorted(one.choices) == sorted(other.choices)
            right = one.choices[one.answer]
            if one.names != other.names:
                right = opposite.get(right, right)
            assert other.choices[other.answer] == right


def test_questions_are_used_once_and_cues_are_alike(asked: list[Question]) -> None:
    groups = matched(asked, rng(), same_text=False)
    used = Counter((q.scene, q.task, q.kind, frozenset(q.names), q.names[0]) for group in groups for q in group)
    assert max(used.values()) == 1
    for group in groups:
        scores = cues.scores(group)
        assert scores.max() - scores.min() <= CALIPER + 1e-4


def test_cues_no_longer_tell_the_answers(asked: list[Question]) -> None:
    """The cue model answers the natural questions well, and those that are kept about as well as a coin."""

    def accuracy(among: list[Question], task: str) -> float:
        mine = [q for q in among if q.task == task]
        return float(np.mean((cues.scores(mine) > 0) == cues.first_is_right(mine)))

    kept = [q for group in deal(matched(asked, rng(), same_text=False), rng()) for q in group]
    for task in cues.THREE_D:
        assert accuracy(asked, task) > 0.85
        assert abs(accuracy(kept, task) - 0.5) < 0.1
