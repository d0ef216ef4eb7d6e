"""What the student reads: expansion of images, labels, cuts, pixels."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from transformers import AutoProcessor

from olavlm.data.images import apply_view, decode_image
from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
BLOCK = 16 + 2 + 4 + 4
CHATML = (
    "{% for message in messages %}<s> {{ message['role'] }} : {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
CHANGING = "{% for message in messages %}{{ loop.length }} {{ message['content'] }}{% endfor %}"


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def learned(processor: OlaVlmProcessor, labels: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(labels[labels != -100]))


@pytest.fixture(scope="module")
def processor(make_student: Callable[..., Student]) -> OlaVlmProcessor:
    return make_student()[1]


def test_every_image_becomes_image_tokens_and_task_tokens_in_order(processor: OlaVlmProcessor) -> None:
    ids, labels, _ = processor.encode_conversation(
        talk("<image> what is this", "a cube", "<image> this", "a ball"), 500
    )
    names = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    block = ["<image>"] * 16 + [f"<{task}_{i}>" for task, n in (("gen", 2), ("depth", 4), ("seg", 4)) for i in range(n)]
    assert names[: 3 + BLOCK + 3] == ["<s>", "USER", ":", *block, "what", "is", "this"]
    assert names.count("<image>") == 32
    assert processor.images_in(ids) == 2
    assert labels.shape == ids.shape


def test_only_answers_and_what_ends_them_are_learned(processor: OlaVlmProcessor) -> None:
    _, labels, _ = processor.encode_conversation(talk("<image> what is this", "a cube", "what", "a ball"), 500)
    assert learned(processor, labels) == "a cube </s> a ball </s>"


def test_a_template_of_the_language_models_own(make_language_model: Callable[..., str], tower: str) -> None:
    from olavlm.model import build_student

    _, processor = build_student(tower, make_language_model(chat_template=CHATML), [])
    ids, labels, _ = processor.encode_conversation(talk("what", "a cube", "this", "one two"), 500)
    assert learned(processor, labels) == "a cube </s> one two </s>"
    prompt = processor(text=processor.prompt(talk("what")))["input_ids"][0]
    assert_close(prompt, ids[: len(prompt)])  # a reply continues exactly what training showed


def test_answers_that_cannot_be_told_from_questions_are_refused(
    make_language_model: Callable[..., str], tower: str
) -> None:
    from olavlm.model import build_student

    _, processor = build_student(tower, make_language_model(chat_template=CHANGING), [])
    with pytest.raises(OlaError, match="chat_template"):
        processor.encode_conversation(talk("what", "a cube", "this", "one two"), 500)


def test_long_conversations_are_cut_at_a_turn(processor: OlaVlmProcessor) -> None:
    turns = talk("<image> what", "a cube", "what is this", "a red ball", "this", "one")
    whole, _, _ = processor.encode_conversation(turns, 500)
    shorter, labels, lost = processor.encode_conversation(turns, len(whole) - 1)
    two, _, _ = processor.encode_conversation(turns[:4], 500)
    assert_close(shorter, two)
    assert learned(processor, labels) == "a cube </s> a red ball </s>"
    assert lost == 1


def test_a_first_answer_that_does_not_fit_is_cut_inside(processor: OlaVlmProcessor) -> None:
    turns = talk("<image> what", "a red cube and a blue ball", "this", "one")
    question = len(processor(text=processor.prompt(turns[:1]), images=[Image.new("RGB", (8, 8))])["input_ids"][0])
    ids, labels, lost = processor.encode_conversation(turns, question + 2)
    assert len(ids) == question + 2
    assert lost == 2  # what is cut inside counts
    assert learned(processor, labels) == "a red"


def test_a_question_without_room_for_an_answer_is_cut_but_never_inside_an_image(processor: OlaVlmProcessor) -> None:
    turns = talk("<image> what is this <image> this", "a cube", "what", "one")
    whole, labels, _ = processor.encode_conversation(turns, 500)
    block, starts = len(processor.image_block), [3, 3 + len(processor.image_block) + 3]  # behind <s> USER :
    for room in range(1, int((labels != -100).nonzero()[0]) + 1):
        ids, learnable, lost = processor.encode_conversation(turns, room)
        split = [start for start in starts if start < room < start + block]
        assert len(ids) == (split[0] if split else room)
        assert_close(ids, whole[: len(ids)])
        assert processor.images_in(ids) == sum(start + block <= room for start in starts)
        assert learned(processor, learnable) == ""
        assert lost == 2


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(
        st.lists(st.sampled_from(["a", "red", "cube", "one"]), min_size=1, max_size=6), min_size=1, max_size=5
    ),
    room=st.integers(40, 90),
)
def test_a_cut_conversation_is_a_prefix(processor: OlaVlmProcessor, answers: list[list[str]], room: int) -> None:
    turns = talk(*(text for i, a in enumerate(answers) for text in ("what" if i else "<image> what", " ".join(a))))
    whole, labels, _ = processor.encode_conversation(turns, 10_000)
    cut, cut_labels, lost = processor.encode_conversation(turns, room)
    assert 0 < len(cut) <= room
    assert_close(cut, whole[: len(cut)])
    assert_close(cut_labels, labels[: len(cut)])
    trained = labels != -100
    assert_close(labels[trained], whole[trained])
    assert int(trained.sum()) == sum(len(a) + 1 for a in answers)
    ends = np.cumsum([len(a) + 1 for a in answers])
    assert lost == int((ends > int((cut_labels != -100).sum())).sum())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no answer in 0 turns"),
        (talk("what"), "no answer in 1 turns"),
        ([{"from": "robot", "value": "what"}], "turn 1.*expected from 'human' or 'gpt'"),
        ([{"from": "human"}], "turn 1"),
        (talk("what <depth_1>", "a cube"), "'<depth_1>', a task token"),
    ],
)
def test_conversations_that_make_no_sample_are_refused(
    processor: OlaVlmProcessor, turns: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(OlaError, match=message):
        processor.encode_conversation(turns, 100)


def test_a_question_left_open_at_the_end_is_left_out(processor: OlaVlmProcessor) -> None:
    answered, _, _ = processor.encode_conversation(talk("what", "a cube"), 100)
    open_end, _, _ = processor.encode_conversation(talk("what", "a cube", "this"), 100)
    assert_close(open_end, answered)


@pytest.mark.parametrize("view", ["squash", "pad", "center_crop"])
def test_pixels_are_the_view_normalised(processor: OlaVlmProcessor, images: list[Image.Image], view: Any) -> None:
    before, processor.view = processor.view, view
    try:
        values = processor.pixel_values(images)
    finally:
        processor.view = before
    assert values.shape == (3, 3, 32, 32)
    assert values.dtype == torch.float32
    seen = np.asarray(apply_view(images[0], view, 32)) / 255
    expected = (seen - processor.image_processor.image_mean) / processor.image_processor.image_std
    assert_close(values[0], torch.from_numpy(expected).permute(2, 0, 1).float())
    assert processor.pixel_values([]).shape == (0, 3, 32, 32)


def test_an_opened_image_is_seen_as_in_training(processor: OlaVlmProcessor) -> None:
    """A photograph that lies on its side, a drawing without a background, 16-bit grey."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = [
        (Image.fromarray(noise[..., :3]), "JPEG", {"exif": exif}),
        (Image.fromarray(noise), "PNG", {}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 256), "PNG", {}),
    ]
    for image, kind, options in sources:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        expected = processor.pixel_values([decode_image(buffer.getvalue())])
        assert torch.equal(processor.pixel_values([Image.open(buffer)]), expected)


