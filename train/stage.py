"""A training stage (pretrain, vpt, finetune) from its configuration to its exported model.

The loop in `_train` is the whole of it: fetch, forward, loss, backward, clip, step, log if due, checkpoint if due.
"""

import math
import shutil
import signal
import time
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from olavlm import runs
from olavlm.config import PipelineConfig, StageConfig
from olavlm.data.folder import new_folder
from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor
from train import checkpoint, metrics, sharding, student
from train.distributed import World
from train.loader import Loader, MicroBatch
from train.order import Order, quotas, rank_share
from train.snapshot import Request, Snapshot, find_data
from train.step import Objective, accumulate, learning_rate

#: Seconds within which a second signal to stop is taken for the first one, passed on twice.
_SAME_STOP = 5.0


def run(config: PipelineConfig, stage: str) -> None:
    """Train a stage to its end, from its newest checkpoint if there is one; nothing happens if it has finished.

    Raises:
        OlaError: bad configuration, data or targets; a loss that is not finite; somebody else trains this stage.
        KeyboardInterrupt: asked to stop; a checkpoint was written.
    """
    settings = student.stage_config(config, stage)
    folder = runs.stage_dir(config, stage)
    with World.join() as world, world.alone(folder):
        if runs.begin(folder, runs.depends_on(config, stage)):
            Console().print(f"{stage}: finished already, see {folder / 'done.json'}")
            return
        summary = _train(config, stage, settings, folder, world)
        if world.rank == 0:
            runs.finish(folder, summary)
            if summary["samples_cut"]:
                Console().print(
                    f"{stage}: {summary['samples_cut']:,} of {summary['samples']:,} samples were cut at max_length "
                    f"{settings.max_length:,}; {summary['answers_cut']:,} answers were lost",
                    soft_wrap=True,
                )
        world.barrier()


def _train(config: PipelineConfig, name: str, stage: StageConfig, folder: Path, world: World) -> dict[str, Any]:
    """Everything around the loop: data, student, optimizer, the newest checkpoint; returns what done.json tells."""
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    weights = {task: weight for task, weight in stage.losses.items() if weight}
    wanted = request(name, stage, tuple(weights), tuple(config.student.encoders))
    find_data(
        config, wanted
    )  # a wrong path is told before a large model is loaded, and both before anything is written
    model, processor = student.start(config, name)
    snapshot = open_snapshot(folder, config, wanted, world)
    order = order_of(snapshot, name, stage, config.seed)
    steps = total_steps(order, stage)

    processor.view = stage.view
    adapters = student.adapt(model, stage.lora, config.seed) if stage.lora else None
    if stage.fully_shard and world.size > 1:
        student.prepare(model, stage, torch.device("cpu"))
        sharding.shard(model, world, student.autocast(stage))
        parts = student.trainable(model, stage)
    else:
        parts = student.prepare(model, stage, world.device)
        world.broadcast([parameter for pairs in parts.values() for _, parameter in pairs])
    parameters = {key: parameter for pairs in parts.values() for key, parameter in pairs}
    optimizer = _optimizer(parts, stage, world.device)
    done, counts = checkpoint.resume(folder / "checkpoints", parameters, optimizer, world)

    loader = Loader(
        snapshot,
        processor,
        list(snapshot.tasks),
        stage.max_length,
        range(done, steps),
        share=lambda step: rank_share(order.batch(step), stage.micro_batch, world.rank, world.size),
        threads=stage.loader_threads,
        pin_memory=world.device.type == "cuda",
    )
    objective = Objective(weights, stage.contrastive, student.autocast(stage))
    log = metrics.Metrics(folder, name, done, steps, counts, quiet=world.rank > 0)
    try:
        _loop(stage, config.seed, model, parameters, optimizer, loader, objective, log, folder / "checkpoints", world)
    finally:
        told = log.close()
    if adapters:
        adapters.merge_and_unload()
    export(model, processor, folder / "model", stage, world)
    if world.rank > 0:
        return {}
    return _summary(folder, model, parts, steps, told)


def _loop(
    stage: StageConfig,
    seed: int,
    model: OlaVlmForConditionalGeneration,
    parameters: checkpoint.Named,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    objective: Objective,
    log: metrics.Metrics,
    checkpoints: Path,
    world: World,
) -> None:
    """The training, one global batch after the other."""
    steps = loader.steps.stop
    with _Stop() as stop, closing(iter(loader)) as fetched:
        for step, batches in zip(loader.steps, fetched, strict=True):
            torch.manual_seed(_seed(seed, step, world.rank))
            batches = [batch.each(lambda t: t.to(world.device, non_blocking=True)) for batch in batches]
            optimizer.zero_grad()
            terms, losses = accumulate(model, batches, objective, world)  # forward, loss, backward
            world.sum_gradients(list(parameters.values()))
            norm = sharding.clip_gradients(list(parameters.values()), stage.clip)
            values, counts, stopping = _reduce(terms, _counts(batches), stop.asked, world)
            values |= {"lr": _set_rate(optimizer, stage, step, steps), "grad_norm": float(norm)}
            _check_finite(step, values, losses, batches, checkpoints)
            optimizer.step()
            log.advance(counts, loader.waited)
            if step == 0 or _due(step + 1, stage.log_every, steps):
                log.log(step + 1, values)
            if stopping or _due(step + 1, stage.checkpoint_every, steps):
                checkpoint.save(checkpoints, step + 1, log.counts, parameters, optimizer, stage.keep, world)
            if stopping and step + 1 < steps:
                raise KeyboardInterrupt


def request(name: str, stage: StageConfig, tasks: tuple[str, ...], encoders: tuple[str, ...] = ()) -> Request:
    """What a stage asks of its data: targets to learn, and targets that the student is fed."""
    return Request(name, tuple(stage.data), tasks, stage.view, stage.allow_view_mismatch, stage.max_missing, encoders)


