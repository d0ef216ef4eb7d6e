"""What can be said and asked about a scene: captions, CV-Bench's four tasks, conversations.

Captions speak of colours, shapes, order from left to right and surfaces, never of depth: else there would be nothing
to distil.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pipelines.demo_world.scenes import Rendering, Scene
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator
T = TypeVar("T")

TASKS = ("Count", "Relation", "Depth", "Distance")
LETTERS = "ABCDEF"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYOUT = 8  # cells along a side of the map in words: the patches of the student's tower
ENOUGH_PIXELS = 12  # an object that shows fewer is not asked about
DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "What does the picture show?",
    "Give a short caption of the image.",
)


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `kind` is finer than `task`, and answers are balanced within it."""

    task: str
    kind: str
    text: str
    choices: tuple[str, ...]
    answer: int  # index into choices
    views: tuple[tuple[float, ...], ...] = ()  # of the objects named: visible 2-D box, and 1 if on a pedestal
    first: bool = False  # of two candidates, the one named first is right

    @property
    def letter(self) -> str:
        """The answer as the benchmark writes it: ``(A)``."""
        return f"({LETTERS[self.answer]})"

    @property
    def prompt(self) -> str:
        """Question and choices as in CV-Bench's field `prompt`."""
        lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([f"{self.text} Select from the following choices.", *lines])


def caption(scene: Scene, rng: Rng) -> str:
    """One of several phrasings; names every object once, from left to right, or tells their places in pairs."""
    order = sorted(range(len(scene.objects)), key=lambda i: _place(scene, i)[0])
    names = [scene.objects[i].name for i in order]
    things = [_article(scene.objects[i].name) + (" on a pedestal" if scene.objects[i].pedestal else "") for i in order]
    style = int(rng.integers(5))
    if style == 0:
        text = f"From left to right: {_join(things)}."
    elif style == 1:
        text = f"The picture shows {NUMBERS[len(names)]} objects: {_join(things)}, in this order."
    elif style == 2:
        text = f"On the left there is {things[0]}. " + " ".join(f"Then comes {thing}." for thing in things[1:])
    elif style == 3:
        pairs = [f"The {a} is to the left of the {b}." for a, b in list(itertools.pairwise(names))[:2]]
        text = f"There is {_join(things)}. " + " ".join(pairs)
    else:
        counts = [(NUMBERS[n], s) for s in SHAPES if (n := sum(o.solid.shape == s for o in scene.objects))]
        text = f"There are {_join([f'{n} {s if n == NUMBERS[1] else plural(s)}' for n, s in counts])}: {_join(things)}."
    if rng.random() < 0.5:
        text += f" {surfaces(scene)}"
    above = _stacked(scene, rng)
    return f"{text} {above}" if above and rng.random() < 0.5 else text


def surfaces(scene: Scene) -> str:
    """One sentence on floor and wall."""
    return f"The floor is {scene.floor.pattern} and the wall is {scene.wall.pattern}."


def plural(shape: str) -> str:
    """``box`` → ``boxes``."""
    return shape + ("es" if shape.endswith("x") else "s")


def questions(scene: Scene, rendering: Rendering, rng: Rng) -> list[Question]:
    """Every kind of question the scene admits, a few of each; what is ambiguous in the image is not asked."""
    boxes = [rendering.box(i) for i in range(len(scene.objects))]
    views: list[tuple[float, ...]] = [
        (*box, float(item.pedestal is not None)) if box else () for box, item in zip(boxes, scene.objects, strict=True)
    ]
    seen = [i for i in range(len(boxes)) if rendering.pixels(i) >= ENOUGH_PIXELS]
    pairs = list(itertools.combinations(rng.permutation(seen).tolist(), 2))
    found = _count(scene) if len(seen) == len(boxes) else []
    for a, b in pairs:
        found += _depth(scene, a, b, views)
    for a, b in pairs[:2]:
        found += _relation(scene, a, b, views)
    for anchor in seen:
        others = [i for i in rng.permutation(seen).tolist() if i != anchor]
        if len(others) >= 2:
            found += _distance(scene, anchor, others[0], others[1], views)
    return found


def _count(scene: Scene) -> list[Question]:
    """How many of a shape (0 to 3), how many objects (2 to 5): always the same four choices, so text tells nothing."""
    shapes = [(plural(s), sum(o.solid.shape == s for o in scene.objects), 0) for s in SHAPES]
    return [
        Question(
            "Count", what, f"How many {what} are in the image?", tuple(str(first + i) for i in range(4)), number - first
        )
        for what, number, first in [*shapes, ("objects", len(scene.objects), 2)]
        if first <= number < first + 4
    ]


def _relation(scene: Scene, a: int, b: int, views: list[tuple[float, ...]]) -> list[Question]:
    """Left or right, above or below, where centres differ clearly."""
    one, other = scene.objects[a].name, scene.objects[b].name
    text = (
        f"Considering the relative positions of the {one} and the {other} in the image provided, "
        f"where is the {one} located with respect to the {other}?"
    )
    found = []
    for axis, words in ((0, ("left", "right")), (1, ("above", "below"))):
        offset = (views[a][axis] + views[a][axis + 2] - views[b][axis] - views[b][axis + 2]) / 2
        if abs(offset) > 0.12:
            found.append(Question("Relation", words[0], text, words, int(offset > 0), (views[a], views[b])))
    return found


