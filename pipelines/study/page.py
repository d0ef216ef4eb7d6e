"""What a study found, as a page and a figure."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from olavlm.eval.bootstrap import Estimate
from pipelines.figures import COLORS
from pipelines.study.protocol import Protocol

_GAIN = "{:+.1f} [{:+.1f}, {:+.1f}]"


def write(protocol: Protocol, found: Mapping[str, Any]) -> str:
    """The page, in Markdown; the figure beside it is ``study.png``."""
    groups = list(protocol.groups)
    versions = found["versions"]
    lines = [
        "# The study: what distilling teachers' features does for the answers",
        "",
        f"Written by `make study` on {found['machine']}, torch {versions['torch']}; the protocol, fixed before: "
        "[protocol.yaml](protocol.yaml).",
        "",
        *_verdict(protocol, found),
        "",
        "![Gains in accuracy with their intervals](study.png)",
        "",
        "Accuracies in %, gains in points, each with its 95 % interval (two-way bootstrap over seeds and images); "
        "**bold**: the interval excludes 0, which one in twenty does by chance. Questions: "
        + ", ".join(f"{name} {count:,}" for name, count in found["questions"].items())
        + ".",
    ]
    for part in found["parts"]:
        missing = len(part["planned"]) - len(part["seeds"])
        left = f", {missing} of them still to be trained" if missing else ""
        lines += ["", f"## {part['question']}", "", f"{len(part['planned'])} seeds{left}.", ""]
        if not part["gains"]:
            continue
        gains = [
            [f"{gain['arm']} − {gain['to']}", *(_said(_percent(gain[group]), _GAIN, bold=True) for group in groups)]
            for gain in part["gains"]
        ]
        lines += [*_table(["gain", *groups], gains), ""]
        rows = [
            [arm, *(_said(_percent(of[group]), "{:.1f} [{:.1f}, {:.1f}]") for group in groups)]
            for arm, of in part["accuracy"].items()
        ]
        if part is found["parts"][0]:
            rows += [
                [f"*{name}*", *(f"{100 * of[group]:.1f}" for group in groups)]
                for name, of in found["baselines"].items()
            ]
        lines += _table(["accuracy", *groups], rows)
    if found["probes"]:
        lines += _where(protocol, found["probes"])
    seconds = [sum(of) for of in found["seconds"].values()]
    lines += ["", f"All students together took {sum(seconds) / 3600:.1f} hours, several at a time."]
    return "\n".join(lines) + "\n"


def draw(protocol: Protocol, found: Mapping[str, Any]) -> bytes:
    """Every pair's gain and interval, a panel per group of several tasks; PNG."""
    gains = [gain for part in found["parts"] for gain in part["gains"]]
    figure = Figure(figsize=(9, 1.2 + 0.32 * max(len(gains), 1)), layout="constrained", dpi=120)
    names = [f"{gain['arm']}  vs  {gain['to']}" for gain in gains]
    groups = [name for name, tasks in protocol.groups.items() if len(tasks) > 1]
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group, color in zip(panels, groups, COLORS, strict=False):
        for row, gain in enumerate(gains):
            points = _percent(gain[group])
            axes.plot([points.low, points.high], [row, row], color=color, linewidth=2)
            axes.plot(points.value, row, "o", color=color)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set(title=f"{group} questions", xlabel="gain, percentage points", yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _verdict(protocol: Protocol, found: Mapping[str, Any]) -> list[str]:
    """The primary question and its answer, by the rule that the protocol states."""
    first = found["parts"][0]
    if not first["gains"]:
        return ["**Not answered yet**: fewer than two seeds are finished."]
    gain = first["gains"][0]
    points = gain[protocol.primary]
    verdict = "it helps" if points.low > 0 else "it harms" if points.high < 0 else "not shown to help or to harm"
    seeds = f"{len(first['seeds'])} of {len(first['planned'])} seeds"
    return [
        f"**Primary question**, {gain['arm']} against {gain['to']} on {protocol.primary} questions, {seeds}: "
        f"{_said(_percent(points), _GAIN)} points: **{verdict}**."
    ]


def _where(protocol: Protocol, probed: Mapping[str, Any]) -> list[str]:
    """What each layer knows: a table per task, a row per arm, a column per layer."""
    first, *others = protocol.probes
    gain = "{:+.3f} [{:+.3f}, {:+.3f}]"
    lines = [
        "",
        "## Where?",
        "",
        "Cosine of what a plain probe reads from a layer of the fine-tuned student to the teacher's feature, on images "
        f"held out: of the arm “{first}”, and what others have more.",
    ]
    for task, layers in probed.items():
        rows = [[first, *(f"{of_arm[first]['cosine'].value:.3f}" for of_arm in layers.values())]]
        for arm in others:
            rows.append([arm, *(_said(of_arm[arm]["gain"], gain, bold=True) for of_arm in layers.values())])
        lines += ["", *_table([task, *(f"layer {layer}" for layer in layers)], rows)]
    return lines


def _said(estimate: Estimate, form: str, *, bold: bool = False) -> str:
    """An estimate and its interval; bold, if that is asked for, where it excludes 0."""
    cell = form.format(estimate.value, estimate.low, estimate.high)
    return f"**{cell}**" if bold and (estimate.low > 0 or estimate.high < 0) else cell


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
