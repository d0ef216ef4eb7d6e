"""Captions of scenes.

They speak of colours, shapes, order across the image and surfaces, never of depth: else there would be nothing to
distil.
"""

import itertools

import numpy as np

from pipelines.demo_world.scenes import Scene
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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
