"""Figures for the report: matplotlib as inline SVG, pictures as data URIs. Legible on light and on dark paper."""

import base64
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from olavlm.eval.bootstrap import Estimate

#: Mid-tones that stand out from white and from black, also for colour-blind eyes (after Okabe and Ito).
COLORS = ("#2b7fc3", "#dd7a1f", "#1f9e78", "#b765ad", "#c9a200", "#d9534f", "#5aaed6", "#8a8a8a")
_INK = "#0a0b0c"  # becomes the page's own text colour
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_BASELINES = ("#8a8a8a", "#c08a3e", "#6f8f5f", "#8f7fb0", "#b0706f", "#5f94a0", "#a08f4a", "#8a8a8a", "#a0708f")
_COLUMNS = 3  # panels beside each other
_TINY, _LARGEST = 128, 480  # sides in pixels


def picture(image: Image.Image | np.ndarray, largest: int = _LARGEST) -> str:
    """An RGB image as ``data:`` URI: no side above `largest`, as PNG if it is tiny or then smaller, else as JPEG."""
    found = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    found.thumbnail((largest, largest))
    png, jpeg = io.BytesIO(), io.BytesIO()
    found.save(png, "PNG", optimize=True)
    found.save(jpeg, "JPEG", quality=88)
    if max(found.size) <= _TINY or len(png.getvalue()) < len(jpeg.getvalue()):
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def text_losses(lines: Sequence[Mapping[str, float]], title: str) -> str:
    """The total and the next-token loss of a stage over its steps."""
    with _style(title):
        figure = Figure(figsize=(7.2, 2.6), layout="constrained")
        axes = figure.subplots()
        curves = {"total": "loss", "text": "text"}
        if all(line.get("loss") == line.get("text") for line in lines):
            curves = {"text": "text"}
        for (label, key), color in zip(curves.items(), COLORS, strict=False):
            _curve(axes, lines, key, label, color)
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.legend()
        return _svg(figure, f"{title}: {_ends(lines, curves)}")


def losses_overlaid(runs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> str:
    """A stage's losses of several runs: a panel for the text, one per task and term for the mean over its layers."""
    joined = {name: [_joined(line) for line in lines] for name, lines in runs.items()}
    keys = list(dict.fromkeys(key for lines in joined.values() for line in lines for key in line if key != "step"))
    said = []
    with _style(f"{title}, overlaid"):
        rows, columns = -(-len(keys) // _COLUMNS), min(len(keys), _COLUMNS)
        size = (3.3 * columns, 2.3 * rows + 0.4) if columns > 1 else (7.2, 2.8)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(keys) :]:
            axes.set_axis_off()
        for axes, key in zip(grid.flat, keys, strict=False):
            for color, (name, lines) in zip(itertools.cycle(COLORS), joined.items(), strict=False):
                _curve(axes, lines, key, name, color)
                said.append(_ends(lines, {f"{key}, {name}": key}))
            axes.set(title=key, xlabel="step")
        _legend(figure, grid.flat[: len(keys)])
        return _svg(figure, f"{title}: {'; '.join(filter(None, said))}")


def embedding_losses(lines: Sequence[Mapping[str, float]], title: str) -> str | None:
    """A panel per task and term (keys ``task/layer/term``), a line per layer; None if the stage has no such losses."""
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key.count("/") == 2]
    if not keys:
        return None
    parts = [key.split("/") for key in keys]
    tasks, terms = list(dict.fromkeys(p[0] for p in parts)), list(dict.fromkeys(p[2] for p in parts))
    with _style(title):
        figure = Figure(figsize=(3.1 * len(tasks), 2.3 * len(terms)), layout="constrained")
        grid = figure.subplots(len(terms), len(tasks), squeeze=False, sharex=True)
        for row, term in enumerate(terms):
            for column, task in enumerate(tasks):
                axes = grid[row][column]
                layers = [layer for t, layer, e in parts if (t, e) == (task, term)]
                for layer, color in zip(layers, COLORS, strict=False):
                    _curve(axes, lines, f"{task}/{layer}/{term}", f"layer {layer}", color)
                axes.set(title=f"{task}: {term.replace('_', ' ')}")
                axes.set(xlabel="step" if row == len(terms) - 1 else "")
                if layers and row == 0:
                    axes.legend()
        return _svg(figure, f"{title}: {_ends(lines, {key: key for key in keys})}")


