"""Where everything in a picture is, told in few and dense words; no depth is in it.

Nearly every word has to be looked up, so nothing teaches faster to look things up: a language model in a map of words,
a projector in a picture.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from pipelines.demo_world.language import LAYOUT

Rng = np.random.Generator

WHERE = "Where is everything? Column and row."
RELATIONS = 2  # pairs that are told to be left, right, above, below, at most


def places(cells: Sequence[str], rng: Rng) -> str:
    """Column and row of every object, the objects sorted both ways, and how some pairs are placed.

    ``red 5 2, blue 7 4; left to right red blue; top to bottom red blue; red left blue``. Columns and rows count from 1,
    of the middle of the cells that show an object.

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
    middles = {}
    for name, colour in zip(found, colours, strict=True):
        row, column = (float(v.mean()) + 1 for v in divmod(np.flatnonzero(shown == name), LAYOUT))
        middles[colour if colours.count(colour) == 1 else name] = column, row
    names = [list(middles)[i] for i in rng.permutation(len(middles))]
    told = [", ".join(f"{name} {round(middles[name][0])} {round(middles[name][1])}" for name in names)]
    for axis, order in enumerate(("left to right", "top to bottom")):
        told.append(" ".join([order, *sorted(names, key=lambda name: middles[name][axis])]))
    for one, other in list(itertools.permutations(names, 2))[:RELATIONS]:
        axis = int(rng.integers(2))
        offset = middles[one][axis] - middles[other][axis]
        if abs(offset) > 0.9:
            told.append(f"{one} {(('left', 'right'), ('above', 'below'))[axis][offset > 0]} {other}")
    return "; ".join(told)
