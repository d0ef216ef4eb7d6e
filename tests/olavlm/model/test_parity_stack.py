"""The whole embedding stack against the method written out (arXiv 2412.09585, sections 3 and 4), in any setting.

`written_out` is that: it takes a student's parameters and one row after another, cuts and concatenates by counting, and
knows of no batch, padding, mask or token id. Losses, predictions, hidden states and every gradient must agree.
tests/data/reference_predictors.safetensors holds cases of the published code as test_parity.py describes them.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig

from olavlm.model import (
    EmbeddingPredictor,
    OlaVlmConfig,
    OlaVlmForConditionalGeneration,
    TaskConfig,
    TaskTargets,
    embedding_losses,
)

IMAGE, IMAGE_TOKENS, HIDDEN = 39, 4, 16
TASKS: dict[str, dict[str, Any]] = {
    "depth": {"name": "depth", "kind": "dense", "queries": 8, "width": 5, "depth_mlps": True},
    "seg": {"name": "seg", "kind": "dense", "queries": 8, "width": 6},
    "gen": {"name": "gen", "kind": "pooled", "queries": 1, "width": 7},
}


@dataclass
class Row:
    """Texts, as token ids, with an image between every two; all but their first token is learned."""

    texts: list[list[int]]

    @property
    def images(self) -> int:
        return len(self.texts) - 1

    @property
    def first_labels(self) -> list[int]:
        return [-100, *self.texts[0][1:]]


def student(tasks: list[dict[str, Any]], read_text: bool) -> OlaVlmForConditionalGeneration:
    ids = iter(range(40, 70))
    torch.manual_seed(0)
    config = OlaVlmConfig(
        text_config=LlamaConfig(
            vocab_size=70,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
        ),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        tasks=tasks,
        task_token_ids={task["name"]: [next(ids) for _ in range(task["task_tokens"])] for task in tasks},
        predictors_read_text=read_text,
    )
    return OlaVlmForConditionalGeneration(config).eval()


def batch_of(model: OlaVlmForConditionalGeneration, rows: list[Row], left: bool = False) -> dict[str, Tensor]:
    """The rows as one padded batch, with labels."""
    ids, labels = [], []
    for row in rows:
        sequence, learned = list(row.texts[0]), row.first_labels
        for text in row.texts[1:]:
            sequence += [*model.config.image_block, *text]
            learned += [-100] * len(model.config.image_block) + text
        ids.append(torch.tensor(sequence))
        labels.append(torch.tensor(learned))
    side = "left" if left else "right"

    def pad(parts: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    return {
        "input_ids": pad(ids, 0),
        "labels": pad(labels, -100),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
    }


def resampled(p: dict[str, Tensor], x: Tensor, latents: Tensor) -> Tensor:
    """Section 3.2: tokens (L, hidden) and projected queries (queries, dim) → (queries, width)."""

    def norm(values: Tensor, name: str) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    x = x @ p["project_in.weight"].T + p["project_in.bias"]
    read = torch.cat([norm(x, "norm_hidden"), norm(latents, "norm_latents")])
    query = norm(latents, "norm_latents") @ p["to_query.weight"].T
    key, value = (read @ p["to_key_value.weight"].T).chunk(2, dim=1)
    heads = [
        torch.softmax(query[:, at : at + 32] @ key[:, at : at + 32].T / sqrt(32), dim=1) @ value[:, at : at + 32]
        for at in range(0, 128, 32)
    ]
    latents = latents + torch.cat(heads, dim=1) @ p["to_out.weight"].T
    latents = latents + F.gelu(norm(latents, "norm_mlp") @ p["mlp_up.weight"].T) @ p["mlp_down.weight"].T
    return norm(latents @ p["project_out.weight"].T + p["project_out.bias"], "norm_out")


def prediction(
    p: dict[str, Tensor], task: TaskConfig, table: Tensor | None, hidden: Tensor, own: Tensor, around: list[Tensor]
) -> Tensor:
    """A task's embedding of one image at one layer.

    Args:
        p: the predictor's parameters.
        table: the task's (rows, hidden), None without task tokens.
        hidden: (tokens, hidden), the image's.
        own: (task_tokens, hidden), the hidden states of this task's tokens.
        around: the text that is read, before and behind.
    """
    before, behind = around
    x = torch.cat([before, hidden, own, behind])
    if table is None:
        latents = p["latents"][0]
    else:
        queries = own.mean(0, keepdim=True) if task.kind == "pooled" else table
        latents = queries @ p["project_in.weight"].T + p["project_in.bias"]
    out = resampled(p, x, latents)
    if task.depth_mlps:
        out = F.relu(out @ p["linear_1.0.weight"].T + p["linear_1.0.bias"])
        out = out @ p["linear_1.2.weight"].T + p["linear_1.2.bias"]
    return out


def written_out(
    model: OlaVlmForConditionalGeneration, rows: list[Row], pixels: Tensor
) -> tuple[list[tuple[Tensor, ...]], Tensor, dict[str, dict[int, Tensor]]]:
    """Hidden states of every row, next-token loss, and predictions task → layer → (n, queries, width)."""
    tasks, tables = model.config.task_configs, dict(model.task_tokens.items())
    words, projector = model.get_input_embeddings(), model.model.multi_modal_projector
    features = iter(model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    every: dict[str, dict[int, list[Tensor]]] = {t.name: {layer: [] for layer in t.layers} for t in tasks}
    states, logits, answers = [], [], []
    for row in rows:
        sequence = [words(torch.tensor(row.texts[0], dtype=torch.int64))]
        labels = row.first_labels
        for text in row.texts[1:]:
            sequence.append(projector.linear_2(F.gelu(projector.linear_1(next(features)))))
            for task in tasks:
                runs = tables[task.name].split(len(tables[task.name]) // task.task_tokens) if task.task_tokens else []
                sequence += [run.mean(0, keepdim=True) for run in runs]
            sequence.append(words(torch.tensor(text, dtype=torch.int64)))
            labels = labels + [-100] * (IMAGE_TOKENS + sum(t.task_tokens for t in tasks)) + text
        out = model.model.language_model(inputs_embeds=torch.cat(sequence)[None], output_hidden_states=True)
        hidden = tuple(layer[0] for layer in out.hidden_states)
        states.append(hidden)
        logits.append(hidden[-1][:-1] @ model.lm_head.weight.T)
        answers.append(torch.tensor(labels[1:], dtype=torch.int64))
        for image in range(row.images):
            for task in tasks:
                for layer, found in every[task.name].items():
                    found.append(_of_image(model, tasks, task, layer, row, image, hidden[layer]))
    loss = F.cross_entropy(torch.cat(logits), torch.cat(answers))
    predictions = {
        task.name: {
            layer: torch.stack(found) if found else torch.empty(0, task.queries, task.width)
            for layer, found in every[task.name].items()
        }
        for task in tasks
    }
    return states, loss, predictions


def _of_image(
    model: OlaVlmForConditionalGeneration,
    tasks: list[TaskConfig],
    task: TaskConfig,
    layer: int,
    row: Row,
    image: int,
    hidden: Tensor,
) -> Tensor:
    """The row cut into texts, images and task tokens; `prediction` of what belongs to this image and task."""
    inserted = [t.task_tokens for t in tasks]
    lengths = [len(row.texts[0])]
    for text in row.texts[1:]:
        lengths += [IMAGE_TOKENS, *inserted, len(text)]
    parts = hidden.split(lengths)
    stride = 2 + len(tasks)  # parts from one text to the next
    texts = parts[::stride]
    around = [torch.cat(texts[: image + 1]), torch.cat(texts[image + 1 :])]
    if not model.config.predictors_read_text:
        around[1] = around[1][:0]
    at = stride * image + 1
    predictor = model.predictors[task.name].get_submodule(str(layer))
    table = model.task_tokens[task.name] if task.task_tokens else None
    own = parts[at + 1 + tasks.index(task)]
    return prediction(dict(predictor.named_parameters()), task, table, parts[at], own, around)


def losses_written_out(
    model: OlaVlmForConditionalGeneration,
    text: Tensor,
    predictions: dict[str, dict[int, Tensor]],
    targets: dict[str, Tensor],
    valid: dict[str, Tensor],
    weights: dict[str, float],
    contrastive: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Section 3.3 over the images that have a target: every term by name, and the whole loss."""
    terms, total = {}, text
    for task, of_task in predictions.items():
        own = targets[task][valid[task]]
        for layer, every in of_task.items():
            kept, nothing = every[valid[task]], every.sum() * 0
            difference = (kept - own).abs()
            distance = torch.where(difference < 1, difference**2 / 2, difference - 0.5)
            loss = terms[f"{task}/{layer}/smooth_l1"] = distance.mean() if len(kept) else nothing
            if contrastive:
                unit = [x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (kept, own)]
                logits = unit[0] @ unit[1].T * model.logit_scales[task].exp().clamp(max=100)
                nce = -torch.log_softmax(logits, dim=1).diagonal().mean() if len(kept) else nothing
                terms[f"{task}/{layer}/contrastive"] = nce
                loss = loss + contrastive * nce
            total = total + weights[task] * loss
    return terms, total


