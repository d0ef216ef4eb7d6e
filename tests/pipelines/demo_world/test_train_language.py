"""What the student's language model reads before it sees: maps in words, and what is asked about them."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from pipelines.demo_world import train_language
from pipelines.demo_world.build import Told, tell
from pipelines.demo_world.places import LAYOUT
from pipelines.demo_world.train_language import IGNORE, Chat


@pytest.fixture(scope="module")
def told() -> list[Told]:
    return [t for chunk in tell("teachers", 60, 3, 1) for t in chunk]


@pytest.fixture(scope="module")
def chats(told: list[Told]) -> dict[str, list[Chat]]:
    return train_language.read(told)


def test_every_kind_but_text_comes_with_a_map(chats: dict[str, list[Chat]]) -> None:
    assert set(chats) == {"places", "text", "captions", "short", "lettered"}
    for kind, found in chats.items():
        assert len(found) > 40
        for chat in found:
            assert len(chat.cells) == (0 if kind == "text" else LAYOUT**2)
            assert chat.pairs


def test_depth_is_not_spoken_of(chats: dict[str, list[Chat]]) -> None:
    said = {
        word for found in chats.values() for chat in found for pair in chat.pairs for word in " ".join(pair).split()
    }
    assert not said & {"closer", "nearer", "front", "behind", "camera", "far", "distance", "distances"}


def test_places_are_where_the_map_has_them(told: list[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of an object is the mean column and row of the cells that show it."""
    monkeypatch.setattr(train_language, "WRONG", 0)
    for chat in train_language.read(told)["places"]:
        listed, rightwards, downwards, *_ = chat.pairs[0][1].split("; ")
        middles = {}
        for item in listed.split(", "):
            name, *place = item.rsplit(" ", 2)
            cells = [re.findall(r"\d", cell)[::-1] for cell in chat.cells if cell.startswith(f"{name} ")]
            middles[name] = np.mean(np.array(cells, int), axis=0).tolist()
            assert [round(mean) for mean in middles[name]] == [int(p) for p in place]
        assert rightwards == " ".join(["left to right", *sorted(middles, key=lambda name: middles[name][0])])
        assert downwards == " ".join(["top to bottom", *sorted(middles, key=lambda name: middles[name][1])])


def test_choices_that_are_objects_have_any_letter_and_no_map(chats: dict[str, list[Chat]]) -> None:
    """Of questions about depth the letters are learned, and nothing that could answer them."""
    objects = [(ask, said) for chat in chats["text"] for ask, said in chat.pairs if re.search(r"\w+ object \(", said)]
    letters = Counter(said.split()[-1] for _, said in objects)
    assert min(letters["(A)"], letters["(B)"]) > 15
    assert {*letters} == {"(A)", "(B)"}
    for ask, said in objects:
        chosen, letter = said.rsplit(" ", 1)
        assert ask.startswith(f"Which is {chosen}? ")
        assert f"{letter} {chosen}" in ask


def test_all_letters_are_right_equally_often(chats: dict[str, list[Chat]]) -> None:
    asked = [*chats["short"], *chats["lettered"]]
    letters = Counter(answer.split()[-1] for chat in asked for _, answer in chat.pairs if "(" in answer)
    assert letters["(A)"] > 60
    assert abs(letters["(A)"] - letters["(B)"]) < 0.4 * letters["(A)"]


def test_a_cell_is_one_position_and_answers_alone_are_learned(told: list[Told], chats: dict[str, list[Chat]]) -> None:
    words = train_language.make_tokenizer(told)
    for kind in ("short", "text"):
        rows = train_language.encode(chats[kind], words)
        for row, chat in enumerate(chats[kind]):
            length = int(rows.mask[row].sum())
            ids, labels = rows.ids[row, :length], rows.labels[row, :length]
            assert int((ids != words.pad_token_id).all(1).sum()) == sum(cell.count(" ") == 3 for cell in chat.cells)
            learned = words.decode(labels[labels != IGNORE])
            assert learned.replace(" ", "") == "".join(f"{answer}</s>" for _, answer in chat.pairs).replace(" ", "")
            assert (labels == torch.where(labels == IGNORE, labels, ids[:, 0])).all()
