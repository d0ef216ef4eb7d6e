"""What a study found, as a page and two figures."""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from olavlm.eval.bootstrap import Estimate
from pipelines.figures import COLORS
from pipelines.study.protocol import Protocol

_GAIN = "{:+.1f} [{:+.1f}, {:+.1f}]"
_DIM = "#888888"
_LINES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 3)), (0, (3, 1, 1, 1)))


def write(protocol: Protocol, found: Mapping[str, Any]) -> str:
    """The page, in Markdown; the figures beside it are ``study.png`` and ``accuracy.png``."""
    groups = list(protocol.groups)
    commit, machine, torch = found["commit"], found["machine"], found["versions"]["torch"]
    commits = sorted({commit for student in found["students"] for commit in student["commits"]})
    overrides = f", with {' '.join(found['overrides'])}" if found["overrides"] else ""
    lines = [
        "# The study: what distilling teachers' features does for the answers",
        "",
        f"Written by `make study` at commit {commit or 'unknown'} on {machine}, torch {torch}; its students were "
        f"trained at commit {', '.join(commits)}{overrides}. The protocol has not changed since the first of them was "
        f"begun: `git show {commits[0]}:pipelines/study/protocol.yaml`, and `protocol.json` beside the students.",
        "",
        *_verdict(protocol, found),
        "",
        "![Gains in accuracy with their intervals](study.png)",
        "",
        "![Accuracy of each arm in each task](accuracy.png)",
        "",
        "Accuracies in %, gains in points, each with an interval of 95 % at least: the outer ends of a two-way "
        "bootstrap over seeds and images and of a t interval over seeds. They are for other seeds, of what is new in a "
        "student and of the order, and for other questions; not for other corpora, teachers or language models. "
        "Questions: " + ", ".join(f"{name} {count:,}" for name, count in found["questions"].items()) + ".",
        "",
        _chance(found),
    ]
    found_in = f"found in 8 of 10, {protocol.primary.group}"
    for part in found["parts"]:
        lines += ["", f"## {part['question']}", ""]
        gains = [
            [
                f"{gain['arm']} − {gain['to']}",
                f"{len(gain['seeds'])} of {len(part['planned'])}",
                *(_said(_percent(gain["groups"][group]), _GAIN, bold=True) for group in groups),
                f"{100 * gain['detectable']:.1f}",
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
            [*_table(["gain", "seeds", *groups, found_in], gains), ""]
            if gains
            else ["Fewer than two seeds are finished.", ""]
        )
        lines += _table(["accuracy", *groups], rows)
        if part is found["parts"][0]:
            lines += [
                "",
                "*blind*, who reads the question alone, has chance by construction of the questions; *2-D boxes* knows "
                "the facts that 2-D questions are about, so there it is a ceiling, not a measurement.",
            ]
    if found["probes"]:
        lines += _where(protocol, found["probes"])
    return "\n".join([*lines, *_words(found["words"]), *_students(found["students"])]) + "\n"


def draw_gains(protocol: Protocol, found: Mapping[str, Any]) -> bytes:
    """Every pair's gain with its interval and each seed's, a panel per group of several tasks; PNG."""
    rows: list[tuple[str, Mapping[str, Any] | None]] = []  # a part's question, then its gains
    for part in found["parts"]:
        gains = [gain for gain in part["gains"] if gain["groups"]]
        rows += [(part["question"], None)] if gains else []
        rows += [(f"{gain['arm']}  −  {gain['to']}  ({len(gain['seeds'])} seeds)", gain) for gain in gains]
    groups = [name for name, tasks in protocol.groups.items() if len(tasks) > 1]
    figure, panels = _panels(groups, len(rows), "questions")
    for axes, group, color in zip(panels, groups, COLORS, strict=False):
        for row, (_, gain) in enumerate(rows):
            if gain:
                _dot(axes, row, gain["groups"][group], color)
                of_seeds = [100 * value for value in gain["by_seed"][group]]
                axes.plot(of_seeds, [row] * len(of_seeds), "|", color=_DIM)
        axes.axvline(0, color=_DIM, linewidth=0.8)
    panels[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (_, gain) in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if gain else "bold")
    figure.supxlabel(
        "gain in accuracy (right of 0: the first is better), points: 95 % interval, and | of each seed",
        fontsize="medium",
    )
    return _png(figure)


def draw_accuracies(protocol: Protocol, found: Mapping[str, Any]) -> bytes:
    """Accuracy of the first part's arms, a panel per task, and what needs no student where that leaves room; PNG."""
    arms = found["parts"][0]["accuracy"]
    groups = [name for name, tasks in protocol.groups.items() if len(tasks) == 1]
    figure, panels = _panels(groups, len(arms), "")
    for axes, group, color in zip(panels, groups, COLORS, strict=False):
        for row, of in enumerate(arms.values()):
            _dot(axes, row, of[group], color)
        for style, (name, of) in zip(_LINES, found["baselines"].items(), strict=False):
            if of[group] < 1:  # true boxes answer every 2-D question
                axes.axvline(100 * of[group], color=_DIM, linewidth=1, linestyle=style, label=name)
    panels[0].set_yticks(range(len(arms)), [*arms])
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    figure.supxlabel("accuracy in % with its 95 % interval; every panel has a scale of its own", fontsize="medium")
    return _png(figure)


def _panels(names: Sequence[str], rows: int, of: str) -> tuple[Figure, Sequence[Axes]]:
    """A panel per name, beside each other, for as many rows from above."""
    figure = Figure(figsize=(2 + 3 * max(len(names), 1), 1.4 + 0.3 * max(rows, 1)), layout="constrained", dpi=120)
    panels = figure.subplots(1, max(len(names), 1), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        axes.set(title=f"{name} {of}".strip(), ylim=(max(rows, 1) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.25)
    return figure, panels


def _dot(axes: Axes, row: int, estimate: Estimate, color: str) -> None:
    points = _percent(estimate)
    axes.plot([points.low, points.high], [row, row], color=color, linewidth=2)
    axes.plot(points.value, row, "o", color=color)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _verdict(protocol: Protocol, found: Mapping[str, Any]) -> list[str]:
    """The primary question and its answer, by the rule that the protocol states."""
    planned, gains = protocol.parts[0].seeds, found["primary"]
    group = protocol.primary.group
    finished = min(len(gain["seeds"]) for gain in gains)
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
            " ".join(f"{100 * value:+.1f}" for value in gain["by_seed"].get(group, [])),
            f"{100 * gain['detectable']:.1f}" if gain["groups"] else "–",
        ]
        for gain in gains
    ]
    header = ["gain, points", "interval", "seed by seed", "found in 8 of 10 studies if it is"]
    return [*lines, *_table(header, rows)]


def _chance(found: Mapping[str, Any]) -> str:
    """How many intervals exclude 0, and how many would if nothing did anything."""
    # A pair that is compared again with fewer seeds counts once.
    pairs = {(gain["arm"], gain["to"]): gain for part in reversed(found["parts"]) for gain in part["gains"]}
    intervals = [estimate for gain in pairs.values() for estimate in gain["groups"].values()]
    sure = sum(map(_excludes_0, intervals))
    return (
        f"**Bold**: the interval excludes 0, as {sure} of the {len(intervals)} gains in answers below do; if no arm "
        f"did anything, up to {len(intervals) / 20:.0f} would be expected to. They overlap, as groups hold tasks and "
        "pairs share students; beside the primary question they are hints, not findings."
    )


def _where(protocol: Protocol, probed: Mapping[str, Any]) -> list[str]:
    """What each layer knows: a table per task, a row per arm and per pair, a column per layer."""
    gain = "{:+.4f} [{:+.4f}, {:+.4f}]"
    lines = [
        "",
        "## Where?",
        "",
        "Cosine of what a plain probe reads from a layer of the fine-tuned student to the teacher's feature, on images "
        "held out, and what arms differ by; in brackets how much of the way it is from the mean of all targets to the "
        "image's own.",
    ]
    for task, of_task in probed.items():
        layers = of_task["layers"].values()
        floor = of_task["floor"]
        cosines = {arm: [of["cosine"][arm].value for of in layers] for arm in protocol.probes}
        rows = [
            [arm, *(f"{value:.4f} ({(value - floor) / (1 - floor):.0%})" for value in values)]
            for arm, values in cosines.items()
        ]
        for number, pair in enumerate(next(iter(layers))["gains"]):
            found = [of["gains"][number]["gain"] for of in layers]
            rows.append([f"{pair['arm']} − {pair['to']}", *(_said(one, gain, bold=True) for one in found)])
        rows.append(["*mean target*", *(f"{floor:.4f}" for _ in layers)])
        header = [f"{task}, {of_task['images']:,} images", *(f"layer {layer}" for layer in of_task["layers"])]
        lines += ["", *_table(header, rows)]
    return lines


def _words(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Whether what students write before the letter tells more than the letter."""
    tasks = list(dict.fromkeys(task for of_arm in found.values() for task in of_arm))
    rows = [[arm, *(f"{of[task]['named']:.1%}, {of[task]['fits']:.1%}" for task in tasks)] for arm, of in found.items()]
    return [
        "",
        "## Words and letters",
        "",
        "Students write an answer in words, then its letter, and the letter counts. How often the words are the right "
        "choice's, and how often the letter is that of the choice named. Where letters fit words no more often than "
        "chance, accuracy cannot show what a student knows. (Looked at afterwards; not in the protocol.)",
        "",
        *_table(["words right, letter fits", *tasks], rows),
    ]


def _students(students: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each arm's students were trained with."""
    stages = list(students[0]["stages"])
    by_arm: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for student in students:
        by_arm[student["arm"]].append(student)
    rows, losses = [], {}
    for arm, of_arm in by_arm.items():
        told = [arm, str(len(of_arm))]
        for stage in stages:
            of_stage = [one["stages"][stage] for one in of_arm]
            mean = {key: fmean(one[key] for one in of_stage) for key in ("steps", "samples")}
            told += [f"{mean['samples']:,.0f} in {mean['steps']:,.0f} steps"]
            told += [f"{median(one['seconds'] for one in of_stage):,.0f} s"]
        rows.append([*told, f"{fmean(one['answered'] for one in of_arm):.1%}"])
        values: dict[str, list[float]] = defaultdict(list)
        for one in of_arm:
            for key, value in one["stages"][stages[0]]["losses"].items():
                task, _, term = key.partition("/")  # task/layer/term, or text
                values[f"{task} {term.rpartition('/')[2].replace('_', ' ')}".strip()].append(value)
        losses[arm] = {term: fmean(of_term) for term, of_term in values.items() if term != "loss"}
    header = ["arm", "students", *(name for stage in stages for name in (f"{stage}: samples", "time")), "answered"]
    terms = list(dict.fromkeys(key for of_arm in losses.values() for key in of_arm))
    lines = [
        "",
        "## What the students were trained with",
        "",
        "Means over an arm's students, medians of times. An unanswered question counts as wrong. Times are of "
        "processes that shared the machine; featurizing, once for all, is in none of them.",
        "",
        *_table(header, rows),
        "",
        f"Losses in the last quarter of {stages[0]}, means over layers and students:",
        "",
        *_table(
            ["arm", *terms],
            [
                [arm, *(f"{of_arm[term]:.3f}" if term in of_arm else "" for term in terms)]
                for arm, of_arm in losses.items()
            ],
        ),
    ]
    return lines


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
