"""Batches are what was pinned, whatever the number of threads (promises 1 and 4)."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olavlm.data import codec
from olavlm.errors import OlaError
from train import student
from train.loader import Loader, MicroBatch
from train.snapshot import Request, Snapshot

TASKS = ["depth", "gen"]


@pytest.fixture
def make_loader(tmp_path: Path) -> Callable[..., Loader]:
    def make(world: Any, threads: int = 1, batch: int = 4, max_length: int = 128) -> Loader:
        config = world.config()
        snapshot = Snapshot.open(tmp_path / "run", config, Request("t", ("all",), tuple(TASKS), "squash", False, 0.1))
        _, processor = student.create(config)
        share = lambda step: [np.arange(step * batch, (step + 1) * batch), np.arange(2)]  # noqa: E731
        return Loader(snapshot, processor, TASKS, max_length, range(24 // batch), share, threads)

    return make


def tensors(batch: MicroBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.each(lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def test_threads_change_nothing(world: Any, make_loader: Callable[..., Loader]) -> None:
    one, many = list(make_loader(world)), list(make_loader(world, threads=5))
    assert len(one) == len(many) == 6
    for step, other in zip(one, many, strict=True):
        assert [b.keys for b in step] == [b.keys for b in other]
        for batch, other_batch in zip(step, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(other_batch), strict=True))


def test_images_and_targets_stand_in_the_order_of_the_samples(world: Any, make_loader: Callable[..., Loader]) -> None:
    batch = make_loader(world).read(np.array([6, 3, 5, 0]))  # two images, text only, no depth target, one image
    assert [key.split("'")[1] for key in batch.keys] == ["s06", "s03", "s05", "s00"]
    assert batch.pixel_values.shape == (4, 3, 32, 32)
    assert batch.targets["depth"].valid.tolist() == [True, True, False, True]
    assert batch.targets["gen"].valid.all()
    assert batch.targets["depth"].values.dtype == torch.int8
    assert batch.targets["gen"].values.dtype == torch.float16
    assert not batch.targets["depth"].features()[2].any()
    target = world.target_set("depth")
    row = target.commit(world.corpus().tars[0]).to_pylist()[0]
    values, scales = target.read(row, "s00")
    expected = codec.decode(torch.tensor(values), torch.tensor(scales), "int8")
    assert torch.equal(batch.targets["depth"].features()[3], expected)
    assert (batch.labels[batch.attention_mask == 0] == -100).all()
    assert (batch.labels != -100).any(1).all()


def test_int4_targets_are_read_as_stored_and_decoded_where_they_are(
    own_world: Any, commit: Callable[..., Any], tmp_path: Path
) -> None:
    config = own_world.config("teachers.depth.codec=int4", "teachers.depth.width=32")
    target = commit(own_world, "depth", config.teachers["depth"])
    snapshot = Snapshot.open(tmp_path / "run", config, Request("t", ("all",), ("depth",), "squash", False, 0.1))
    _, processor = student.create(config)
    found = Loader(snapshot, processor, ["depth"], 128, range(1), lambda _: [], 1).read(np.array([0, 5])).targets
    assert (found["depth"].values.dtype, found["depth"].values.shape) == (torch.uint8, (2, 4, 16))
    assert found["depth"].scales is not None
    assert (found["depth"].scales.dtype, found["depth"].scales.shape) == (torch.float16, (2, 4, 1))
    values, scales = target.read(target.commit(own_world.corpus().tars[0]).to_pylist()[0], "s00")
    expected = codec.decode(torch.tensor(values), torch.tensor(scales), "int4")
    assert expected.shape == (4, 32)
    assert torch.equal(found["depth"].features()[0], expected)
    assert not found["depth"].features()[1].any()  # no target


def test_an_empty_share_is_an_empty_batch(world: Any, make_loader: Callable[..., Loader]) -> None:
    batch = make_loader(world).read(np.empty(0, np.int64))
    assert batch.keys == []
    assert batch.pixel_values.shape[0] == batch.input_ids.shape[0] == 0
    assert batch.targets["depth"].values.shape == (0, 4, 6)


def test_reading_ahead_is_bounded(world: Any, make_loader: Callable[..., Loader]) -> None:
    loader = make_loader(world, threads=2, batch=1)
    read: list[int] = []
    original = loader.read
    loader.read = lambda numbers: read.append(1) or original(numbers)  # type: ignore
    steps = iter(loader)
    next(steps)
    steps.close()
    assert len(read) <= 4  # this step and the one read ahead, two micro-batches each


def test_promise_1_key_checked_changed_image_bytes_are_refused(
    own_world: Any, make_loader: Callable[..., Loader]
) -> None:
    loader = make_loader(own_world)
    corpus = own_world.corpus()
    row = corpus.index(corpus.tars[0]).to_pylist()[0]
    with open(corpus.tar_path(corpus.tars[0]), "r+b") as file:
        file.seek(row["image_offset"] + row["image_bytes"] // 2)
        file.write(b"\x00\xff\x00\xff")
    with pytest.raises(OlaError, match=r"data all, tar 000000, sample 's00', image 0: its bytes changed"):
        list(loader)


def test_promise_1_key_checked_swapped_target_bytes_are_refused(
    own_world: Any, make_loader: Callable[..., Loader]
) -> None:
    loader = make_loader(own_world)
    target = own_world.target_set("depth")
    first, second = target.commit(own_world.corpus().tars[0]).to_pylist()[:2]
    file = target.values_file(first["block"])
    data = bytearray(file.read_bytes())
    a, b, n = first["values_offset"], second["values_offset"], first["values_bytes"]
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
    file.write_bytes(data)
    with pytest.raises(OlaError, match=r"tar 000000, sample 's0[01]'.*checksum"):
        list(loader)


def test_the_sample_is_named_whose_target_cannot_be_read(
    world: Any, make_loader: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OlaError, match=r"tar 000000, sample 's0\d', image 0: .*cannot be read \(Too many open files\)"):
        list(make_loader(world))


def test_a_conversation_cut_before_an_image_needs_fewer_images(
    world: Any, make_loader: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [
        {"from": "human", "value": "<image> what is this"},
        {"from": "gpt", "value": "a cube"},
        {"from": "human", "value": "<image> and this"},
        {"from": "gpt", "value": "a ball"},
    ]
    monkeypatch.setattr("train.loader.conversation", lambda member, data: turns)
    whole = make_loader(world).read(np.array([6]))
    cut = make_loader(world, max_length=40).read(np.array([6]))
    assert (len(whole.pixel_values), len(cut.pixel_values)) == (2, 1)
    assert (whole.answers_cut, cut.answers_cut) == ([0], [1])
    assert torch.equal(whole.targets["gen"].values[:1], cut.targets["gen"].values)


def test_images_that_fit_are_kept_where_no_answer_does(world: Any, make_loader: Callable[..., Loader]) -> None:
    whole = make_loader(world).read(np.array([6]))
    cut = make_loader(world, max_length=40).read(np.array([6, 0]))
    assert cut.answers_cut == [1, 0]
    assert (cut.labels != -100).any(1).tolist() == [False, True]
    assert len(cut.pixel_values) == 2  # the first one's second image is gone
    assert torch.equal(cut.pixel_values[0], whole.pixel_values[0])
    assert torch.equal(cut.targets["gen"].values[0], whole.targets["gen"].values[0])
    with pytest.raises(OlaError, match="max_length: 19; an image with its task tokens takes 20 tokens"):
        make_loader(world, max_length=19)


def test_text_and_images_that_do_not_fit_are_named(
    world: Any, make_loader: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cube"}]
    monkeypatch.setattr("train.loader.conversation", lambda member, data: turns)
    with pytest.raises(OlaError, match=r"sample 's00': its text has 0 <image>, it has 1 images"):
        make_loader(world).read(np.array([0]))