@dataclass(frozen=True)
class Panel:
    """Values by layer: a curve per student between the ends of its intervals, and levels that no layer changes."""

    title: str
    curves: dict[str, Mapping[str, Mapping[str, float]]]  # student → layer → value, and low and high if known
    levels: dict[str, float]
    taught: Sequence[int] = ()  # layers that carried an embedding loss; marked


def probe_curves(probe: Mapping[str, Any], taught: Mapping[str, Sequence[int]]) -> str:
    """A panel per task: cosine to the target on held-out images by layer, a curve per student, and the floor.

    Args:
        probe: as ``probe.json`` has it.
        taught: the layers each task's embedding loss was applied at; they are marked.
    """
    panels = [
        Panel(
            task,
            {name: tasks[task] for name, tasks in probe["students"].items() if task in tasks},
            {"mean target": floor["value"]},
            taught.get(task, ()),
        )
        for task, floor in probe["floor"].items()
    ]
    return layer_curves("Probe cosines", panels, "cosine, held-out images")


def probe_task_curves(found: Mapping[str, Any]) -> str:
    """A panel per measure of ``probe_tasks.json``, and what the same decoder makes of the target and of its mean."""
    levels = {"target": "the target itself", "floor": "mean target"}
    panels = [
        Panel(
            f"{said['title']} ({said['better']} is better)",
            {name: measures[measure] for name, measures in found["students"].items() if measure in measures},
            {levels[kind]: cell["value"] for kind, cell in found["reference"].get(measure, {}).items()},
        )
        for measure, said in found["measures"].items()
    ]
    return layer_curves("Probe tasks", panels, "")


