"""What can be said and asked about a scene: captions, CV-Bench's four tasks, conversations.

Captions speak of colours, shapes, order across the image and surfaces, never of depth: else there would be nothing
to distil.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.demo_world.scenes import Rendering, Scene
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator

TASKS = ("Count", "Relation", "Depth", "Distance")
LETTERS = "ABCDEF"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LAYOUT = 8  # cells along a side of the map in words: the patches of the student's tower
ENOUGH = 0.0029  # an object that shows on a smaller share of the image is not asked about: 12 pixels of 64 x 64
RELATIONS, DISTANCES = 4, 6  # pairs a scene is asked about, and pairs of distances to each object, at most
DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "What does the picture show?",
    "Give a short caption of the image.",
)


#: What is asked about the names of a question.
TEXTS = {
    "Count": "How many {} are in the image?",
    "Relation": "Considering the relative positions of the {0} and the {1} in the image provided, "
    "where is the {0} located with respect to the {1}?",
    "Depth": "Which object is closer to the camera taking this photo, the {} or the {}?",
    "Distance": "Estimate the real-world distances between objects in this image. "
    "Which object is closer to the {}, the {} or the {}?",
}
View = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `kind` is finer than `task`, and answers are balanced within it."""

    task: str
    kind: str
    names: tuple[str, ...]  # whom the text is about; of objects, the last two are compared
    choices: tuple[str, ...]
    answer: int  # index into choices
    scene: int  # seed of the scene it is about
    views: tuple[View, ...] = ()  # of the objects named: left, top, right, bottom of what shows, 1 if on a pedestal
    counted: tuple[str, ...] = ()  # colours of what is counted, from left to right

    @property
    def text(self) -> str:
        """The question without its choices."""
        return TEXTS[self.task].format(*self.names)

    @property
    def letter(self) -> str:
        """The answer as the benchmark writes it: ``(A)``."""
        return f"({LETTERS[self.answer]})"

    @property
    def words(self) -> str:
        """The answer in words, and first what it follows from, where words can say that.

        ``red blue: 2`` of a number, ``columns 3 7: left`` or ``rows 5 2: below`` of a relation, else the choice alone.
        """
        said = self.choices[self.answer]
        if self.task == "Count":
            return f"{' '.join(self.counted) or 'none'}: {said}"
        if self.task == "Relation":
            axis = int(self.kind == "above")
            one, other = (int(LAYOUT * (view[axis] + view[axis + 2]) / 2) + 1 for view in self.views)
            return f"{('columns', 'rows')[axis]} {one} {other}: {said}"
        return said

    @property
    def reply(self) -> str:
        """The answer as a student is taught to give it: ``red blue: 2 (C)``.

        Step by step: to find the answer and, in the same step, which letter it has is more than a small model learns.
        """
        return f"{self.words} {self.letter}"

    @property
    def prompt(self) -> str:
        """Question and choices as in CV-Bench's field `prompt`."""
        lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([f"{self.text} Select from the following choices.", *lines])

    def turned(self) -> "Question":
        """The same with the two objects that are compared in the other order: so is the answer's place in `choices`."""
        *anchor, one, other = self.names
        *seen, first, second = self.views
        choices = self.choices if self.task == "Relation" else self.choices[::-1]
        return replace(
            self,
            names=(*anchor, other, one),
            views=(*seen, second, first),
            choices=choices,
            answer=len(choices) - 1 - self.answer,
        )


def caption(scene: Scene, rng: Rng) -> str:
    """One of several phrasings; names every object once, in order, or tells their places in pairs."""
    places = scene.camera.project(np.stack([item.solid.centre for item in scene.objects]))
    style = int(rng.integers(7))
    order = places[:, int(style == 6)].argsort().tolist()
    names = [scene.objects[i].name for i in order]
    things = [_article(scene.objects[i].name) + (" on a pedestal" if scene.objects[i].pedestal else "") for i in order]
    if style == 0:
        text = f"From left to right: {_join(things)}."
    elif style == 1:
        text = f"The picture shows {NUMBERS[len(names)]} objects: {_join(things)}, in this order."
    elif style == 2:
        text = f"On the left there is {things[0]}. " + " ".join(f"Then comes {thing}." for thing in things[1:])
    elif style == 3:
        pairs = [f"The {a} is to the left of the {b}." for a, b in list(itertools.pairwise(names))[:2]]
        text = f"There is {_join(things)}. " + " ".join(pairs)
    elif style == 4:
        text = f"From right to left: {_join(things[::-1])}."
    elif style == 6:
        text = f"From top to bottom: {_join(things)}."
    else:
        counts = [(NUMBERS[n], s) for s in SHAPES if (n := sum(o.solid.shape == s for o in scene.objects))]
        text = f"There are {_join([f'{n} {s if n == NUMBERS[1] else plural(s)}' for n, s in counts])}: {_join(things)}."
    if rng.random() < 0.5:
        text += f" {surfaces(scene)}"
    above = _stacked(scene, places[:, 1].tolist(), rng)
    return f"{text} {above}" if above and rng.random() < 0.5 else text


def surfaces(scene: Scene) -> str:
    """One sentence on floor and wall."""
    return f"The floor is {scene.floor.pattern} and the wall is {scene.wall.pattern}."


def plural(shape: str) -> str:
    """``box`` → ``boxes``."""
    return shape + ("es" if shape.endswith("x") else "s")


