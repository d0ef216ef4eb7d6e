"""What is known of a finished training, whether it is still what the recipe makes, and how two of them differ."""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from olavlm.errors import OlaError
from pipelines.demo_world.recipe import JOBS, Numbers, Sizes

RECORD = "training.json"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Record:
    """What is known of a finished training; lies in its folder as ``training.json``."""

    recipe: str  # hash of everything the result depends on: see `recipe_hash`
    sha256: str  # of model.safetensors
    scenes: int
    steps: int
    seed: int
    cpu_seconds: float  # of the whole job: training, saving, measuring
    wall_seconds: float
    torch: str
    transformers: str
    measured: Numbers  # what only training can measure, as its other half is not kept

    @staticmethod
    def read(folder: Path) -> "Record | None":
        """The record in a folder, if there is one.

        Raises:
            OlaError: it cannot be understood.
        """
        file = folder / RECORD
        try:
            return Record(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise OlaError(f"{file}: not a training's record ({error}); remove {folder} to train anew") from None


def is_current(out: Path, name: str, sizes: Sizes) -> bool:
    """Whether a job's folder holds what the recipe, as it stands, makes."""
    job = JOBS[name]
    record = Record.read(out / job.folder)
    return (
        record is not None
        and record.recipe == recipe_hash(name, sizes)
        and record.sha256 == sha256(weights_file(out / job.folder))
    )


def recipe_hash(name: str, sizes: Sizes) -> str:
    """Hash over all that a job's result depends on: code without comments, sizes, steps, seed, software.

    The code is that of the job, of the modules it uses, and of all of ours that those import.
    """
    job = JOBS[name]
    depends = {
        "job": _parse(inspect.getsource(job.run))[0],
        **{module: _parse(path.read_text())[0] for module, path in _imported(*_modules(job.run)).items()},
        "sizes": [sizes.train, sizes.judge, sizes.read, sizes.steps[name], job.seed],
        "software": software(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def weights_file(folder: Path) -> Path:
    """The one ``model.safetensors`` of a job's folder."""
    return next(folder.rglob("model.safetensors"), folder / "model.safetensors")


def sha256(file: Path) -> str:
    """Hash of a file's bytes; empty if it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def compare(out: Path, with_: Path) -> dict[str, str]:
    """Per job, in words: whether the weights in two folders are the same bytes, or how far they are apart."""
    found = {}
    for name, job in JOBS.items():
        ours, theirs = weights_file(out / job.folder), weights_file(with_ / job.folder)
        if not ours.is_file() or not theirs.is_file():
            found[name] = f"missing in {out if not ours.is_file() else with_}"
        elif sha256(ours) == sha256(theirs):
            found[name] = "equal byte for byte"
        else:
            found[name] = _difference(ours, theirs)
    return found


def _difference(ours: Path, theirs: Path) -> str:
    a, b = load_file(ours), load_file(theirs)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return "other tensors or shapes"
    apart, name = max((float((a[k].float() - b[k].float()).abs().max()), k) for k in a)
    return f"largest difference {apart:.3g}, in {name}"


def software() -> dict[str, str]:
    """Versions of the libraries that weights depend on."""
    return {name: version(name) for name in ("torch", "transformers")}


def _modules(function: Callable[..., Any]) -> list[str]:
    """Names of the modules that a function's code names."""
    used = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [module.__name__ for module in used if inspect.ismodule(module)]


def _imported(*names: str) -> dict[str, Path]:
    """Files of the named modules and, at any depth, of those of ours that they import at their top."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name not in found and path.is_file():
            found[name] = path
            waiting += _parse(path.read_text())[1]
    return found


@cache
def _parse(source: str) -> tuple[str, list[str]]:
    """A source without comments, layout and docstrings; and all that it imports at its top."""
    tree = ast.parse(source)
    imported = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:]
    return ast.dump(tree), imported