def layer_curves(title: str, panels: Sequence[Panel], ylabel: str) -> str:
    """The panels side by side, every student in one colour; the one called `initial` is grey and dashed."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colors = dict(zip((name for name in names if name != "initial"), itertools.cycle(COLORS), strict=False))
    levels = list(dict.fromkeys(label for panel in panels for label in panel.levels))
    said = []
    with _style(title):
        rows = -(-len(panels) // _COLUMNS)
        figure = Figure(figsize=(3.3 * min(len(panels), _COLUMNS), 2.5 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, min(len(panels), _COLUMNS), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid.flat, panels, strict=False):
            for layer in panel.taught:
                axes.axvspan(layer - 0.18, layer + 0.18, color="#888888", alpha=0.15, lw=0)
            for name, by_layer in panel.curves.items():
                points = sorted((int(layer), cell) for layer, cell in by_layer.items())
                layers, values = [layer for layer, _ in points], [cell["value"] for _, cell in points]
                color, style = (colors[name], "-") if name in colors else ("#8a8a8a", "--")
                axes.plot(layers, values, style, color=color, marker="o", markersize=4, label=name)
                ends = [(layer, cell["low"], cell["high"]) for layer, cell in points if "low" in cell]
                if ends:
                    axes.fill_between(*zip(*ends, strict=True), color=color, alpha=0.18, lw=0)
                said.append(f"{panel.title}, {name}: {' '.join(f'{value:.2f}' for value in values)}")
            for label, level in panel.levels.items():
                style = (":", "-.", "--")[levels.index(label)]
                axes.axhline(level, color=_INK, lw=1, ls=style, label=label)
                said.append(f"{panel.title}, {label}: {level:.2f}")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(title=panel.title, xlabel="layer")
        grid[0][0].set(ylabel=ylabel)
        _legend(figure, grid.flat[: len(panels)])
        return _svg(figure, f"{title} by layer. " + "; ".join(said))


def score_dots(
    title: str,
    students: Mapping[str, Mapping[str, Estimate]],
    baselines: Mapping[str, Mapping[str, float]],
    rows: Sequence[str],
) -> str:
    """A benchmark's accuracies by row, a dot and its interval for each student; below them what needs no student.

    Args:
        title: the benchmark's.
        students: accuracies by student and row, as shares.
        baselines: the same without intervals.
        rows: what is shown, in this order, as far as a student has it.
    """
    shown = [row for row in rows if any(row in cells for cells in students.values())]
    lanes = len(students) + 1  # the last for baselines
    with _style(f"scores of {title}"):
        figure = Figure(figsize=(7.2, (0.2 + 0.17 * lanes) * len(shown) + 1.3), layout="constrained")
        axes = figure.subplots()
        for marker, color, (name, values) in zip("|x_ds^v*p", _BASELINES, baselines.items(), strict=False):
            points = [(100 * values[row], y + 0.5 - 0.5 / lanes) for y, row in enumerate(shown) if row in values]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, ms=6, mew=1.6, label=name, clip_on=False)
        for lane, (color, (name, cells)) in enumerate(zip(itertools.cycle(COLORS), students.items(), strict=False)):
            found = [(y - 0.5 + (lane + 0.5) / lanes, cells[row]) for y, row in enumerate(shown) if row in cells]
            means, lows, highs = (
                np.array([100 * getattr(cell, end) for _, cell in found]) for end in ("value", "low", "high")
            )
            ends = [means - lows, highs - means]
            axes.errorbar(means, [y for y, _ in found], xerr=ends, fmt="o", color=color, capsize=3, ms=5, label=name)
        for y in range(1, len(shown)):
            axes.axhline(y - 0.5, color="#888888", alpha=0.25, lw=0.6)
        axes.set_yticks(range(len(shown)), shown)
        left, right = axes.get_xlim()
        axes.set(xlabel="accuracy in %", xlim=(max(left, 0), min(right, 100)), ylim=(len(shown) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        _legend(figure, [axes])
        said = [
            f"{name}: " + ", ".join(f"{row} {cells[row].value:.1%}" for row in shown if row in cells)
            for name, cells in students.items()
        ]
        return _svg(figure, f"{title} accuracies. {'; '.join(said)}")


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    widest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 13 / (widest + 7))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _curve(axes: Axes, lines: Sequence[Mapping[str, float]], key: str, label: str, color: str) -> None:
    """One key over the steps: every value thin, and their running mean where there are many."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if not points:
        return
    steps, values = (np.array(column, float) for column in zip(*points, strict=True))
    window = len(values) // 25
    if window < 2:
        axes.plot(steps, values, color=color, label=label, lw=1.6, marker="o" if len(values) == 1 else None)
        return
    axes.plot(steps, values, color=color, alpha=0.3, lw=0.8)
    mean = np.convolve(values, np.ones(window) / window, "valid")
    start = (window - 1) // 2
    axes.plot(steps[start : start + len(mean)], mean, color=color, label=label, lw=1.8)


def _joined(line: Mapping[str, float]) -> dict[str, float]:
    """A logged step's text loss, and its embedding losses (``task/layer/term``) averaged over the layers."""
    terms: dict[str, list[float]] = defaultdict(list)
    for key, value in line.items():
        if key.count("/") == 2 and value is not None:
            task, _, term = key.split("/")
            terms[f"{task}: {term.replace('_', ' ')}"].append(value)
    return {"step": line["step"], "text": line["text"], **{key: fmean(values) for key, values in terms.items()}}


def _ends(lines: Sequence[Mapping[str, float]], curves: Mapping[str, str]) -> str:
    """First and last value of each curve, for those who do not see it."""
    said = []
    for label, key in curves.items():
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            said.append(f"{label} from {values[0]:.3g} to {values[-1]:.3g}")
    return "; ".join(said)


def _style(salt: str) -> Any:
    """The page's look; ids inside the SVG depend on the salt, so that figures on one page do not share any."""
    return matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt})


def _svg(figure: Figure, alt: str) -> str:
    """A figure as ``<svg>`` element for HTML: no fixed size, no namespaces, no metadata, only ids that are used."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib writes a viewBox"
    width = float(box[0].split()[2])
    body = body.replace("xlink:href", "href").replace(_INK, "currentColor")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    size = (
        f"max-width:{width:.0f}pt;min-width:{0.75 * width:.0f}pt"  # still legible where there is less room: it scrolls
    )
    return f'<svg {box[0]} style="{size}" role="img" aria-label="{label}">{body}'
