"""The student's language model: a small Llama that has read the world's language, and no image.

What it reads are scenes as maps in words (`places.layout`), each followed by what is said and asked about a scene in
two dimensions. So it can count and tell left from right before it sees. A cell of a map is one position in the
sequence: the sum of the embeddings of its words (colour, shape, row, column). That is what a projector will put in its
place, and all that pretraining has to teach.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from olavlm.eval.cv_bench import build_prompt
from pipelines.demo_world.build import Told, Turn, conversations
from pipelines.demo_world.cues import THREE_D
from pipelines.demo_world.places import LAYOUT, WHERE, layout, places, segment_names
from pipelines.demo_world.questions import DESCRIBE, LETTERS, Question, deal_letters, text_only
from pipelines.demo_world.samples import fit
from pipelines.demo_world.scenes import COLOURS
from pipelines.demo_world.solids import SHAPES
from pipelines.demo_world.words import tokenizer, vocabulary

Rng = np.random.Generator

SPEAKERS = {"human": "user", "gpt": "assistant"}
FILLERS = 24  # most positions without a word between a map and the text: a student's task tokens stand there
WRONG = 0.02  # share of a map's cells that show another's, and
BLUR = 0.2  # deviation of what is added to all of them, as no projector will be exact (the map's own is 0.85)
TOKEN = 0.7  # deviation of what stands in positions without a word
SHORT, LONG = 8, 3  # most questions in one conversation, asked briefly and as the benchmark does
BOUND = 6  # most of a scene's choices that are asked for by name
NAMED = 2  # most questions of a scene whose choices are objects: of them it learns the letters alone
HELD_OUT = 64  # rows of each kind
IGNORE = -100


@dataclass(frozen=True)
class Chat:
    """A map, and questions about it with their answers."""

    cells: tuple[str, ...]  # words, in reading order
    fillers: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rows:
    """Chats of one kind, padded; all int64."""

    ids: Tensor  # (n, length, 4): up to four words to a position, the others padding, whose embedding is zero
    labels: Tensor  # (n, length)
    mask: Tensor  # (n, length)

    def batch(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """The `chosen` rows of ids, labels and mask, cut to the longest of them."""
        rows = torch.from_numpy(chosen)
        longest = int(self.mask[rows].sum(1).max())
        return self.ids[rows, :longest], self.labels[rows, :longest], self.mask[rows, :longest]


def read(told: Sequence[Told], seed: int = 0) -> dict[str, list[Chat]]:
    """What there is to read, by kind.

    About every scene: places, captions, short questions, the benchmark's own. And without a map, text: which letter a
    choice has, and questions about words and numbers.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chats: dict[str, list[Chat]] = {"places": [], "text": [], "captions": [], "short": [], "lettered": []}
    maps = [layout(t.rendering.panoptic, segment_names(t.scene, t.rendering)) for t in told]
    flat: list[tuple[int, Question]] = []  # with the scene it is about; at random, but scene by scene
    for number, t in enumerate(told):
        ask, answer = (turn["value"] for turn in t.caption)
        described = [(ask.removeprefix("<image>\n"), answer)]
        if where := places(maps[number], rng):
            chats["places"].append(_chat(maps[number], [(WHERE, where)], rng))
            described.append((WHERE, where))
        chats["captions"].append(_chat(maps[number], described, rng))  # as in pretraining
        # Most shapes are absent from most scenes: "none" would be the answer most of the time.
        mine = [q for q in t.questions if q.task == "Relation" or (q.task == "Count" and _some(q, rng))]
        named = [q for q in t.questions if q.task in THREE_D]
        mine += [named[i] for i in rng.permutation(len(named))[:NAMED]]
        flat += [(number, mine[i]) for i in rng.permutation(len(mine))]
    dealt = deal_letters([q for _, q in flat], rng)
    for number, rows in itertools.groupby(range(len(flat)), key=lambda row: flat[row][0]):
        told_of = [dealt[row] for row in rows]
        asked = [q for q in told_of if q.task not in THREE_D]
        brief = [_brief(q, lettered=rng.random() < 0.5) for q in asked[:SHORT]]
        chats["short"].append(_chat(maps[number], brief, rng))
        bound = told_of[:BOUND]
        found = [(f"Which is {_answer(q)}? {_options(q)}", f"{_answer(q)} {q.letter}") for q in bound]
        found.insert(int(rng.integers(len(found) + 1)), text_only(rng))
        chats["text"].append(Chat((), 0, tuple(found)))
        pairs = [(build_prompt(q.prompt).removeprefix("<image>\n"), q.reply) for q in asked[-LONG:]]
        chats["lettered"].append(_chat(maps[number], pairs, rng))
    return chats


def _some(question: Question, rng: Rng) -> bool:
    return _answer(question) != "0" or rng.random() < 0.25


def _answer(question: Question) -> str:
    return question.choices[question.answer]


def _chat(seen: list[str], pairs: list[tuple[str, str]], rng: Rng) -> Chat:
    shown = [str(rng.choice(seen)) if rng.random() < WRONG else cell for cell in seen]
    cells = tuple(f"{cell} row{i // LAYOUT + 1} column{i % LAYOUT + 1}" for i, cell in enumerate(shown))
    return Chat(cells, int(rng.integers(FILLERS + 1)), tuple(pairs))


def _brief(question: Question, lettered: bool) -> tuple[str, str]:
    """A question and its answer, in so few words that a row holds many more: in the choice's own words or by letter."""
    ask, choices = question.text, question.choices
    if question.task == "Relation":
        pair = re.findall(r"of the (\w+ \w+) and the (\w+ \w+)", ask)[0]
        ask = f"Where is the {pair[0]} with respect to the {pair[1]}?"
    if lettered:
        return f"{ask} {_options(question)}", question.reply
    if question.task == "Relation":
        ask = f"{ask.removesuffix('?')}, {' or '.join(choices)}?"
    return ask, question.words


