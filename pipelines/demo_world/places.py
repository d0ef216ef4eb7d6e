"""Where everything in a picture is, told in few and dense words; no depth is in it.

Nearly every word has to be looked up, so nothing teaches faster to look things up: a language model in a map of words,
a projector in a picture.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.demo_world.captions import plural
from pipelines.demo_world.scenes import Rendering, Scene
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator

LAYOUT = 8  # cells along a side of the map in words: the patches of the student's tower
ORDERS = ("left to right", "top to bottom")
WHERE = "Where is everything? Column and row."
RELATIONS = 2  # pairs that are told to be left, right, above, below, at most


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


def places(cells: Sequence[str], rng: Rng) -> str:
    """Column and row of every object, the objects sorted both ways and by shape, and how some pairs are placed.

    ``red 5 2, blue 7 4; left to right red blue; top to bottom red blue; cones none; boxes red blue; …; red left blue``.
    Columns and rows count from 1, of the middle of the cells that show an object.

    Args:
        cells: `layout`.
        rng: in which order and of which pairs it is told.

    Returns:
        Empty if no cell shows an object.
    """
    shown = np.array(cells)
    found = sorted({cell for cell in cells if " " in cell})
    if not found:
        return ""
    colours = [name.split()[0] for name in found]
    middles, shapes = {}, {}
    for name, colour in zip(found, colours, strict=True):
        row, column = (float(v.mean()) + 1 for v in divmod(np.flatnonzero(shown == name), LAYOUT))
        short = colour if colours.count(colour) == 1 else name
        middles[short], shapes[short] = (column, row), name.split()[1]
    names = [list(middles)[i] for i in rng.permutation(len(middles))]
    across, down = (sorted(names, key=lambda name: middles[name][axis]) for axis in (0, 1))
    told = [", ".join(f"{name} {round(middles[name][0])} {round(middles[name][1])}" for name in names)]
    told += [" ".join([order, *sorted_names]) for order, sorted_names in zip(ORDERS, (across, down), strict=True)]
    for shape in (SHAPES[i] for i in rng.permutation(len(SHAPES))):
        told.append(
            " ".join([plural(shape), *([name.split()[0] for name in across if shapes[name] == shape] or ["none"])])
        )
    for one, other in list(itertools.permutations(names, 2))[:RELATIONS]:
        axis = int(rng.integers(2))
        offset = middles[one][axis] - middles[other][axis]
        if abs(offset) > 0.9:
            told.append(f"{one} {(('left', 'right'), ('above', 'below'))[axis][offset > 0]} {other}")
    return "; ".join(told)
