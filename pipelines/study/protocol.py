"""The protocol as the other modules read it."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, ValidationError, model_validator
from yaml import YAMLError

from olavlm import runs
from olavlm.config import PipelineConfig, Section, load_pipeline
from olavlm.data.atomic import replace
from olavlm.errors import OlaError
from olavlm.eval.cv_bench import TASKS
from pipelines.settings import Setting, make_setting

Pair = tuple[str, str]


def _each_once(seeds: list[int]) -> list[int]:
    if len({*seeds}) < len(seeds):
        raise ValueError(f"a seed stands twice in {seeds}; expected every student once")
    return seeds


class Part(Section):
    """One question: arms, and what each is compared with, by students of these seeds."""

    question: str
    seeds: Annotated[list[int], Field(min_length=2), AfterValidator(_each_once)]
    pairs: Annotated[list[Pair], Field(min_length=1)]

    @property
    def arms(self) -> list[str]:
        """The arms of its pairs, each once."""
        return list(dict.fromkeys(arm for pair in self.pairs for arm in pair))


class Primary(Section):
    """What decides: the first arm of all pairs must beat the second, in the answers to a group of tasks."""

    group: str
    pairs: Annotated[list[Pair], Field(min_length=1)]


class Protocol(Section):
    """A study: arms of a pipeline, and the questions they answer; the first part's students answer the primary one."""

    pipeline: str
    groups: dict[str, list[str]]  # tasks by the name of a group
    primary: Primary
    arms: dict[str, list[str]]  # overrides of the pipeline
    probes: tuple[str, ...] = ()  # arms of the first part whose layers are probed; the first is the reference
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> "Protocol":
        for name, tasks in self.groups.items():
            if not tasks or not {*tasks} <= {*TASKS}:
                raise ValueError(f"groups: {name} is {tasks}; expected tasks of {', '.join(TASKS)}")
        if self.primary.group not in self.groups:
            raise ValueError(f"primary: group {self.primary.group!r} is not defined; known: {', '.join(self.groups)}")
        for pair in self.primary.pairs:
            if pair not in self.parts[0].pairs:
                raise ValueError(f"primary: {' − '.join(pair)} is no pair of the first part")
        if len({_slug(arm) for arm in self.arms}) < len(self.arms):
            raise ValueError("arms: two names differ by punctuation alone; they would share a folder")
        for part in self.parts:
            for arm in part.arms:
                if arm not in self.arms:
                    raise ValueError(f"parts: arm {arm!r} is not defined; known: {', '.join(self.arms)}")
        for arm in self.probes:
            if arm not in self.parts[0].arms:
                raise ValueError(f"probes: arm {arm!r} is none of the first part's: {', '.join(self.parts[0].arms)}")
        return self

    @property
    def students(self) -> list[tuple[str, int]]:
        """Arm and seed of every student, those first that answer the first question, seed by seed."""
        found = [(arm, seed) for part in self.parts for seed in part.seeds for arm in part.arms]
        return list(dict.fromkeys(found))


def pin(protocol: Protocol, folder: Path) -> None:
    """Keep the protocol beside the students it trains; a study is not read by another one than it was begun with.

    Raises:
        OlaError: the study there was begun with another protocol.
    """
    file, text = folder / "protocol.json", protocol.model_dump_json(indent=1)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace(file, text.encode())
    elif json.loads(file.read_text()) != json.loads(text):
        raise OlaError(
            f"{file}: this study was begun with another protocol; put that back, or begin anew in another run_dir"
        )


def load_protocol(file: Path) -> Protocol:
    """Read a protocol.

    Raises:
        OlaError: not there, or not a protocol; names the file and the key.
    """
    try:
        return Protocol.model_validate(OmegaConf.to_container(OmegaConf.load(file)))
    except OSError as error:
        raise OlaError(f"{file}: {error.strerror}; expected a study's protocol") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise OlaError(f"{file}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        (first, *_) = error.errors()
        key = ".".join(map(str, first["loc"]))
        raise OlaError(f"{file}: {key or 'protocol'}: {first['msg'].removeprefix('Value error, ')}") from None


def settings(protocol: Protocol, base: PipelineConfig, overrides: list[str]) -> dict[tuple[str, int], Setting]:
    """Every student's setting, by arm and seed, in the order in which they are trained.

    Args:
        protocol: the study.
        base: its pipeline with `overrides`.
        overrides: ``key.path=value`` strings that hold for all students.

    Raises:
        OlaError: an arm's override does not validate.
    """
    return {
        (arm, seed): _make(
            protocol,
            base,
            overrides,
            f"{arm} {seed}",
            [*protocol.arms[arm], "probe=null", "probe_tasks=null", f"seed={seed}"],
        )
        for arm, seed in protocol.students
    }


def probes(
    protocol: Protocol, base: PipelineConfig, overrides: list[str], students: Mapping[tuple[str, int], Setting]
) -> dict[int, tuple[dict[str, str], Setting]]:
    """By seed of the first part: the model of each probed arm, as ``probe.students`` has it, and the probes' setting.

    All hold out the same images, and begin with the same predictors: the seed is the pipeline's own.
    """
    if not protocol.probes:
        return {}
    found = {}
    for seed in protocol.parts[0].seeds:
        stages = {arm: students[arm, seed].config for arm in protocol.probes}
        models = {arm: str(runs.stage_dir(config, [*config.stages][-1]) / "model") for arm, config in stages.items()}
        own = [f"probe.students={json.dumps([*models.values()])}", "eval=null"]
        made = _make(protocol, base, overrides, f"probes {seed}", own)
        found[seed] = models, dataclasses.replace(made, stages=("probe",))
    return found


def _make(protocol: Protocol, base: PipelineConfig, overrides: list[str], name: str, own: list[str]) -> Setting:
    return make_setting(base, protocol.pipeline, overrides, _slug(name), own, Path(base.run_dir) / "students")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def open_study(file: Path, overrides: list[str]) -> tuple[Protocol, PipelineConfig]:
    """A protocol and its pipeline. Raises as `load_protocol` and `load_pipeline` do."""
    protocol = load_protocol(file)
    return protocol, load_pipeline(protocol.pipeline, overrides)