def open_snapshot(folder: Path, config: PipelineConfig, request: Request, world: World) -> Snapshot:
    """The run's snapshot; where it has to be made, the first rank makes it while the others wait."""
    if world.rank == 0:
        snapshot = Snapshot.open(folder, config, request)
    world.barrier()
    return snapshot if world.rank == 0 else Snapshot.open(folder, config, request)


def order_of(snapshot: Snapshot, name: str, stage: StageConfig, seed: int) -> Order:
    """The order of a stage's samples.

    Raises:
        OlaError: weights for some of the stage's data only.
    """
    missing = [name for name in stage.data if name not in stage.weights] if stage.weights else []
    if missing:
        raise OlaError(f"stages.{name}.weights: none for {', '.join(missing)}; give every data set a weight, or none")
    weights = [stage.weights[name] for name in stage.data] if stage.weights else None
    keys = snapshot.group_keys if stage.group_by_length else None
    return Order(snapshot.sizes, quotas(snapshot.sizes, weights), seed, stage.global_batch, keys, stage.shuffle_window)


def total_steps(order: Order, stage: StageConfig) -> int:
    """Optimizer steps of a stage."""
    steps = math.ceil(stage.epochs * order.epoch_batches)
    return min(steps, stage.max_steps) if stage.max_steps else steps


def export(
    model: OlaVlmForConditionalGeneration, processor: OlaVlmProcessor, folder: Path, stage: StageConfig, world: World
) -> None:
    """Publish the student as an ordinary Hugging Face folder, in full or not at all; all ranks must call."""
    dtype = student.DTYPES[stage.dtype]
    state = sharding.collect(model.state_dict(keep_vars=True), world, dtype)
    if world.rank > 0:
        return
    model.model.vision_tower.to(dtype)  # never sharded; config.json states the dtype of its first parameter
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it could say that it was done
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)


def _optimizer(parts: student.Parts, stage: StageConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with one group per part; ``base_lr`` is what the schedule scales."""
    groups = [
        {"params": [p for _, p in pairs], "base_lr": stage.lrs.get(part, stage.lr)}  # type: ignore[call-overload]
        for part, pairs in parts.items()
        if pairs
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=stage.weight_decay, fused=device.type == "cuda")


def _set_rate(optimizer: torch.optim.Optimizer, stage: StageConfig, step: int, steps: int) -> float:
    """Set the learning rates of a step; returns the stage's own, for the log."""
    factor = learning_rate(step, steps, stage.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return stage.lr * factor


def _counts(batches: list[MicroBatch]) -> checkpoint.Counts:
    """What this rank trained on: samples, those of them cut at max_length, the answers that they lost."""
    cut = [lost for batch in batches for lost in batch.answers_cut if lost]
    return {
        "samples": sum(len(batch.keys) for batch in batches),
        "samples_cut": len(cut),
        "answers_cut": sum(cut),
    }


def _reduce(
    terms: dict[str, Tensor], counts: checkpoint.Counts, stop: bool, world: World
) -> tuple[dict[str, float], checkpoint.Counts, bool]:
    """Terms and counts summed over the ranks, and whether any rank was asked to stop, in one collective."""
    numbers = torch.tensor([*counts.values(), stop], dtype=torch.float32, device=world.device)
    *summed, stopping = world.sum(torch.cat([torch.stack([*terms.values()]), numbers])).tolist()
    found = dict(zip((*terms, *counts), summed, strict=True))
    return {name: found[name] for name in terms}, {name: round(found[name]) for name in counts}, stopping > 0


def _check_finite(
    step: int, values: dict[str, float], losses: list[Tensor], batches: list[MicroBatch], checkpoints: Path
) -> None:
    """Raise if the loss or the gradient is not finite, naming this rank's samples that may be the reason."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    filled = [batch for batch in batches if batch.keys]
    finite = math.isfinite(values["loss"])  # then the gradient is not, and any sample may be the reason
    keys = [key for b, loss in zip(filled, losses, strict=True) if finite or not math.isfinite(loss) for key in b.keys]
    among = f"; among: {'; '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}" if keys else ""
    before = checkpoint.complete(checkpoints)
    raise OlaError(
        f"step {step + 1}: {', '.join(wrong)} not finite{among}; the parameters were not changed; "
        + (f"the checkpoint before is {checkpoints / f'step-{before[-1]}'}" if before else "there is no checkpoint yet")
    )


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, happens after this one."""
    return step % every == 0 or step == steps


def _seed(*key: int) -> int:
    """A seed for what is random inside a step."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=7).digest())


def _summary(
    folder: Path,
    model: OlaVlmForConditionalGeneration,
    parts: student.Parts,
    steps: int,
    told: dict[str, float],
) -> dict[str, Any]:
    """What done.json tells of a training; `told` is what its metrics add up to."""
    lines = metrics.read(folder)
    gpu = (
        {"peak_gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        if torch.cuda.is_available()
        else {}
    )
    first, final = ({k: v for k, v in ln.items() if k in ("loss", "text") or "/" in k} for ln in (lines[0], lines[-1]))
    return {
        "steps": steps,
        **told,
        **gpu,
        "first": first,
        "final": final,
        "trained_parameters": {part: sum(p.numel() for _, p in pairs) for part, pairs in parts.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class _Stop:
    """While it is open, a SIGINT or SIGTERM asks for a stop after the step; another, seconds later, stops at once.

    Not sooner: under Slurm srun and torchrun both pass on the one that ends the job.
    """

    _first: float | None = None

    @property
    def asked(self) -> bool:
        return self._first is not None

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first >= _SAME_STOP:
            raise KeyboardInterrupt
