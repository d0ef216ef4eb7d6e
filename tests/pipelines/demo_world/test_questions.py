import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pipelines.demo_world.captions import NUMBERS, caption, plural
from pipelines.demo_world.questions import TASKS, Question, deal_letters, questions, text_only
from pipelines.demo_world.scenes import LEVELS, Rendering, Scene, render, sample_scene, scene_seed

Seen = list[tuple[Scene, Rendering]]
#: What only depth, or true size, tells.
ABOUT_DEPTH = re.compile(
    r"\b(near|close|far|furth|dist|deep|dep|front|behind|back|fore|ahead|beyond|away|toward|metre|meter|cm\b|big|large|"
    r"small|tiny|huge|siz|tall|short|high|low|wide|narrow|thick|thin|great|little)\w*"
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.fixture(scope="module")
def seen() -> Seen:
    easy = [sample_scene(scene_seed("gates", index)) for index in range(200)]
    hard = [sample_scene(scene_seed("gates", index), LEVELS["hard"]) for index in range(200, 230)]
    return [(scene, render(scene)) for scene in (*easy, *hard)]


@pytest.fixture(scope="module")
def asked(seen: Seen) -> list[Question]:
    return [q for row, (scene, rendering) in enumerate(seen) for q in questions(scene, rendering, rng(row))]


def test_captions_name_everything_and_never_speak_of_depth(seen: Seen) -> None:
    openings, draw = set(), rng()
    for scene, _ in seen:
        for _ in range(8):
            text = caption(scene, draw)
            openings.add(" ".join(text.split()[:2]))
            assert all(item.name in text for item in scene.objects), text
            assert not ABOUT_DEPTH.search(text.lower()), text
    assert openings >= {"From left", "From right", "On the", "The picture", "There is", "There are"}


def test_captions_count_rightly(seen: Seen) -> None:
    told, draw = set(), rng()
    for scene, _ in seen:
        for _ in range(8):
            if found := re.match(r"The picture shows (\w+) objects", caption(scene, draw)):
                told.add(found[1])
                assert found[1] == NUMBERS[len(scene.objects)]
    assert told == set(NUMBERS[2:])  # of two to nine objects


def test_answers_are_true(seen: Seen) -> None:
    for row, (scene, rendering) in enumerate(seen):
        colours = Counter(o.colour for o in scene.objects)
        by_name = {item.name: index for index, item in enumerate(scene.objects)}
        by_name |= {f"{o.colour} object": i for i, o in enumerate(scene.objects) if colours[o.colour] == 1}
        for question in questions(scene, rendering, rng(row)):
            assert question.scene == scene.seed
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


def test_a_question_turned_round_asks_the_same(asked: list[Question]) -> None:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for question in asked:
        if question.task != "Count":
            turned = question.turned()
            assert turned.turned() == question
            assert turned.names[-2:] == question.names[:-3:-1]
            right, other = question.choices[question.answer], turned.choices[turned.answer]
            assert other == opposite.get(right, right)


def test_counts_always_have_the_same_choices(asked: list[Question]) -> None:
    choices: dict[str, set[tuple[str, ...]]] = {}
    for question in asked:
        if question.task == "Count":
            choices.setdefault(question.kind, set()).add(question.choices)
    assert choices.pop("objects") == {("2", "3", "4", "5"), ("4", "5", "6", "7")}  # of easy and of hard scenes
    assert all(found == {("0", "1", "2", "3")} for found in choices.values())


def test_every_task_is_asked(asked: list[Question]) -> None:
    assert {q.task for q in asked} == set(TASKS)


def test_prompt_is_laid_out_as_the_benchmark_does() -> None:
    question = Question("Count", "cones", ("cones",), ("2", "0"), 1, scene=0)
    assert question.prompt == "How many cones are in the image? Select from the following choices.\n(A) 2\n(B) 0"
    assert question.letter == "(B)"
    assert question.reply == "none: 0 (B)"
    assert replace(question, answer=0, counted=("red", "blue")).reply == "red blue: 2 (A)"


def test_a_relation_follows_from_an_order(asked: list[Question]) -> None:
    for question in (q for q in asked if q.task == "Relation"):
        for relation in (question, question.turned()):
            one, other = (name.removesuffix(" object") for name in relation.names)
            order, said = relation.words.split(": ")
            assert said == relation.choices[relation.answer]
            assert (
                order
                == {
                    "left": f"left to right {one} {other}",
                    "right": f"left to right {other} {one}",
                    "above": f"top to bottom {one} {other}",
                    "below": f"top to bottom {other} {one}",
                }[said]
            )


def test_what_is_counted_is_named_from_left_to_right(seen: Seen, asked: list[Question]) -> None:
    scenes = {scene.seed: (scene, rendering) for scene, rendering in seen}
    for question in (q for q in asked if q.task == "Count"):
        scene, rendering = scenes[question.scene]
        boxes = {i: box for i in range(len(scene.objects)) if (box := rendering.box(i))}
        order = sorted(boxes, key=lambda i: boxes[i][0] + boxes[i][2])
        of_kind = [i for i in order if question.kind in ("objects", plural(scene.objects[i].solid.shape))]
        assert question.counted == tuple(scene.objects[i].colour for i in of_kind)
        assert len(question.counted) == int(question.choices[question.answer])


def test_letters_are_dealt_evenly_and_keep_the_answer(asked: list[Question]) -> None:
    dealt = deal_letters(asked, rng())
    for before, after in zip(asked, dealt, strict=True):
        assert after.choices[after.answer] == before.choices[before.answer]
        assert sorted(after.choices) == sorted(before.choices)
    for kind in {q.kind for q in dealt}:
        letters = Counter(q.letter for q in dealt if q.kind == kind)
        assert max(letters.values()) - min(letters.values()) <= 1


def test_text_only_rows_are_answerable() -> None:
    for seed in range(50):
        question, answer = text_only(rng(seed))
        assert question.endswith("?")
        assert answer.endswith(".")
