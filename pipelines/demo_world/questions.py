"""What can be asked about a scene: CV-Bench's four tasks, and questions about words alone."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np

from pipelines.demo_world.captions import plural
from pipelines.demo_world.places import ORDERS
from pipelines.demo_world.scenes import Rendering, Scene
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator

TASKS = ("Count", "Relation", "Depth", "Distance")
LETTERS = "ABCDEF"
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

        ``red blue: 2`` of a number, ``left to right blue red: right`` of a relation, else the choice alone.
        """
        said = self.choices[self.answer]
        if self.task == "Count":
            return f"{' '.join(self.counted) or 'none'}: {said}"
        if self.task == "Relation":
            first, second = (name.removesuffix(" object") for name in self.names)
            order = (first, second) if said in ("left", "above") else (second, first)
            return f"{' '.join([ORDERS[said in ('above', 'below')], *order])}: {said}"
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


def _number(shape: str, count: int) -> str:
    return shape if count == 1 else plural(shape)
