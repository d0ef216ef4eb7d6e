"""Figures for the report: matplotlib as inline SVG, pictures as data URIs. Legible on light and on dark paper."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

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
_TINY, _LARGEST = 128, 480  # sides in pixels


def picture(image: Image.Image | np.ndarray) -> str:
    """An RGB image as ``data:`` URI: scaled down if it is large, as PNG if it is tiny or then smaller, else as JPEG."""
    found = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    found.thumbnail((_LARGEST, _LARGEST))
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


def probe_curves(probe: Mapping[str, Any], taught: Mapping[str, Sequence[int]]) -> str:
    """A panel per task: cosine to the target on held-out images by layer, a line per student, and the floor.

    Args:
        probe: ``{"students": {name: {task: {layer: cell}}}, "floor": {task: cell}}``, a cell's ``mean`` being a cosine.
        taught: the layers each task's embedding loss was applied at; they are marked.
    """
    students, floors = probe["students"], probe["floor"]
    said = []
    with _style("probes"):
        figure = Figure(figsize=(3.3 * len(floors), 2.9), layout="constrained")
        panels = figure.subplots(1, len(floors), squeeze=False)[0]
        for axes, (task, floor) in zip(panels, floors.items(), strict=True):
            for layer in taught.get(task, ()):
                axes.axvspan(layer - 0.18, layer + 0.18, color="#888888", alpha=0.15, lw=0)
            colors = iter(COLORS)
            for name, by_task in students.items():
                if task not in by_task:
                    continue
                points = sorted((int(layer), cell["mean"]) for layer, cell in by_task[task].items())
                color, style = ("#8a8a8a", "--") if name == "initial" else (next(colors), "-")
                axes.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4, label=name)
                said.append(f"{task}, {name}: {' '.join(f'{cosine:.2f}' for _, cosine in points)}")
            axes.axhline(floor["mean"], color=_INK, lw=1, ls=":", label="mean target")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set(title=task, xlabel="layer")
        panels[0].set(ylabel="cosine, held-out images")
        handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        return _svg(figure, "Probe cosines by layer. " + "; ".join(said))


def score_dots(
    title: str, scores: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]], rows: Sequence[str]
) -> str:
    """A benchmark's accuracy by row with two standard errors to each side, beside what needs no picture."""
    shown = [row for row in rows if scores.get(row)][::-1]
    with _style(f"scores of {title}"):
        figure = Figure(figsize=(7.2, 0.36 * len(shown) + 1.2), layout="constrained")
        axes = figure.subplots()
        for marker, color, (name, values) in zip("|xds^v*", COLORS[1:], baselines.items(), strict=False):
            points = [(100 * values[row], y) for y, row in enumerate(shown) if row in values]
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=8, markeredgewidth=2, label=name)
        axes.errorbar(
            [100 * scores[row]["accuracy"] for row in shown],
            range(len(shown)),
            xerr=[200 * scores[row]["stderr"] for row in shown],
            fmt="o",
            color=COLORS[0],
            capsize=3,
            label="student ± 2 s.e.",
        )
        axes.set_yticks(range(len(shown)), shown)
        left, right = axes.get_xlim()
        axes.set(xlabel="accuracy in %", xlim=(max(left, 0), min(right, 100)), ylim=(-0.6, len(shown) - 0.4))
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=4)
        said = "; ".join(f"{row} {scores[row]['accuracy']:.1%}" for row in shown[::-1])
        return _svg(figure, f"{title} accuracies: {said}")


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
    return f'<svg {box[0]} style="max-width:{width:.0f}pt" role="img" aria-label="{label}">{body}'
