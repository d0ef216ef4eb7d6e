"""Contact sheets: what the demo world shows, knows and asks, on one page for a person to judge."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from pipelines.demo_world.captions import caption
from pipelines.demo_world.processes import render_split
from pipelines.demo_world.questions import LETTERS, TASKS, Question, questions
from pipelines.demo_world.scenes import CLASSES, EASY, Level

#: One per class: stuff and pedestals muted, shapes apart also for colour-blind eyes (after Okabe and Ito).
CLASS_COLOURS = ("#d9d2c5", "#aebac4", "#6b5b4d", "#0072b2", "#d55e00", "#009e73", "#e6c400")
#: Depth in bands of half a metre, near is bright; bands show the distance better than a gradient, in fewer bytes.
DEPTH_BANDS = BoundaryNorm(np.arange(1.0, 14.1, 0.5), 256, extend="max")
DEPTH_COLOURS = "magma_r"
_DPI = 100
_TILE, _GAP, _HEAD, _TEXT = 256, 6, 64, 580  # pixels: a multiple of every level's size, so that pixels stay pixels
_STEP = _TILE + _GAP
_LINE = 88  # characters in a line of text


def contact_sheet(out: Path, level: Level = EASY, scenes: int = 5, seed: int = 0) -> None:
    """Write a PNG: a row per scene with its image, depth, classes, caption and a question of each task.

    Args:
        out: the file.
        level: what kind of scenes.
        scenes: how many, of the split ``pretrain``.
        seed: another seed, other scenes.
    """
    figure, rows = sheet(scenes, ("image", "depth", "classes"), text=True)
    for (*tiles, words), (scene, rendering) in zip(rows, render_split("pretrain", scenes, seed, 1, level), strict=True):
        show_image(tiles[0], rendering.image)
        show_depth(tiles[1], rendering.depth)
        show_classes(tiles[2], rendering.semantic())
        rng = np.random.Generator(np.random.PCG64([scene.seed, 2]))  # as the corpora
        show_text(words, caption(scene, rng), _one_of_each(questions(scene, rendering, rng), rng))
    save(figure, out)


def sheet(rows: int, columns: Sequence[str], text: bool = False) -> tuple[Figure, list[list[Axes]]]:
    """An empty sheet with legends and the columns' names on top.

    Returns:
        The figure, and the axes of each row: one per column, and a wide one if there is to be `text`.
    """
    width, height = len(columns) * _STEP + _TEXT * text, _HEAD + rows * _STEP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def place(left: float, top: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    _legends(place(_GAP + 8, 10, _STEP - 16, 10), place(_STEP, 0, width - _STEP, 40))
    grid = [[place(c * _STEP, _HEAD + r * _STEP, _TILE, _TILE) for c in range(len(columns))] for r in range(rows)]
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=9, pad=4)
    if text:
        for r, row in enumerate(grid):
            row.append(place(len(columns) * _STEP + _GAP, _HEAD + r * _STEP, _TEXT - _GAP, _TILE))
    for row in grid:
        for axes in row:
            axes.set_axis_off()
    return figure, grid


def show_image(axes: Axes, image: NDArray[np.uint8]) -> None:
    """An RGB image (h, w, 3)."""
    axes.imshow(image, interpolation="nearest")


def show_depth(axes: Axes, depth: NDArray[np.floating[Any]]) -> None:
    """Depth in metres (h, w), in the same colours on every sheet."""
    axes.imshow(depth, cmap=DEPTH_COLOURS, norm=DEPTH_BANDS, interpolation="nearest")


def show_classes(axes: Axes, classes: NDArray[np.integer[Any]]) -> None:
    """Indices into `CLASSES` (h, w)."""
    norm = BoundaryNorm(np.arange(len(CLASSES) + 1) - 0.5, len(CLASSES))
    axes.imshow(classes, cmap=ListedColormap(CLASS_COLOURS), norm=norm, interpolation="nearest")


def show_text(axes: Axes, said: str, asked: Sequence[Question]) -> None:
    """What is said about an image, and questions about it with the right answer marked."""
    lines = [*textwrap.wrap(said, _LINE), ""]
    for question in asked:
        lines += textwrap.wrap(f"{question.task}: {question.text}", _LINE)
        lettered = zip(LETTERS, question.choices, strict=False)
        choices = [f"({a}) {choice}" + " ✓" * (i == question.answer) for i, (a, choice) in enumerate(lettered)]
        lines.append("      " + "    ".join(choices))
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=8, linespacing=1.2, transform=axes.transAxes)


def save(figure: Figure, out: Path) -> None:
    """Write the figure as a PNG of five bits per channel, half the size for no visible difference."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    image = Image.fromarray((pixels >> 3) * np.uint8(8) + (pixels >> 5))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, "PNG", optimize=True)


def _legends(bar: Axes, key: Axes) -> None:
    depth = ScalarMappable(DEPTH_BANDS, DEPTH_COLOURS)
    ticks = range(2, 15, 2)
    scale = bar.figure.colorbar(depth, cax=bar, orientation="horizontal", ticks=ticks, format="{x:.0f} m")
    scale.ax.tick_params(labelsize=7)
    patches = [Patch(color=colour, label=name) for name, colour in zip(CLASSES, CLASS_COLOURS, strict=True)]
    key.legend(handles=patches, ncol=len(patches), loc="center left", frameon=False, fontsize=9, handlelength=1)
    key.set_axis_off()


def _one_of_each(asked: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """A question of each task that the scene admits."""
    shuffled = {asked[i].task: asked[i] for i in rng.permutation(len(asked))}
    return [shuffled[task] for task in TASKS if task in shuffled]
