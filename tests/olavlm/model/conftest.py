"""A student small enough for tests, built from saved parts as any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor, build_student

DATA = Path(__file__).parents[2] / "data"
WORDS = ["USER", ":", "ASSISTANT", "what", "is", "this", "a", "red", "blue", "cube", "ball", "one", "two", "there"]
TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2, 4], "task_tokens": 2},
    {
        "name": "depth",
        "kind": "dense",
        "queries": 16,
        "width": 20,
        "layers": [1, 3],
        "task_tokens": 4,
        "depth_mlps": True,
    },
    {"name": "seg", "kind": "dense", "queries": 16, "width": 8, "layers": [4], "task_tokens": 4},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP vision tower: 32 px, patches of 8, 16 image tokens."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes the folder of a Llama with a word-level tokenizer."""

    def make(tie: bool = False, chat_template: str | None = None, layers: int = 4) -> str:
        folder = tmp_path_factory.mktemp("llm")
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.chat_template = chat_template
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def make_student(
    tower: str, make_language_model: Callable[..., str]
) -> Callable[..., tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]]:
    """Builds a student of `TASKS`; keyword arguments go to the language model or to `build_student`."""

    def make(tasks: list[dict[str, Any]] = TASKS, tie: bool = False, **kwargs: Any) -> Any:
        return build_student(tower, make_language_model(tie=tie), tasks, **kwargs)

    return make


@pytest.fixture
def student(make_student: Callable[..., Any]) -> tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]:
    return make_student()


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three pictures of different sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(40, 32), (24, 48), (32, 32)]
    return [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy())
        for w, h in sizes
    ]


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, torch.Tensor]]:
    """Tensors of the published implementation, from tests/data/reference_<name>.safetensors."""
    return lambda name: load_file(DATA / f"reference_{name}.safetensors")
