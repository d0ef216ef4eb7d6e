"""The protocol as the other modules read it."""

import re
from pathlib import Path
from typing import Annotated

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

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
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> "Protocol":
        if self.primary not in self.groups:
            raise ValueError(f"primary: group {self.primary!r} is not defined; known: {', '.join(self.groups)}")
        for part in self.parts:
            for arm in part.arms:
                if arm not in self.arms:
                    raise ValueError(f"parts: arm {arm!r} is not defined; known: {', '.join(self.arms)}")
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
        (arm, seed): make_setting(
            base,
            protocol.pipeline,
            overrides,
            f"{re.sub(r'[^a-z0-9]+', '-', arm.lower())}-{seed}",
            [*protocol.arms[arm], f"seed={seed}"],
            Path(base.run_dir) / "students",
        )
        for arm, seed in protocol.students
    }


def open_study(file: Path, overrides: list[str]) -> tuple[Protocol, PipelineConfig]:
    """A protocol and its pipeline. Raises as `load_protocol` and `load_pipeline` do."""
    protocol = load_protocol(file)
    return protocol, load_pipeline(protocol.pipeline, overrides)
