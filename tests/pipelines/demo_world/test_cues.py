from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipelines.demo_world import cues, train_cues
from pipelines.demo_world.benchmark import fit_baselines
from pipelines.demo_world.questions import Question

places, sizes = st.floats(0.0, 0.5), st.floats(0.1, 0.5)
views = st.builds(
    lambda left, top, width, height, raised: (left, top, left + width, top + height, float(raised)),
    *(places, places, sizes, sizes, st.booleans()),
)
Boxes = tuple[float, float, float, float, float]


def depth(one: Boxes, other: Boxes, answer: int = 0) -> Question:
    return Question("Depth", "depth", ("red cone", "blue box"), ("red cone", "blue box"), answer, 0, (one, other))


def distance(anchor: Boxes, one: Boxes, other: Boxes, answer: int = 0) -> Question:
    names = ("red cone", "blue box", "cyan box")
    return Question("Distance", "distance", names, names[1:], answer, 0, (anchor, one, other))


@given(views, views, views)
def test_the_order_of_naming_changes_only_the_sign(anchor: Boxes, one: Boxes, other: Boxes) -> None:
    for question in (depth(one, other), distance(anchor, one, other)):
        ahead, behind = cues.scores([question, question.turned()])
        assert ahead == pytest.approx(-behind, abs=1e-3)
        cue, turned = cues.single_cues(question), cues.single_cues(question.turned())
        assert all(cue[name] == pytest.approx(-turned[name]) for name in cue)


def test_single_cues_point_where_a_person_would_look() -> None:
    low, high = (0.4, 0.6, 0.6, 0.9, 0.0), (0.1, 0.1, 0.2, 0.2, 1.0)
    cue = cues.single_cues(depth(low, high))
    assert cue["height"] > 0  # the first is lower
    assert cue["size"] > 0  # and bigger
    assert cue["pedestal"] < 0  # and on the floor
    assert cue["image distance"] == 0
    assert all(
        value > 0 for value in cues.single_cues(distance(low, low, high)).values()
    )  # the first is like the third


def test_baselines_find_a_cue_that_gives_everything_away() -> None:
    """Questions whose answer is the lower object: height and the box model know it, text and other cues do not."""
    rng = np.random.Generator(np.random.PCG64(0))

    def made(n: int) -> list[Question]:
        found = []
        for answer in (i % 2 for i in range(n)):
            low, high = ((0.4, v, 0.6, v + 0.2, 0.0) for v in (rng.uniform(0.5, 0.7), rng.uniform(0.1, 0.4)))
            one, other = (high, low) if answer else (low, high)
            found.append(depth(one, other, answer))
            found.append(distance(low, one, other, answer))
            found.append(Question("Count", "cones", ("cones",), ("0", "1"), answer, 0))
            found.append(Question("Relation", "left", ("a", "b"), ("left", "right"), answer, 0))
        return found

    baselines = fit_baselines(made(100), made(200))
    for task in cues.THREE_D:
        assert baselines["height"][task] == 1
        assert baselines["2-D boxes"][task] > 0.9
    assert baselines["size"]["Depth"] == pytest.approx(0.5, abs=0.2)
    assert baselines["pedestal"] == {"Count": 0.5, "Relation": 0.5, "Depth": 0.5, "Distance": 0.5}
    assert baselines["image distance"]["Distance"] == 1
    assert baselines["blind"]["Relation"] == 0.5


def test_training_is_reproducible(tmp_path: Path) -> None:
    asked = [q for q in train_cues.gather("gates", {"easy": 60, "hard": 5}, workers=1) if q.task == "Depth"]
    weights = train_cues.train("Depth", asked, steps=60)
    again = train_cues.train("Depth", asked, steps=60)
    assert weights.keys() == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    assert all((again[name] == tensor).all() for name, tensor in weights.items())
    train_cues.save({f"Depth.{name}": tensor for name, tensor in weights.items()}, tmp_path)
    assert (load_file(tmp_path / "model.safetensors")["Depth.0.weight"] == weights["0.weight"].numpy()).all()
