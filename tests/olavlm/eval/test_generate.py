"""Generation: resumable, independent of where it was stopped, each reply under its own question."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from olavlm.errors import OlaError
from olavlm.eval import generate
from olavlm.eval.generate import Request, generate_replies


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def requests() -> list[Request]:
    """Prompts of unequal length, so that every batch has padding; "facts" as a benchmark would keep them."""
    return [
        Request(f"2D/{i}", "<image>\nHow many ?" + " chair" * (i % 4), png((i * 35, 20, 200)), {"answer": "ABC"[i % 3]})
        for i in range(7)
    ]


@pytest.fixture
def ask(tiny_student: tuple[Any, Any]) -> Any:
    model, processor = tiny_student

    def ask(requests: list[Request], file: Path, batch: int = 3, **kwargs: Any) -> list[dict[str, Any]]:
        return generate_replies(model, processor, requests, file, batch=batch, max_new_tokens=5, **kwargs)

    return ask


def test_replies_in_order_with_what_was_asked(ask: Any, requests: list[Request], tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    lines = ask(requests, tmp_path / "replies.jsonl", progress=lambda *reported: done.append(reported))
    assert [line["id"] for line in lines] == [request.id for request in requests]
    assert all(line["prompt"] == request.prompt for line, request in zip(lines, requests, strict=True))
    assert [line["answer"] for line in lines] == list("ABCABCA")
    assert len({line["reply"] for line in lines}) > 1  # the student looks and reads
    assert done == [(0, 7), (3, 7), (6, 7), (7, 7)]
    assert [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()] == lines
    assert [path.name for path in tmp_path.iterdir()] == ["replies.jsonl"]


def test_padding_does_not_change_a_reply(ask: Any, requests: list[Request], tmp_path: Path) -> None:
    together = ask(requests, tmp_path / "together.jsonl", batch=7)
    alone = ask(requests, tmp_path / "alone.jsonl", batch=1)
    assert [line["reply"] for line in together] == [line["reply"] for line in alone]


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("torn", ["", '{"id": "2D/5", "prom'])
def test_stopped_anywhere_it_asks_only_the_rest(
    ask: Any, requests: list[Request], tmp_path: Path, kept: int, torn: str
) -> None:
    unbroken = ask(requests, tmp_path / "unbroken.jsonl")
    whole = (tmp_path / "unbroken.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "broken.jsonl"
    file.write_text("".join(whole[:kept]) + torn)
    assert ask(requests, file) == unbroken
    assert file.read_text() == "".join(whole)


class Together:
    """One of several ranks, each a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, barrier.parties
        self.barrier = barrier.wait


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_batches_and_give_the_replies_of_one(
    ask: Any, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    alone = ask(requests, tmp_path / "alone.jsonl")
    (tmp_path / "replies.jsonl").write_text(json.dumps(alone[4]) + "\n" + '{"id": "2D/5", "prom')
    part = tmp_path / "replies.rank7.jsonl"  # of a run on more ranks that was killed
    part.write_text(json.dumps(alone[0]) + "\n" + json.dumps(alone[1])[:-5])
    asked: list[str] = []
    reply = generate._reply

    def counted(model: Any, processor: Any, batch: list[Request], *settings: Any) -> list[str]:
        asked.extend(request.id for request in batch)
        return reply(model, processor, batch, *settings)

    monkeypatch.setattr(generate, "_reply", counted)
    barrier = threading.Barrier(size, timeout=60)
    with ThreadPoolExecutor(size) as pool:
        found = list(
            pool.map(
                lambda rank: ask(requests, tmp_path / "replies.jsonl", batch=2, ranks=Together(rank, barrier)),
                range(size),
            )
        )
    assert found == [alone] * size
    assert sorted(asked) == [request.id for request in requests]  # each by one rank, in whole batches
    lines = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert lines == alone
    assert not list(tmp_path.glob("replies.rank*"))


def test_a_finished_file_is_not_asked_again(requests: list[Request], ask: Any, tmp_path: Path) -> None:
    lines = ask(requests, tmp_path / "replies.jsonl")
    nobody: Any = None
    again = generate_replies(
        type("Student", (), {"eval": lambda self: None})(),  # type: ignore[arg-type]  # answers nothing
        nobody,
        requests,
        tmp_path / "replies.jsonl",
        batch=3,
        max_new_tokens=5,
    )
    assert again == lines


def test_replies_to_other_questions_are_refused(ask: Any, requests: list[Request], tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    ask(requests[:2], file)
    changed = [Request("2D/0", "<image>\nHow many chair ?", requests[0].image), *requests[1:]]
    with pytest.raises(OlaError, match=r"replies\.jsonl: the reply to 2D/0 was given to '<image>.nHow many \?'"):
        ask(changed, file)
    with pytest.raises(OlaError, match="the reply to 2D/0 was given to"):
        ask(requests[1:], file)
    file.write_text("no reply\n" + file.read_text())
    with pytest.raises(OlaError, match=r"line 1 is no reply: b'no reply"):
        ask(requests, file)


def test_an_image_that_cannot_be_decoded_is_named(ask: Any, requests: list[Request], tmp_path: Path) -> None:
    broken = Request("3D/9", "<image>\nHow many ?", requests[0].image[:40])
    with pytest.raises(OlaError, match="question 3D/9: image cannot be decoded"):
        ask([requests[0], broken], tmp_path / "replies.jsonl")
