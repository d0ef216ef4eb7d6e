"""What a study found, as a page and a figure."""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from olavlm.eval.bootstrap import Estimate
from pipelines.figures import COLORS
from pipelines.study.protocol import Protocol

_GAIN = "{:+.1f} [{:+.1f}, {:+.1f}]"


def write(protocol: Protocol, found: Mapping[str, Any]) -> str:
    """The page, in Markdown; the figure beside it is ``study.png``."""
    groups = list(protocol.groups)
    commit, machine, torch = found["commit"], found["machine"], found["versions"]["torch"]
    lines = [
        "# The study: what distilling teachers' features does for the answers",
        "",
        f"Written by `make study` at commit {commit or 'unknown'} on {machine}, torch {torch}. Its protocol was fixed "
        "before its first student was trained: `pipelines/study/protocol.yaml`, and as read `protocol.json` beside the "
        "students.",
        "",
        *_verdict(protocol, found),
        "",
        "![Gains in accuracy with their intervals](study.png)",
        "",
        "Accuracies in %, gains in points, each with its 95 % interval: the outer ends of a two-way bootstrap over "
        "seeds and images and of a t interval over seeds. They are for other seeds, of what is new in a student and of "
        "the order, and for other questions; not for other corpora, teachers or language models. Questions: "
        + ", ".join(f"{name} {count:,}" for name, count in found["questions"].items())
        + ".",
        "",
        _chance(found),
    ]
    for part in found["parts"]:
        lines += ["", f"## {part['question']}", ""]
        gains = [
            [
                f"{gain['arm']} − {gain['to']}",
                f"{len(gain['by_seed'])} of {len(part['planned'])}",
                *(_said(_percent(gain["groups"][group]), _GAIN, bold=True) for group in groups),
            ]
            for gain in part["gains"]
            if gain["groups"]
        ]
        rows = [
            [arm, *(_said(_percent(of[group]), "{:.1f} [{:.1f}, {:.1f}]") for group in groups)]
            for arm, of in part["accuracy"].items()
        ]
        if part is found["parts"][0]:
            rows += [
                [f"*{name}*", *(f"{100 * of[group]:.1f}" for group in groups)]
                for name, of in found["baselines"].items()
            ]
        lines += (
            [*_table(["gain", "seeds", *groups], gains), ""] if gains else ["Fewer than two seeds are finished.", ""]
        )
        lines += _table(["accuracy", *groups], rows)
    if found["probes"]:
        lines += _where(protocol, found["probes"])
    return "\n".join([*lines, *_students(found["students"])]) + "\n"


def draw(protocol: Protocol, found: Mapping[str, Any]) -> bytes:
    """Every pair's gain and interval, a panel per group of several tasks; PNG."""
    gains = [gain for part in found["parts"] for gain in part["gains"] if gain["groups"]]
    figure = Figure(figsize=(11, 1.2 + 0.32 * max(len(gains), 1)), layout="constrained", dpi=120)
    names = [f"{gain['arm']}  −  {gain['to']}  ({len(gain['by_seed'])} seeds)" for gain in gains]
    groups = [name for name, tasks in protocol.groups.items() if len(tasks) > 1]
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group, color in zip(panels, groups, COLORS, strict=False):
        for row, gain in enumerate(gains):
            points = _percent(gain["groups"][group])
            axes.plot([points.low, points.high], [row, row], color=color, linewidth=2)
            axes.plot(points.value, row, "o", color=color)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set(title=f"{group} questions", yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
    figure.supxlabel("gain in accuracy with its 95 % interval, percentage points", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _verdict(protocol: Protocol, found: Mapping[str, Any]) -> list[str]:
    """The primary question and its answer, by the rule that the protocol states."""
    planned, gains = protocol.parts[0].seeds, found["primary"]
    group = protocol.primary.group
    finished = min(len(gain["by_seed"]) for gain in gains)
    estimates = [gain["groups"][group] for gain in gains if gain["groups"]]
    if finished < len(planned):
        verdict = f"not answered yet: {finished} of {len(planned)} seeds are finished"
    elif all(estimate.low > 0 for estimate in estimates):
        verdict = "it helps"
    elif estimates[0].high < 0:
        verdict = "it harms"
    else:
        verdict = "not shown to help or to harm"
    lines = [f"**Primary question**, {group} questions: **{verdict}**.", ""]
    rows = [
        [
            f"{gain['arm']} − {gain['to']}",
            _said(_percent(gain["groups"][group]), _GAIN) if gain["groups"] else "–",
            " ".join(f"{100 * value:+.1f}" for value in gain["by_seed"].values()),
        ]
        for gain in gains
    ]
    return [*lines, *_table(["gain, points", "interval", "seed by seed"], rows)]


def _chance(found: Mapping[str, Any]) -> str:
    """How many intervals exclude 0, and how many would if nothing did anything."""
    gains = [gain["groups"] for part in found["parts"] for gain in part["gains"] if gain["groups"]]
    intervals = [estimate for gain in gains for estimate in gain.values()]
    sure = sum(map(_excludes_0, intervals))
    return (
        f"**Bold**: the interval excludes 0, as {sure} of the {len(intervals)} gains below do; if no arm did anything, "
        f"about {len(intervals) / 20:.0f} would. Beside the primary question they are hints, not findings."
    )


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
    for task, of_task in probed.items():
        layers = of_task["layers"]
        rows = [[first, *(f"{of_arm[first]['cosine'].value:.3f}" for of_arm in layers.values())]]
        for arm in others:
            rows.append([arm, *(_said(of_arm[arm]["gain"], gain, bold=True) for of_arm in layers.values())])
        rows.append(["*mean target*", *(f"{of_task['floor']:.3f}" for _ in layers)])
        lines += ["", *_table([task, *(f"layer {layer}" for layer in layers)], rows)]
    return lines


def _students(students: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each arm's students were trained with, on average."""
    stages = list(students[0]["stages"])
    by_arm: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for student in students:
        by_arm[student["arm"]].append(student)
    rows = []
    for arm, of_arm in by_arm.items():
        told = [arm, str(len(of_arm))]
        for stage in stages:
            mean = {key: fmean(one["stages"][stage][key] for one in of_arm) for key in ("steps", "samples", "seconds")}
            told += [f"{mean['samples']:,.0f} in {mean['steps']:,.0f} steps", f"{mean['seconds']:,.0f} s"]
        rows.append([*told, f"{fmean(one['answered'] for one in of_arm):.1%}"])
    header = [
        "arm",
        "students",
        *(name for stage in stages for name in (f"{stage}: samples", "time")),
        "replies answered",
    ]
    return [
        "",
        "## What the students were trained with",
        "",
        "Means over an arm's students. An unanswered question counts as wrong. Times are of processes that shared the "
        "machine; featurizing, once for all, is in none of them.",
        "",
        *_table(header, rows),
    ]


def _said(estimate: Estimate, form: str, *, bold: bool = False) -> str:
    """An estimate and its interval; bold, if that is asked for, where it excludes 0."""
    cell = form.format(estimate.value, estimate.low, estimate.high)
    return f"**{cell}**" if bold and _excludes_0(estimate) else cell


def _excludes_0(estimate: Estimate) -> bool:
    return estimate.low > 0 or estimate.high < 0


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
