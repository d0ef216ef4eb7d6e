"""``--dry-run``: what a stage would do, from whatever is there; works without weights, corpus and targets."""

import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from olavlm import runs
from olavlm.cli import human_bytes
from olavlm.config import PipelineConfig, StageConfig
from olavlm.data.codec import encoded_bytes
from olavlm.data.corpus import Corpus
from olavlm.data.objects import as_path
from olavlm.errors import OlaError
from olavlm.model import OlaVlmConfig, OlaVlmForConditionalGeneration, parameter_groups
from olavlm.model.build import split_gguf
from olavlm.model.configuration import image_tokens
from train import student
from train.order import Order
from train.stage import total_steps


def plan(config: PipelineConfig, name: str) -> None:
    """Print a stage's samples, steps, trainable parameters by part, bytes to read and memory.

    Raises:
        OlaError: the pipeline has no such stage.
    """
    if name == "probe":
        _plan_probe(config)
        return
    stage = student.stage_config(config, name)
    table = Table("", "", title=f"{config.name}: {name}, a dry run", show_header=False)
    samples, source = _samples(config, stage.data)
    table.add_row("samples", f"{samples:,} ({source})" if samples else f"unknown ({source})")
    batches = f"{stage.global_batch:,} = micro-batches of {stage.micro_batch}"
    table.add_row("global batch", batches)
    if samples:
        steps = total_steps(Order((samples,), (samples,), config.seed, stage.global_batch), stage)
        table.add_row("optimizer steps", f"{steps:,} ({stage.epochs:g} epochs)")
        table.add_row("checkpoints", f"every {stage.checkpoint_every:,} steps, the last {stage.keep} kept")
    tasks = [task for task, weight in stage.losses.items() if weight]
    used = {task: config.teachers[task] for task in (*tasks, *config.student.encoders)}
    per_image = {task: encoded_bytes(t.tokens, t.width, t.codec) for task, t in used.items()}
    if used:
        each = ", ".join(f"{task} {human_bytes(count)}" for task, count in per_image.items())
        table.add_row("targets per image", f"{human_bytes(sum(per_image.values()))} ({each})")
        table.add_row("targets per step", human_bytes(stage.global_batch * sum(per_image.values())))
        if samples:
            table.add_row("targets per epoch", human_bytes(samples * sum(per_image.values())))
    skeleton = _skeleton(config, stage)
    if isinstance(skeleton, str):
        table.add_row("parameters", f"by part: unknown ({skeleton})")
        if config.student.parameters:
            trained = "trained" if "language_model" in stage.trainable else "frozen"
            size = config.student.parameters * 1e9 * (16 if trained == "trained" else _bytes(stage))
            table.add_row(
                "  language model", f"{config.student.parameters:g} B as stated, {trained}: {human_bytes(size)}"
            )
    else:
        _add_parameters(table, config, stage, skeleton)
    Console().print(table)


def _plan_probe(config: PipelineConfig) -> None:
    probe = config.probe
    if probe is None:
        raise OlaError("probe: this pipeline has no probe section")
    samples, source = _samples(config, [probe.data])
    table = Table("", "", title=f"{config.name}: probe, a dry run", show_header=False)
    table.add_row("students", ", ".join(probe.students))
    table.add_row("samples", f"{samples:,}, {probe.held_out:.0%} held out" if samples else f"unknown ({source})")
    table.add_row("optimizer steps", f"{probe.steps:,} of {probe.batch} samples for each student")
    table.add_row("predictors", f"{', '.join(probe.tasks)} at {'all layers' if not probe.layers else probe.layers}")
    Console().print(table)


def _add_parameters(
    table: Table, config: PipelineConfig, stage: StageConfig, model: OlaVlmForConditionalGeneration
) -> None:
    """Rows on parameters and the memory they take on every device."""
    sizes = {part: sum(p.numel() for _, p in pairs) for part, pairs in parameter_groups(model).items()}
    if stage.lora:
        student.adapt(model, stage.lora, config.seed)
    trains = {part: sum(p.numel() for _, p in pairs) for part, pairs in student.trainable(model, stage).items()}
    for part, count in sizes.items():
        of_these = f", {trains[part]:,} of adapters trained" if stage.lora and part == "language_model" else " trained"
        table.add_row(f"  {part}", f"{count:,}{of_these if part in trains else ' frozen'}")
    trained = sum(trains.values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    table.add_row("trained parameters", f"{trained:,}")
    table.add_row("each checkpoint", human_bytes(trained * 12))  # fp32 with AdamW's two moments
    tasks = [config.teachers[task] for task, weight in stage.losses.items() if weight]
    candidates = stage.global_batch * sum(4 * t.tokens * t.width for t in tasks)
    memory = {"frozen": frozen * _bytes(stage), "trained, gradients and AdamW": trained * 16, "candidates": candidates}
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.items() if count)
    table.add_row("memory per device", f"{human_bytes(sum(memory.values()))} ({parts}) + activations")


def _samples(config: PipelineConfig, names: list[str]) -> tuple[int, str]:
    """How many samples the data sets hold, and how that is known."""
    total, sources = 0, []
    for name in names:
        data = config.data[name]
        if (as_path(data.corpus) / "corpus.json").is_file():
            total += sum(tar.samples for tar in Corpus.open(data.corpus).tars)
            sources.append("counted")
        elif data.expected_images:
            total += data.expected_images
            sources.append("expected_images")
        else:
            return 0, f"no corpus in {data.corpus} yet, and no expected_images"
    return total, ", ".join(dict.fromkeys(sources))


def _skeleton(config: PipelineConfig, stage: StageConfig) -> OlaVlmForConditionalGeneration | str:
    """The stage's student without memory for its weights, or why it cannot be told yet."""
    exported = Path(stage.init or "")
    if stage.init in config.stages:
        exported = runs.stage_dir(config, stage.init) / "model"
    if stage.init and (exported / "config.json").is_file():
        built = OlaVlmConfig.from_pretrained(exported)
    else:
        parts = []
        for part in ("vision_tower", "language_model"):
            source, gguf = split_gguf(getattr(config.student, part))
            try:
                parts.append(AutoConfig.from_pretrained(source, local_files_only=True, **gguf))
            except (OSError, ValueError, ImportError):
                return f"student.{part}: no configuration of {source} can be read on this machine"
        vision, text = getattr(parts[0], "vision_config", parts[0]), parts[1]
        counts = {task["name"]: task["task_tokens"] for task in student.tasks(config)}
        ids = itertools.count(text.vocab_size + 1)
        built = OlaVlmConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=text.vocab_size,
            **image_tokens(vision),
            tasks=student.tasks(config),
            task_token_ids={task: [next(ids) for _ in range(count)] for task, count in counts.items()},
            encoders=student.encoders(config),
            encoder_token_ids={encoder: next(ids) for encoder in config.student.encoders},
        )
    with torch.device("meta"):
        return OlaVlmForConditionalGeneration(built)


def _bytes(stage: StageConfig) -> int:
    """Bytes of a frozen parameter; a trained one takes 16: fp32 with its gradient and AdamW's two moments."""
    return 4 if stage.dtype == "float32" else 2
