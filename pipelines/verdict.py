"""What a run's scores prove, and what they do not, in words."""

from typing import Any

from olavlm.eval.benchmarks import BENCHMARKS
from pipelines.intervals import wilson
from pipelines.results import spoken

SEE_NOTHING = ("chance", "blind")  # baselines; all others know something of the picture, but no depth


def aggregate(key: str, found: dict[str, Any]) -> str | None:
    """The aggregate people quote; a benchmark cut short has micro only, one that asked nothing has none."""
    return next((row for row in (BENCHMARKS[key].rows[0], "micro") if found["scores"].get(row)), None)


def verdict(result: dict[str, Any], key: str) -> str | None:
    """What a benchmark's scores prove about looking at the picture: the student against those who do not look.

    And about seeing depth: against those who know the objects' boxes.
    """
    found, row = result["benchmarks"][key], aggregate(key, result["benchmarks"][key])
    known = {name: found["baselines"].get(name, {}).get(row) for name in SEE_NOTHING}
    blind = {name: accuracy for name, accuracy in known.items() if accuracy is not None}
    if not row or not blind:
        return None
    cell = found["scores"][row]
    name, best = max(blind.items(), key=lambda baseline: baseline[1])
    said = (
        f"{BENCHMARKS[key].title} {row}: {spoken(wilson(cell))}. "
        f"The best baseline that sees no picture, {name}: {best:.1%}."
    )
    if wilson(cell).low <= best:
        return said + " This run does not show that the student looks at the picture."
    return f"{said}{_sees_depth(found)} One run of one seed: comparing students takes several."


def _sees_depth(found: dict[str, Any]) -> str:
    """A sentence on 3-D questions, if they were asked and cues that are not depth were scored."""
    cell = found["scores"].get("3D")
    cues = {name: rows["3D"] for name, rows in found["baselines"].items() if name not in SEE_NOTHING and "3D" in rows}
    if not cell or not cues:
        return ""
    name, best = max(cues.items(), key=lambda baseline: baseline[1])
    said = f" 3-D questions: {spoken(wilson(cell))}; the best of the cues that are not depth, {name}: {best:.1%}."
    return said if wilson(cell).low > best else said + " This does not show that it sees depth."
