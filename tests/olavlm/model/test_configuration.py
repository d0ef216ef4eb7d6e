"""What the student's configuration accepts, fills in and refuses."""

from typing import Any

import pytest
from transformers import LlamaConfig

from olavlm.errors import OlaError
from olavlm.model import OlaVlmConfig

TEXT = LlamaConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=8, vocab_size=50)
DEPTH = {
    "name": "depth",
    "kind": "dense",
    "queries": 16,
    "width": 20,
    "layers": [3],
    "task_tokens": 4,
    "depth_mlps": True,
}
IDS = {"depth": [40, 41, 42, 43]}


def config(task: dict[str, Any] = DEPTH, **kwargs: Any) -> OlaVlmConfig:
    fields = {
        "text_config": TEXT,
        "tasks": [task],
        "task_token_ids": IDS,
        "image_token_index": 39,
        "image_seq_length": 3,
    }
    return OlaVlmConfig(**(fields | kwargs))


@pytest.mark.parametrize(
    ("change", "dim"),
    [({}, 32), ({"depth_mlps": False}, 20), ({"dim": 7}, 7)],
)
def test_inner_width_follows_the_published_rule(change: dict[str, Any], dim: int) -> None:
    assert config(DEPTH | change).task_configs[0].dim == dim


def test_inner_width_without_task_tokens_is_the_targets() -> None:
    assert config(DEPTH | {"task_tokens": 0}, task_token_ids={}).task_configs[0].dim == 20


def test_image_block_keeps_the_order_of_the_tasks() -> None:
    gen = {"name": "gen", "kind": "pooled", "queries": 1, "width": 5, "task_tokens": 2}
    both = config(tasks=[gen, DEPTH], task_token_ids=IDS | {"gen": [7, 5]})
    assert both.image_block == [39, 39, 39, 7, 5, 40, 41, 42, 43]


def test_survives_its_own_json() -> None:
    first = config()
    again = OlaVlmConfig.from_dict(first.to_dict())
    assert again.task_configs == first.task_configs
    assert again.task_token_ids == IDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [5]}, r"tasks.depth.layers: 5; expected integers from 1 to 4"),
        ({"layers": [0]}, r"tasks.depth.layers: 0"),
        ({"layers": ["3"]}, r"tasks.depth.layers: '3'"),
        ({"layers": [3, 3]}, "names a layer twice"),
        ({"queries": 18}, "task_tokens: 4 does not divide its 18 queries"),
        ({"queries": 0}, "tasks.depth.queries: 0"),
        ({"kind": "sparse"}, "expected 'dense' or 'pooled'"),
        ({"kind": "pooled"}, "a pooled task has exactly one query"),
        ({"task_tokens": -1}, "tasks.depth.task_tokens: -1"),
        ({"widht": 4}, "tasks.depth.widht: unknown key; did you mean 'width'"),
        ({"name": "<depth>"}, "tasks: name '<depth>'"),
        ({"task_tokens": 8}, "task_token_ids.depth: 4 ids; expected 8"),
    ],
)
def test_tasks_that_cannot_be_built_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        config(DEPTH | change)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks": [DEPTH, DEPTH]}, "names a task twice"),
        ({"task_token_ids": IDS | {"seg": [1]}}, "task_token_ids.seg: no such task"),
        ({"task_token_ids": {"depth": [39, 41, 42, 43]}}, "used twice, or is the image token's"),
        ({"tasks": [{"name": "depth", "kind": "dense", "queries": 1}]}, "tasks.depth.width: missing"),
    ],
)
def test_what_contradicts_itself_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        config(**kwargs)
