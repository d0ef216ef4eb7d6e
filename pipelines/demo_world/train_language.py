"""The student's language model: a small Llama that has read the world's language, without images."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipelines.demo_world.build import Told, conversations
from pipelines.demo_world.samples import fit
from pipelines.demo_world.words import tokenizer, vocabulary

LENGTH = 256
SPEAKERS = {"human": "user", "gpt": "assistant"}


def read(told: list[Told], seed: int = 0) -> list[list[dict[str, str]]]:
    """What there is to read: a caption and conversations about every scene, as chat messages without images.

    Answers are right, but balanced: with no image to look at, they are noise, and no more than their form can be
    learned.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = [t.caption for t in told] + [row["conversations"] for row in conversations(told, "teachers", rng)]
    return [
        [{"role": SPEAKERS[t["from"]], "content": t["value"].removeprefix("<image>\n")} for t in row]
        for row in (rows[i] for i in rng.permutation(len(rows)))
    ]


def make_tokenizer(told: list[Told]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of `read(told)`."""
    return tokenizer(vocabulary(message["content"] for chat in read(told) for message in chat))


def build(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, 128 wide, 4 layers."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train(
    told: list[Told], words: PreTrainedTokenizerFast, steps: int, batch: int = 16, seed: int = 0
) -> tuple[LlamaForCausalLM, float, float]:
    """Next-token prediction on packed chats; (model in eval mode, CPU seconds, perplexity on 32 held-out rows)."""
    torch.manual_seed(seed)
    model = build(words).train()
    chats = words.apply_chat_template(read(told), tokenize=False)
    ids = torch.tensor([i for chat in words(chats).input_ids for i in chat])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    def loss(chosen: NDArray[np.int64]) -> Tensor:
        picked = rows[torch.from_numpy(chosen)]
        value: Tensor = model(input_ids=picked, labels=picked).loss
        return value

    held_out = np.arange(len(rows) - 32, len(rows))
    seconds = fit("llm", list(model.parameters()), loss, len(rows) - 32, batch, steps, lr=2e-3, seed=seed)
    model.eval()
    with torch.no_grad():
        return model, seconds, float(loss(held_out).exp())