def gradients(model: OlaVlmForConditionalGeneration, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


def assert_same(got: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@st.composite
def tasks_in_some_order(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.permutations(list(TASKS)))[: draw(st.integers(1, 3))]
    layers = st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True)
    return [TASKS[name] | {"layers": draw(layers), "task_tokens": draw(st.sampled_from([0, 2, 4]))} for name in names]


tokens = st.lists(st.integers(1, 38), min_size=1, max_size=7)
rows = st.builds(Row, st.lists(tokens, min_size=1, max_size=3))


@settings(max_examples=15, deadline=None)
@given(
    tasks=tasks_in_some_order(),
    read_text=st.booleans(),
    batch=st.lists(rows, min_size=1, max_size=4).filter(lambda batch: any(row.images for row in batch)),
    left=st.booleans(),
    contrastive=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_setting_agrees_with_the_method_written_out(
    tasks: list[dict[str, Any]], read_text: bool, batch: list[Row], left: bool, contrastive: float, seed: int
) -> None:
    model = student(tasks, read_text)
    generator = torch.Generator().manual_seed(seed)
    images = sum(row.images for row in batch)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    weights = {task["name"]: float(torch.rand((), generator=generator)) for task in tasks}
    targets, valid = {}, {}
    for task in model.config.task_configs:
        targets[task.name] = torch.randn(images, task.queries, task.width, generator=generator)
        valid[task.name] = torch.rand(images, generator=generator) < 0.7

    inputs = batch_of(model, batch, left)
    out = model(**inputs, pixel_values=pixels, predict=True, output_hidden_states=True)
    of_tasks = {name: TaskTargets.of_batch(targets[name], valid[name]) for name in targets}
    losses = embedding_losses(out.predictions, of_tasks, dict(model.logit_scales.items()), weights, contrastive)

    states, text, predictions = written_out(model, batch, pixels)
    terms, total = losses_written_out(model, text, predictions, targets, valid, weights, contrastive)
    for name, of_task in predictions.items():
        assert_same(out.predictions[name], of_task)
    for row, (of_row, mask) in enumerate(zip(states, inputs["attention_mask"], strict=True)):
        for layer, state in enumerate(of_row):
            assert_close(out.hidden_states[layer][row][mask.bool()], state, atol=2e-5, rtol=2e-5)
    assert_close(out.loss, text, atol=2e-5, rtol=2e-5)
    assert_same(losses.parts, terms)
    assert_same(gradients(model, out.loss + losses.total), gradients(model, total))


@pytest.mark.parametrize(
    ("case", "dim", "width", "queries", "mlps"),
    [
        ("depth_tt_n16_inter", 64, 24, None, True),
        ("depth_plain_n16_inter", 24, 24, 16, True),
        ("gen_plain", 40, 40, 1, False),
        ("seg_plain_n576", 16, 16, 576, False),
    ],
)
@torch.no_grad()
def test_published_predictors(
    reference: Callable[[str], dict[str, Tensor]], case: str, dim: int, width: int, queries: int | None, mlps: bool
) -> None:
    names = {
        "layers.0.0.norm1": "norm_hidden",
        "layers.0.0.norm2": "norm_latents",
        "layers.0.0.to_q": "to_query",
        "layers.0.0.to_kv": "to_key_value",
        "layers.0.0.to_out": "to_out",
        "layers.0.1.0": "norm_mlp",
        "layers.0.1.1": "mlp_up",
        "layers.0.1.3": "mlp_down",
        "proj_in": "project_in",
        "proj_out": "project_out",
    }
    tensors = {k.removeprefix(f"{case}/"): v for k, v in reference("predictors").items() if k.startswith(f"{case}/")}
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("state/"):
            module, _, kind = name.removeprefix("state/").removeprefix("projector.").rpartition(".")
            state[f"{names.get(module, module)}.{kind}".removeprefix(".")] = tensor
    predictor = EmbeddingPredictor(64, dim, width, queries, mlps)
    predictor.load_state_dict(state)
    mask = torch.ones(tensors["in/x"].shape[:2], dtype=torch.bool)
    asked = tensors.get("in/latents")
    alone = predictor.resample(tensors["in/x"], mask, asked)
    outputs = [predictor(tensors["in/x"], mask, asked)]
    if predictor.linear_2 is not None and predictor.linear_3 is not None:
        outputs += [predictor.linear_2(alone), predictor.linear_3(alone), alone]
    for i, output in enumerate(outputs):
        published = tensors[f"out/{i}"]  # segmentation: (n, width, rows, columns)
        published = published.flatten(2).transpose(1, 2) if published.ndim == 4 else published
        assert_close(output, published, atol=1e-4, rtol=1e-4)
    assert f"out/{len(outputs)}" not in tensors


#: Two ranks, forked from one process so that the imports are paid once. argv: the folder with all there is to exchange.
RANKS = """
import os, sys
import torch, torch.distributed as dist
from olavlm.model import OlaVlmForConditionalGeneration
from train.distributed import World
from train.loader import MicroBatch, Targets
from train.step import Objective, accumulate
torch.set_num_threads(1)
folder = sys.argv[1]

def run(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    model = OlaVlmForConditionalGeneration.from_pretrained(f"{folder}/model")
    given = torch.load(f"{folder}/rank{rank}.pt")
    batches = [
        MicroBatch(**{**one, "targets": {task: Targets(**of_task) for task, of_task in one["targets"].items()}})
        for one in given["batches"]
    ]
    terms, _ = accumulate(model, batches, Objective(given["weights"], contrastive=0.3), world)
    world.sum_gradients([p for p in model.parameters() if p.requires_grad])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"terms": {name: world.sum(term) for name, term in terms.items()}, "gradients": gradients},
               f"{folder}/result{rank}.pt")
    dist.destroy_process_group()

for rank in range(2):
    if os.fork() == 0:
        try:
            run(rank)
            os._exit(0)
        except Exception:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
sys.exit(any([os.wait()[1] for _ in range(2)]))
"""


def test_two_ranks_agree_with_the_method_written_out_for_the_whole_batch(tmp_path: Path) -> None:
    """The first rank has two micro-batches and an image without a target; the second one, text-only row included."""
    model = student([TASKS[name] | {"layers": [2, 3], "task_tokens": 2} for name in ("gen", "depth", "seg")], True)
    model.save_pretrained(tmp_path / "model")
    batch = [Row([[1, 2], [3, 4, 5]]), Row([[6], [7, 8], [9, 9]]), Row([[3, 1, 4]]), Row([[1, 5, 9, 2], [6, 5]])]
    pixels = torch.randn(4, 3, 8, 8)
    valid = torch.tensor([True, False, True, True])
    weights = {"depth": 0.5, "seg": 0.25, "gen": 1.0}
    targets = {task.name: torch.randn(4, task.queries, task.width) for task in model.config.task_configs}

    def micro_batch(of_rows: slice, of_images: slice) -> dict[str, Any]:
        return batch_of(model, batch[of_rows]) | {
            "pixel_values": pixels[of_images],
            "targets": {
                task: {"values": values[of_images], "scales": None, "valid": valid[of_images], "codec": "fp16"}
                for task, values in targets.items()
            },
            "keys": ["a sample"],
        }

    shares = [
        [micro_batch(slice(0, 1), slice(0, 1)), micro_batch(slice(1, 2), slice(1, 3))],
        [micro_batch(slice(2, 4), slice(3, 4))],
    ]
    for rank, share in enumerate(shares):
        torch.save({"batches": share, "weights": weights}, tmp_path / f"rank{rank}.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    ranks = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ranks.returncode == 0, ranks.stderr[-3000:]

    _, text, predictions = written_out(model, batch, pixels)
    terms, total = losses_written_out(model, text, predictions, targets, dict.fromkeys(targets, valid), weights, 0.3)
    whole = gradients(model, total)
    for rank in range(2):
        result = torch.load(tmp_path / f"result{rank}.pt")
        assert_same(result["terms"], terms | {"text": text, "loss": total})
        assert_same(result["gradients"], whole)
