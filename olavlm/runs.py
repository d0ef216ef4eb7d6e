"""A run's folder (contract 3): what a stage was configured with, and whether it finished."""

import errno
import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olavlm.config import PipelineConfig
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.provenance import peak_memory_gib, provenance

#: Stage keys that change how fast a stage runs, not what it computes (but for the last bits of a sum).
_SPEED = {
    "micro_batch", "gradient_checkpointing", "fully_shard", "loader_threads", "log_every", "checkpoint_every", "keep"
}  # fmt: skip

_started: dict[Path, float] = {}


def stage_dir(config: PipelineConfig, stage: str) -> Path:
    """``runs/<pipeline>/<stage>``."""
    return Path(config.run_dir) / stage


def stages_of(config: PipelineConfig) -> list[str]:
    """The stages this pipeline has, in the order they run."""
    trained = [stage for stage in ("pretrain", "vpt", "finetune") if stage in config.stages]
    featurized = any(data.targets for data in config.data.values())
    optional = {
        "featurize": featurized,
        "probe": config.probe,
        "probe_tasks": config.probe_tasks,
        "evaluate": config.eval,
    }
    return [s for s in ("corpus", "featurize", *trained, "probe", "probe_tasks", "evaluate") if optional.get(s, True)]


def depends_on(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """Everything a stage's result depends on, as plain data; speed knobs are left out."""
    full = config.model_dump(mode="json")
    seed, data, stages = full["seed"], full["data"], full["stages"]
    if stage == "corpus":
        return {"seed": seed, "data": data, "benchmark": full["eval"] and {"scenes": full["eval"]["scenes"]}}
    if stage == "featurize":
        stored = {name: entry for name, entry in data.items() if entry["targets"]}
        return {"data": stored, "teachers": full["teachers"], "block": full["featurize"]["block"]}
    chain = {}
    while stage in stages:  # a stage depends on those it starts from
        chain[stage] = {k: v for k, v in stages[stage].items() if k not in _SPEED}
        stage = stages[stage]["init"]
    if chain:
        used = {name for entry in chain.values() for name in entry["data"]}
        return {
            "seed": seed,
            "data": {name: data[name] for name in sorted(used)},
            "teachers": full["teachers"],
            "student": full["student"],
            "stages": chain,
        }
    if stage == "probe_tasks":
        own = {k: v for k, v in full["probe_tasks"].items() if k != "batch"}
        return depends_on(config, "probe") | {"probe_tasks": own}
    if stage == "probe":
        own, students = full["probe"], full["probe"]["students"]
    else:
        own, students = {k: v for k, v in full["eval"].items() if k != "batch"}, [full["eval"]["student"]]
    trained = {name: depends_on(config, name)["stages"] for name in students if name in stages}
    read = {own["data"]: data[own["data"]]} if own["data"] else {}
    common = {"seed": seed, "data": read, "teachers": full["teachers"], "student": full["student"]}
    return common | {"trained": trained, stage: own}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep every other process out of a stage's folder until the block ends, or this process does, in whatever way.

    The lock is the system's own, on the file ``.lock``. A file system that has none keeps nobody out.

    Args:
        folder: ``runs/<pipeline>/<stage>``; created if absent.

    Raises:
        OlaError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OlaError(
                f"{folder}: another process is at work in this folder; wait for its end, or set another run_dir=…"
            ) from None
        except OSError as error:
            if error.errno not in {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}:
                raise
        yield


def begin(folder: Path, config: Mapping[str, Any]) -> bool:
    """Open a stage's folder; True if the stage has already finished with this very configuration.

    Args:
        folder: ``runs/<pipeline>/<stage>``; created if absent.
        config: everything the stage's result depends on, as plain data.

    Raises:
        OlaError: the folder belongs to another configuration; the changed keys are named with both values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    # Otherwise the stage was refused, or killed, before it produced anything.
    if any(path.name != file.name and not path.name.startswith(".") for path in folder.iterdir()):
        _check_made_with(config, file)
    else:
        replace(file, OmegaConf.to_yaml(OmegaConf.create(_plain(config))).encode())
    _started[folder] = time.monotonic()
    return (folder / "done.json").exists()


def finish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Mark a stage as finished: its summary, seconds since `begin`, peak memory of this process in GiB, provenance."""
    seconds = time.monotonic() - _started[folder]
    done = {"seconds": round(seconds, 1), "peak_memory_gib": round(peak_memory_gib(), 2), **summary}
    replace(folder / "done.json", json.dumps({**done, "provenance": provenance()}, indent=2).encode())


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished stage, or None."""
    file = folder / "done.json"
    return json.loads(file.read_text()) if file.exists() else None


def require(config: PipelineConfig, stage: str) -> Path:
    """The folder of a stage whose result another one starts from.

    Raises:
        OlaError: it has not finished, or belongs to another configuration, as in `begin`.
    """
    folder = stage_dir(config, stage)
    if finished(folder) is None:
        raise OlaError(f"{folder}: {stage} has not finished; run it first (make {stage})")
    _check_made_with(depends_on(config, stage), folder / "config.yaml")
    return folder


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``{"a.b": value}``; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    branches: dict[str, Any] = {}
    for name, branch in tree.items():
        branches |= flat(branch, f"{prefix}.{name}" if prefix else str(name))
    return branches


def _check_made_with(config: Mapping[str, Any], file: Path) -> None:
    """Raise if the configuration in `file`, an absent one is empty, is another one."""
    wanted = flat(_plain(config))
    found = flat(OmegaConf.to_container(OmegaConf.load(file))) if file.exists() else {}
    changed = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    if changed:
        what = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise OlaError(
            f"{file} was made with another configuration ({what}{more}); "
            "remove the folder to redo it, or set another run_dir=… to keep both"
        )


def _plain(config: Mapping[str, Any]) -> Any:
    """What JSON makes of it, as it is compared and kept."""
    return json.loads(json.dumps(config))