def _options(question: Question) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))


def make_tokenizer(told: Sequence[Told]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word that is said about scenes: in maps, captions and all conversations."""
    rng = np.random.Generator(np.random.PCG64(0))
    rows = conversations(list(told), "teachers", rng)
    said = [turn["value"] for row in rows for turn in cast(list[Turn], row["conversations"])]
    said += [turn["value"] for t in told for turn in [*t.caption, *t.places]]
    chats = [chat for kind in read(told).values() for chat in kind]
    said += [text for chat in chats for pair in chat.pairs for text in pair] + [c for chat in chats for c in chat.cells]
    said += [*DESCRIBE, *COLOURS, *SHAPES]
    return tokenizer(vocabulary(said))


def build(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, 128 wide, 4 layers.

    Embeddings start as large as what a projector and the task tokens, new themselves, will put in their place.
    """
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=352,
        initializer_range=0.08,  # of the order of 1 / sqrt(width): such a small model must not start so near to silence
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},  # slow turns: words are sought by meaning
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    embeddings = model.get_input_embeddings().get_parameter("weight")
    nn.init.normal_(embeddings, std=0.5)
    with torch.no_grad():
        embeddings[words.pad_token_id] = 0  # and stays so: it is the embeddings' padding index
    return model


def encode(chats: list[Chat], words: PreTrainedTokenizerFast) -> Rows:
    """Chats as ids; what the assistant says, and the end of it, are the labels."""

    def turn(role: str, content: str) -> list[int]:
        ids: list[int] = words.apply_chat_template([{"role": role, "content": content}], return_dict=False)  # type: ignore[assignment]
        return ids

    opening = 3  # a turn opens with <s>, the role and a colon
    rows, labels = [], []
    for chat in chats:
        ids: list[list[int]] = []
        learned: list[int] = []
        for ask, answer in chat.pairs:
            first = bool(chat.cells) and not ids
            asked, answered = turn("user", f"\n{ask}" if first else ask), turn("assistant", answer)
            if first:
                cells: list[list[int]] = words(list(chat.cells), add_special_tokens=False).input_ids
                ids = [[i] for i in asked[:opening]] + cells + [[]] * chat.fillers + [[i] for i in asked[opening:]]
            else:
                ids += [[i] for i in asked]
            learned += [IGNORE] * (len(ids) + opening - len(learned)) + answered[opening:]
            ids += [[i] for i in answered]
        rows.append(torch.tensor([[*i, *[words.pad_token_id] * (4 - len(i))] for i in ids]))
        labels.append(torch.tensor(learned))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in labels], batch_first=True)
    return Rows(pad(rows, True, float(words.pad_token_id)), pad(labels, True, float(IGNORE)), mask)


def hear(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Embeddings (n, length, hidden) of ids (n, length, 4): a position hears the sum of its words' embeddings."""
    heard: Tensor = model.get_input_embeddings()(ids).sum(2)
    return heard


def blur(heard: Tensor, ids: Tensor, pad: int) -> Tensor:
    """What is heard (n, length, hidden) at ids (n, length, 4) as a projector and task tokens would have it."""
    words = (ids != pad).sum(2, keepdim=True)
    return heard + torch.randn_like(heard) * torch.where(words == 0, TOKEN, torch.where(words > 1, BLUR, 0.0))


def train(
    told: Sequence[Told], words: PreTrainedTokenizerFast, steps: int, batch: int = 16, seed: int = 0
) -> tuple[LlamaForCausalLM, float, dict[str, float]]:
    """Train from scratch on batches of one kind at a time: for a third of the steps on places and text.

    Returns:
        Model in eval mode; CPU seconds; per kind, the share of held-out answers' words that are predicted right.
    """
    torch.manual_seed(seed)
    model = build(words).train()
    rows = {kind: encode(chats, words) for kind, chats in read(told, seed).items()}
    fewest = min(len(r.ids) for r in rows.values()) - min(HELD_OUT, len(told) // 4)
    kinds = (["places", "places", "text"] * steps)[: steps // 3]
    kinds += ["short", "lettered", "short", "captions", "text", "short", "places"] * steps
    pad: int = words.pad_token_id
    turn = 0

    def loss(chosen: NDArray[np.int64]) -> Tensor:
        nonlocal turn
        kind, turn = kinds[turn], turn + 1
        ids, labels, _ = rows[kind].batch(chosen)  # rows are padded behind: causal attention needs no mask
        logits = model(inputs_embeds=blur(hear(model, ids), ids, pad)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    seconds = fit("llm", list(model.parameters()), loss, fewest, batch, steps, lr=2e-3, seed=seed)
    model.eval()
    return model, seconds, {f"right_{kind}": _right(model, r, fewest) for kind, r in rows.items()}


@torch.no_grad()
def _right(model: LlamaForCausalLM, rows: Rows, first: int) -> float:
    """Share of labels, ends of answers left out, that are the likeliest, over the rows from `first` on (64 at most)."""
    ids, labels, mask = rows.batch(np.arange(first, min(first + HELD_OUT, len(rows.ids))))
    logits = model(inputs_embeds=hear(model, ids), attention_mask=mask).logits
    best, labels = logits[:, :-1].argmax(-1), labels[:, 1:]
    counted = (labels != IGNORE) & (labels != model.config.eos_token_id)
    return float((best == labels)[counted].float().mean())