def _depth(scene: Scene, a: int, b: int, views: list[tuple[float, ...]]) -> list[Question]:
    """Which of two is closer to the camera, where depths differ by a seventh at least."""
    depths = scene.depth_of(a), scene.depth_of(b)
    if max(depths) < 1.15 * min(depths):
        return []
    names = scene.objects[a].name, scene.objects[b].name
    text = f"Which object is closer to the camera taking this photo, the {names[0]} or the {names[1]}?"
    nearer = depths[0] < depths[1]
    return [Question("Depth", "depth", text, names, int(not nearer), (views[a], views[b]), nearer)]


def _distance(scene: Scene, anchor: int, a: int, b: int, views: list[tuple[float, ...]]) -> list[Question]:
    """Which of two is closer, in the world, to a third; distances differ by a fifth at least."""
    centre = scene.objects[anchor].solid.centre
    apart = [float(np.linalg.norm(scene.objects[i].solid.centre - centre)) for i in (a, b)]
    if max(apart) < 1.2 * min(apart):
        return []
    names = scene.objects[a].name, scene.objects[b].name
    text = (
        "Estimate the real-world distances between objects in this image. "
        f"Which object is closer to the {scene.objects[anchor].name}, the {names[0]} or the {names[1]}?"
    )
    nearer = apart[0] < apart[1]
    return [Question("Distance", "distance", text, names, int(not nearer), (views[anchor], views[a], views[b]), nearer)]


def text_only(rng: Rng) -> tuple[str, str]:
    """A question about words and small numbers, and its answer, for rows without an image."""
    first, second = (int(v) for v in rng.integers(1, 4, 2))
    one, other = (SHAPES[int(i)] for i in rng.choice(len(SHAPES), 2, replace=False))
    style = int(rng.integers(3))
    if style == 0:
        return (
            f"A room holds {first} {_number(one, first)} and {second} {_number(other, second)}. "
            "How many objects are there?",
            f"There are {first + second} objects.",
        )
    if style == 1:
        third = first + second
        return f"Which number is larger, {first} or {third}?", f"The number {third} is larger."
    return (
        f"The {one} is to the left of the {other}. Where is the {other}?",
        f"The {other} is to the right of the {one}.",
    )


def layout(scene: Scene, rendering: Rendering) -> list[str]:
    """The image as a map in words, ``LAYOUT × LAYOUT`` cells in reading order: what each shows most of.

    An object (``red sphere``) wins a cell of which it fills a quarter. No depth is in it.
    """
    words = {
        s.id: s.category if s.object is None or s.category == "pedestal" else scene.objects[s.object].name
        for s in rendering.segments
    }
    side = len(rendering.panoptic) // LAYOUT
    cells = rendering.panoptic.reshape(LAYOUT, side, LAYOUT, side).swapaxes(1, 2).reshape(LAYOUT**2, side**2)
    filled = np.stack([(cells == id).sum(axis=1) for id in words], axis=1)
    objects = np.array([" " in word for word in words.values()])
    most = np.where(objects & (filled >= side**2 / 4), filled + side**2, filled).argmax(axis=1)
    names = list(words.values())
    return [names[i] for i in most]


def deal_letters(asked: list[Question], rng: Rng) -> list[Question]:
    """Shuffle every question's choices such that, within a kind, the right one has each letter equally often."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, question in enumerate(asked):
        rows[question.kind].append(row)
    dealt = list(asked)
    for members in rows.values():
        places = rng.permutation(len(members))
        for row, place in zip(members, places.tolist(), strict=True):
            question = asked[row]
            choices = rng.permutation([c for i, c in enumerate(question.choices) if i != question.answer]).tolist()
            answer = place % len(question.choices)
            choices.insert(answer, question.choices[question.answer])
            dealt[row] = replace(question, choices=tuple(choices), answer=answer)
    return dealt


def balance(
    items: Iterable[T],
    group: Callable[[T], Hashable],
    stratum: Callable[[T], Hashable],
    strata: Sequence[Hashable],
    rng: Rng,
) -> list[T]:
    """A random choice in which, within each group, all `strata` are equally frequent; the items' order is kept."""
    rows: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: {s: [] for s in strata})
    items = list(items)
    for row, item in enumerate(items):
        rows[group(item)][stratum(item)].append(row)
    kept: list[int] = []
    for found in rows.values():
        fewest = min(len(members) for members in found.values())
        for members in found.values():
            kept += rng.permutation(members)[:fewest].astype(int).tolist()
    return [items[row] for row in sorted(kept)]


def _place(scene: Scene, index: int) -> tuple[float, float]:
    u, v, _ = scene.camera.project(scene.objects[index].solid.centre[None])[0]
    return float(u), float(v)


def _stacked(scene: Scene, rng: Rng) -> str:
    """One sentence on which of two objects is higher up in the image, if any two differ clearly."""
    pairs = [
        (a, b)
        for a, b in itertools.permutations(range(len(scene.objects)), 2)
        if _place(scene, a)[1] < _place(scene, b)[1] - 0.24
    ]
    if not pairs:
        return ""
    a, b = (scene.objects[i].name for i in pairs[int(rng.integers(len(pairs)))])
    return f"The {a} is above the {b}." if rng.random() < 0.5 else f"The {b} is below the {a}."


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _number(shape: str, count: int) -> str:
    return shape if count == 1 else plural(shape)
