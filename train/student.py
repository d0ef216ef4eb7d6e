"""Where a stage's student comes from: built from its parts, or the model another stage has exported."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from olavlm import runs
from olavlm.config import LoraConfig, PipelineConfig, StageConfig
from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor, build_student, parameter_groups
from olavlm.model.configuration import check_image_tokens

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
Parts = dict[str, list[tuple[str, nn.Parameter]]]  # part → its parameters with their names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def stage_config(config: PipelineConfig, stage: str) -> StageConfig:
    """The settings of a stage.

    Raises:
        OlaError: the pipeline has no such stage.
    """
    stages = dict[str, StageConfig](config.stages.items())
    if stage not in stages:
        raise OlaError(f"stages.{stage}: this pipeline has no such stage; it has: {', '.join(stages)}")
    return stages[stage]


def tasks(config: PipelineConfig) -> list[dict[str, Any]]:
    """The student's tasks in sequence order, in the shapes of their teachers' targets."""
    student = config.student
    return [
        {
            "name": task,
            "kind": "pooled" if config.teachers[task].grid == 1 else "dense",
            "queries": config.teachers[task].tokens,
            "width": config.teachers[task].width,
            "layers": student.layers.get(task, []),
            "task_tokens": student.task_tokens,
            "depth_mlps": task == "depth",  # as published; see EmbeddingPredictor
            **({"dim": student.dims[task]} if task in student.dims else {}),
        }
        for task in student.tasks
    ]


def encoders(config: PipelineConfig) -> list[dict[str, Any]]:
    """The teachers whose features the student is fed, in sequence order, in the shapes of their targets."""
    fed = {name: config.teachers[name] for name in config.student.encoders}
    return [{"name": name, "tokens": teacher.tokens, "width": teacher.width} for name, teacher in fed.items()]


def create(config: PipelineConfig, dtype: torch.dtype = torch.float32) -> Student:
    """A student as it is before any training; its new parts depend on the pipeline's seed only."""
    student = config.student
    model, processor = build_student(
        student.vision_tower,
        student.language_model,
        tasks(config),
        encoders=encoders(config),
        vision_feature_layer=student.vision_feature_layer,
        predictors_read_text=student.predictors_read_text,
        seed=config.seed,
        dtype=dtype,
    )
    tokens = model.config.image_seq_length
    if student.image_tokens not in (None, tokens):
        raise OlaError(f"student.image_tokens: {student.image_tokens}; {student.vision_tower} makes {tokens} per image")
    return model, processor


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Student:
    """The student in an exported model folder.

    Raises:
        OlaError: there is none, or its vision tower, model and processor do not agree on what an image is.
    """
    if not (folder / "config.json").is_file():
        raise OlaError(f"{folder}: no model here (config.json is missing)")
    model = OlaVlmForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    check_image_tokens(model.config)
    processor = OlaVlmProcessor.from_pretrained(folder)
    if processor.image_block != model.config.image_block:
        raise OlaError(
            f"{folder}: the processor writes {len(processor.image_block)} tokens per image "
            f"({processor.image_seq_length} image tokens), the model reads {len(model.config.image_block)} "
            f"({model.config.image_seq_length}), or other ids; expected those of one export"
        )
    return model, processor


def start(config: PipelineConfig, stage: str) -> Student:
    """The student that a stage starts from (``stages.<stage>.init``), in the stage's dtype.

    Raises:
        OlaError: the stage to start from has not finished or has another configuration, its model lacks what this one's
            losses need, or is fed other features; samples may be longer than the language model's context.
    """
    settings = stage_config(config, stage)
    dtype = DTYPES.get(settings.dtype)
    if dtype is None:
        raise OlaError(f"stages.{stage}.dtype: {settings.dtype} cannot train (its range is too small); use bfloat16")
    model, processor = create(config, dtype) if settings.init is None else _init(config, stage, settings.init, dtype)
    context = model.config.llm.max_position_embeddings
    if settings.max_length > context:
        raise OlaError(f"stages.{stage}.max_length: {settings.max_length}; the language model's context has {context}")
    return model, processor


def _init(config: PipelineConfig, stage: str, init: str, dtype: torch.dtype) -> Student:
    """The model of the stage, or in the folder, that a stage starts from."""
    folder = runs.require(config, init) / "model" if init in config.stages else Path(init)
    model, processor = load(folder, dtype)
    _check_tasks(config, stage, folder, model)
    if model.config.encoders != encoders(config):
        raise OlaError(f"student.encoders: {encoders(config)}; the student in {folder} is fed {model.config.encoders}")
    return model, processor


def _check_tasks(config: PipelineConfig, stage: str, folder: Path, model: OlaVlmForConditionalGeneration) -> None:
    """Raise if the tasks a stage trains are not the model's."""
    found = {task.name: task for task in model.config.task_configs}
    for task in tasks(config):
        if not stage_config(config, stage).losses.get(task["name"]):
            continue
        if task["name"] not in found:
            raise OlaError(f"stages.{stage}.losses: {folder} has no task {task['name']!r}; it has: {', '.join(found)}")
        for key in ("queries", "width", "layers"):
            have, want = getattr(found[task["name"]], key), task[key]
            if (list(have) if key == "layers" else have) != want:
                raise OlaError(f"{folder}: task {task['name']} has {key} {have}, the pipeline says {want}")


def autocast(stage: StageConfig) -> torch.dtype | None:
    """The dtype a stage's forward pass runs in under autocast; None: in the parameters' own."""
    return torch.bfloat16 if stage.dtype == "bfloat16" else None


def adapt(model: OlaVlmForConditionalGeneration, lora: LoraConfig, seed: int) -> Any:
    """Put low-rank adapters into the language model, in place; they change nothing until they are trained.

    Args:
        model: the student.
        lora: rank, scale, and the layers that get one.
        seed: of the adapters' initial weights.

    Returns:
        peft's `LoraModel`; its ``merge_and_unload()`` adds the adapters to the weights and leaves a plain student.

    Raises:
        OlaError: the language model has no layer of such a name.
    """
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.layers or "all-linear"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.LoraModel(model.model.language_model, settings, "default")
        except ValueError as error:
            raise OlaError(f"lora.layers: {lora.layers}; {error}") from None


def trainable(model: OlaVlmForConditionalGeneration, stage: StageConfig) -> Parts:
    """The parameters a stage trains; of a language model with adapters, these alone."""
    groups = parameter_groups(model)
    if stage.lora:
        groups["language_model"] = [pair for pair in groups["language_model"] if ".lora_" in pair[0]]
    return {part: groups[part] for part in stage.trainable}


def prepare(model: OlaVlmForConditionalGeneration, stage: StageConfig, device: torch.device) -> Parts:
    """Make a student ready for a stage: only its trainable parts require gradients, and those are kept in fp32.

    Frozen parts stay in the stage's dtype; in bfloat16 the forward pass runs under autocast over fp32 master weights.

    Returns:
        The trainable parameters with their names, by part.
    """
    parts = trainable(model, stage)
    model.requires_grad_(False)
    for _, parameter in (pair for pairs in parts.values() for pair in pairs):
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    model.to(device)  # type: ignore[arg-type]
    model.train()
    if "vision_tower" not in stage.trainable:
        model.model.vision_tower.eval()
    if stage.gradient_checkpointing:
        # Renamed within transformers 5; the old name warns where the new one exists.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    return parts