def test_a_batch_for_generation_is_padded_on_the_left(processor: OlaVlmProcessor, images: list[Image.Image]) -> None:
    texts = [processor.prompt(talk("<image> what is this")), processor.prompt(talk("what"))]
    batch = processor(images=images[:1], text=texts)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    shorter = batch["attention_mask"][1]
    assert shorter.sum() == len(processor(text=texts[1])["input_ids"][0])
    assert_close(shorter, shorter.sort().values)


def test_images_and_placeholders_must_match(processor: OlaVlmProcessor, images: list[Image.Image]) -> None:
    with pytest.raises(OlaError, match="images: 2 given; the texts have 1 <image>"):
        processor(text="<image> what", images=images[:2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"padding": "max_length"}, "padding: 'max_length'; expected True or 'longest'"),
        ({"return_tensors": "np"}, "return_tensors: 'np'; expected 'pt'"),
        ({"videos": [1]}, r"videos: \[1\]; expected images and text only"),
        ({"images": np.zeros((4, 4, 3))}, "images: ndarray; expected PIL images"),
    ],
)
def test_what_a_processor_does_not_do_is_refused(
    processor: OlaVlmProcessor, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(OlaError, match=message):
        processor(text="what", **kwargs)


def test_messages_as_transformers_has_them(processor: OlaVlmProcessor, images: list[Image.Image]) -> None:
    """Contents in parts, images in lists for each text or in the messages themselves; the saved template likewise."""
    image, text = {"type": "image", "image": images[0]}, {"type": "text", "text": "what is this"}
    parts = [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cube"}]},
        {"role": "user", "content": "this"},
    ]
    turns = [
        {"from": "human", "value": "<image>\nwhat is this"},
        {"from": "gpt", "value": "a cube"},
        {"from": "human", "value": "this"},
    ]
    prompt = processor.prompt(turns)
    assert processor.apply_chat_template(parts, add_generation_prompt=True) == prompt
    expected = processor(images=images[:1], text=[prompt])
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    for got in (
        processor(images=images[0], text=prompt, padding=True, return_tensors="pt"),
        processor(images=[[images[0]]], text=[prompt]),
        processor.apply_chat_template(parts, return_tensors="pt", **options),
        processor.apply_chat_template([parts], return_tensors="pt", padding=True, **options),
    ):
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name])


def test_round_trip(make_student: Callable[..., Student], images: list[Image.Image], tmp_path: Path) -> None:
    _, processor = make_student(view="pad")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, OlaVlmProcessor)
    assert (again.view, again.image_block) == ("pad", processor.image_block)
    assert again.chat_template == processor.chat_template
    turns = talk("<image> what is this", "a cube")
    for got, expected in zip(
        again.encode_conversation(turns, 100)[:2], processor.encode_conversation(turns, 100)[:2], strict=True
    ):
        assert_close(got, expected)
    assert_close(again.pixel_values(images), processor.pixel_values(images))
