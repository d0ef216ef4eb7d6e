"""A student small enough to answer hundreds of questions a second; what it says is random."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from olavlm.model import build_student

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["USER", ":", "ASSISTANT", "(", ")", "A", "B", "C", "D", "How", "many", "?", "1", "2", "3", "chair", "table"],
]
TASKS = [{"name": "gen", "kind": "pooled", "queries": 1, "width": 8, "layers": [1], "task_tokens": 2}]


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor: 16 image tokens, 2 layers, word-level vocabulary."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("student")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder / "vision")
    CLIPImageProcessorPil().save_pretrained(folder / "vision")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "llm")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.5,
        )
    ).save_pretrained(folder / "llm")
    return build_student(str(folder / "vision"), str(folder / "llm"), TASKS)
