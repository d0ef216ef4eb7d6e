"""The protocol as the other modules read it."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from olavlm import runs
from olavlm.config import PipelineConfig, Section, load_pipeline
from olavlm.errors import OlaError
from pipelines.settings import Setting, make_setting

Pair = tuple[str, str]


class Part(Section):
    """One question: arms, and what each is compared with, by students of these seeds."""

    question: str
    seeds: Annotated[list[int], Field(min_length=2)]
    pairs: Annotated[list[Pair], Field(min_length=1)]

    @property
    def arms(self) -> list[str]:
        """The arms of its pairs, each once."""
        return list(dict.fromkeys(arm for pair in self.pairs for arm in pair))


class Protocol(Section):
    """A study: arms of a pipeline, and the questions they answer; the first part's first pair is the primary one."""

    pipeline: str
    groups: dict[str, list[str]]  # tasks by the name of a group
    primary: str  # the group that decides
    arms: dict[str, list[str]]  # overrides of the pipeline
    probes: tuple[str, ...] = ()  # arms of the first part whose layers are probed; the first is the reference
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> "Protocol":
        if self.primary not in self.groups:
            raise ValueError(f"primary: group {self.primary!r} is not defined; known: {', '.join(self.groups)}")
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
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return make_setting(base, protocol.pipeline, overrides, slug, own, Path(base.run_dir) / "students")


def open_study(file: Path, overrides: list[str]) -> tuple[Protocol, PipelineConfig]:
    """A protocol and its pipeline. Raises as `load_protocol` and `load_pipeline` do."""
    protocol = load_protocol(file)
    return protocol, load_pipeline(protocol.pipeline, overrides)
