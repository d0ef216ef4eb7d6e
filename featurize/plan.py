"""What a featurization will cost, before anything is computed: works without weights, and without a corpus."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig
from olavlm.data.codec import encoded_bytes
from olavlm.data.corpus import Corpus
from olavlm.data.objects import as_path
from olavlm.errors import OlaError


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher's share. `device_hours` is None where the pipeline does not say what a forward pass costs."""

    task: str
    bytes_per_image: int
    total_bytes: int
    device_hours: float | None


@dataclass(frozen=True)
class Plan:
    """Images by `data` entry, and what each teacher will take.

    Attributes:
        passes: how often one experiment looks at a featurized image: the epochs of the stages with embedding losses.
        runs: experiments the store will serve.
    """

    images: dict[str, int]
    teachers: list[TeacherPlan]
    passes: float
    runs: int

    @property
    def hours_once(self) -> float | None:
        """Device hours of all teachers over all images, once."""
        hours = [teacher.device_hours for teacher in self.teachers]
        return None if None in hours else sum(h for h in hours if h is not None)

    @property
    def hours_online(self) -> float | None:
        """The same with the teachers inside the training step of every run."""
        return None if self.hours_once is None else self.hours_once * self.passes * self.runs


def plan(config: PipelineConfig) -> Plan:
    """Count images, bytes and hours.

    Raises:
        OlaError: a data entry has neither a corpus yet nor `expected_images`, or none has targets.
    """
    images = {name: _images(config, name) for name, data in config.data.items() if data.targets is not None}
    if not images:
        raise OlaError(f"pipeline {config.name}: no entry of data has targets, so there is nothing to plan")
    total = sum(images.values())
    tflops = config.featurize.teacher_tflops
    teachers = []
    for task, teacher in config.teachers.items():
        hours = None
        if teacher.gflop_per_image is not None and tflops is not None:
            hours = total * teacher.gflop_per_image / (tflops * 1000) / 3600
        size = encoded_bytes(teacher.tokens, teacher.width, teacher.codec)
        teachers.append(TeacherPlan(task, size, size * total, hours))
    passes = sum(stage.epochs for stage in config.stages.values() if stage.losses)
    return Plan(images, teachers, passes, config.featurize.training_runs)


def show(config: PipelineConfig, console: Console) -> None:
    """Print the plan."""
    made = plan(config)
    for name, images in made.images.items():
        console.print(f"{name}: {images:,} images", highlight=False)
    weights = Column("teacher", overflow="fold")
    table = Table("task", weights, "target", "codec", "per image", "in all", "device hours")
    for teacher in made.teachers:
        stated = config.teachers[teacher.task]
        table.add_row(
            teacher.task,
            f"{stated.teacher}\n{stated.weights}",
            f"{stated.tokens} × {stated.width}",
            stated.codec,
            human_bytes(teacher.bytes_per_image),
            human_bytes(teacher.total_bytes),
            "unknown" if teacher.device_hours is None else f"{teacher.device_hours:,.2f}",
        )
    per_image, total = (sum(getattr(t, f) for t in made.teachers) for f in ("bytes_per_image", "total_bytes"))
    table.add_row("all", "", "", "", human_bytes(per_image), human_bytes(total), _hours(made.hours_once))
    console.print(table)
    if made.hours_once is None or made.hours_online is None:
        console.print("for hours, state featurize.teacher_tflops and teachers.<task>.gflop_per_image")
        return
    looks = made.passes * made.runs
    console.print(
        f"stored: {_hours(made.hours_once)} device hours of teachers, once; online: {_hours(made.hours_online)} "
        f"({made.runs} runs × {made.passes:g} epochs with embedding losses)",
        highlight=False,
        soft_wrap=True,
    )
    if looks <= 1:
        console.print("break-even: not reached, every image is looked at once; a second run or epoch reaches it")
    else:
        gain = made.hours_online - made.hours_once
        console.print(f"break-even: with the second epoch or run; saved by the end: {_hours(gain)} device hours")


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.2f}"


def _images(config: PipelineConfig, name: str) -> int:
    data = config.data[name]
    if (as_path(data.corpus) / "corpus.json").exists():
        return sum(tar.images for tar in Corpus.open(data.corpus).tars)
    if data.expected_images is None:
        raise OlaError(
            f"pipeline {config.name}: no corpus in {data.corpus} yet; state data.{name}.expected_images to plan for it"
        )
    return data.expected_images