def questions(scene: Scene, rendering: Rendering, rng: Rng) -> list[Question]:
    """Every kind of question the scene admits, many of each; what is ambiguous in the image is not asked.

    Choices are in natural order: numbers rising, left before right, above before below, and objects as they are named.
    """
    boxes = [rendering.box(i) or (0.0, 0.0, 0.0, 0.0) for i in range(len(scene.objects))]
    raised = [float(item.pedestal is not None) for item in scene.objects]
    centres = np.stack([item.solid.centre for item in scene.objects])
    ask = _Asker(
        scene,
        names=_short_names(scene),
        views=[(*box, foot) for box, foot in zip(boxes, raised, strict=True)],
        depths=scene.camera.project(centres)[:, 2].tolist(),
        apart=np.linalg.norm(centres[:, None] - centres, axis=-1).tolist(),
    )
    seen = [i for i in range(len(boxes)) if rendering.pixels(i) >= ENOUGH * rendering.panoptic.size]
    found = ask.count() if len(seen) == len(boxes) else []
    pairs = list(itertools.combinations(rng.permutation(seen).tolist(), 2))
    for a, b in pairs:
        found += ask.depth(a, b)
    for a, b in pairs[:RELATIONS]:
        found += ask.relation(a, b)
    for anchor in seen:
        others = rng.permutation([i for i in seen if i != anchor]).tolist()
        for a, b in list(itertools.combinations(others, 2))[:DISTANCES]:
            found += ask.distance(anchor, a, b)
    return found


def _short_names(scene: Scene) -> list[str]:
    """What questions call each object; the fewer names there are, the more scenes can be asked the very same."""
    colours = Counter(item.colour for item in scene.objects)
    return [f"{item.colour} object" if colours[item.colour] == 1 else item.name for item in scene.objects]


@dataclass(frozen=True)
class _Asker:
    """What can be asked about a scene's objects, given by index; [] for what would be ambiguous."""

    scene: Scene
    names: list[str]
    views: list[View]
    depths: list[float]  # of their centres, metres
    apart: list[list[float]]  # distances between their centres, metres

    def count(self) -> list[Question]:
        """How many of a shape (0 to 3), how many objects: always the same four choices, so that text tells nothing."""
        objects = [self.scene.objects[i] for i in np.argsort([view[0] + view[2] for view in self.views])]
        shapes = [(plural(s), tuple(o.colour for o in objects if o.solid.shape == s), 0) for s in SHAPES]
        everything = ("objects", tuple(o.colour for o in objects), self.scene.level.objects[0])
        return [
            Question(
                "Count",
                what,
                (what,),
                tuple(str(least + i) for i in range(4)),
                len(found) - least,
                self.scene.seed,
                counted=found,
            )
            for what, found, least in [*shapes, everything]
            if least <= len(found) < least + 4
        ]

    def relation(self, a: int, b: int) -> list[Question]:
        """Left or right, above or below, where centres differ clearly."""
        found = []
        for axis, words in ((0, ("left", "right")), (1, ("above", "below"))):
            one, other = (self.views[i][axis] + self.views[i][axis + 2] for i in (a, b))
            if abs(one - other) > 0.24:
                found.append(self._question("Relation", words[0], (a, b), words, one < other))
        return found

    def depth(self, a: int, b: int) -> list[Question]:
        """Which of two is closer to the camera, where depths differ by a seventh at least."""
        one, other = self.depths[a], self.depths[b]
        if max(one, other) < 1.15 * min(one, other):
            return []
        return [self._question("Depth", "depth", (a, b), (self.names[a], self.names[b]), one < other)]

    def distance(self, anchor: int, a: int, b: int) -> list[Question]:
        """Which of two is closer, in the world, to a third; distances differ by a fifth at least."""
        one, other = self.apart[anchor][a], self.apart[anchor][b]
        if max(one, other) < 1.2 * min(one, other):
            return []
        return [self._question("Distance", "distance", (anchor, a, b), (self.names[a], self.names[b]), one < other)]

    def _question(
        self, task: str, kind: str, objects: tuple[int, ...], choices: tuple[str, str], first: bool
    ) -> Question:
        names, views = tuple(self.names[i] for i in objects), tuple(self.views[i] for i in objects)
        return Question(task, kind, names, choices, int(not first), self.scene.seed, views)


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


def segment_names(scene: Scene, rendering: Rendering) -> dict[int, str]:
    """What every segment shows, by id: ``red sphere``, ``pedestal``, ``floor``, ``wall``."""
    return {
        s.id: s.category if s.object is None or s.category == "pedestal" else scene.objects[s.object].name
        for s in rendering.segments
    }


def layout(panoptic: NDArray[np.integer[Any]], names: Mapping[int, str]) -> list[str]:
    """The image as a map in words, ``LAYOUT × LAYOUT`` cells in reading order: what each shows most of.

    An object wins a cell of which it fills a quarter. No depth is in it.

    Args:
        panoptic: segment ids (side, side).
        names: as of `segment_names`.
    """
    side = len(panoptic) // LAYOUT
    cells = panoptic.reshape(LAYOUT, side, LAYOUT, side).swapaxes(1, 2).reshape(LAYOUT**2, side**2)
    filled = np.stack([(cells == id).sum(axis=1) for id in names], axis=1)
    objects = np.array([" " in name for name in names.values()])
    most = np.where(objects & (filled >= side**2 / 4), filled + side**2, filled).argmax(axis=1)
    found = list(names.values())
    return [found[i] for i in most]


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


def _stacked(scene: Scene, heights: list[float], rng: Rng) -> str:
    """One sentence on which of two objects is higher up in the image, if any two differ clearly."""
    objects = range(len(scene.objects))
    pairs = [(a, b) for a, b in itertools.permutations(objects, 2) if heights[a] < heights[b] - 0.24]
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
