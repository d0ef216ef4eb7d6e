"""Where everything in a picture is, told in few and dense words; no depth is in it.

Nearly every word has to be looked up, so nothing teaches faster to look things up: a language model in a map of words,
a projector in a picture.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from pipelines.demo_world.language import LAYOUT, plural
from pipelines.demo_world.solids import SHAPES

Rng = np.random.Generator

WHERE = "Where is everything? Column and row."
RELATIONS = 2  # pairs that are told to be left, right, above, below, at most


def places(cells: Sequence[str], rng: Rng) -> str:
    """Column and row of every object, the objects sorted both ways and by shape, and how some pairs are placed.

    ``red 5 2, blue 7 4; left to right red blue; top to bottom red blue; cones none; boxes red blue; …; red left blue``.
    Columns and rows count from 1, of the middle of the cells that show an object.

    Args:
        cells: `language.layout`.
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
    told += [" ".join(["left to right", *across]), " ".join(["top to bottom", *down])]
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
