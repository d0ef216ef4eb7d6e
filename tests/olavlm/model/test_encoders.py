"""The multi-encoder baseline: teachers' features as more tokens of every image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from olavlm.errors import OlaError
from olavlm.model import OlaVlmConfig, OlaVlmForConditionalGeneration, OlaVlmProcessor, find_images, parameter_groups
from olavlm.model.export import export_plain, load_for_inference

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
ENCODERS = [{"name": "depth", "tokens": 4, "width": 6}, {"name": "style", "tokens": 1, "width": 5}]
TEXT = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=99)


@pytest.fixture
def fed(make_student: Callable[..., Student]) -> Student:
    return make_student(encoders=ENCODERS)


def features(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {e["name"]: torch.randn(n, e["tokens"], e["width"], generator=generator) for e in ENCODERS}  # type: ignore


def batch(processor: OlaVlmProcessor, questions: list[str], images: list[Image.Image]) -> dict[str, Any]:
    texts = [processor.prompt([{"from": "human", "value": question}]) for question in questions]
    found = dict(processor(text=texts, images=images))
    found.setdefault("pixel_values", None)
    return found


@given(
    tokens=st.lists(st.integers(1, 4), max_size=3),
    task_tokens=st.lists(st.integers(0, 3), max_size=2),
    image=st.integers(1, 5),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    pad=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_position_of_a_block_is_found_for_what_it_is(
    tokens: list[int], task_tokens: list[int], image: int, rows: list[int], pad: int
) -> None:
    """Whatever the encoders, tasks and images: the parts of each block in order, disjoint, and all of them special."""
    ids = iter(range(50, 99))
    config = OlaVlmConfig(
        text_config=TEXT,
        image_token_index=49,
        image_seq_length=image,
        encoders=[{"name": f"e{i}", "tokens": n, "width": 2} for i, n in enumerate(tokens)],
        encoder_token_ids={f"e{i}": next(ids) for i in range(len(tokens))},
        tasks=[{"name": f"t{i}", "kind": "pooled", "queries": 1, "width": 2, "task_tokens": n}
               for i, n in enumerate(task_tokens)],
        task_token_ids={f"t{i}": [next(ids) for _ in range(n)] for i, n in enumerate(task_tokens)},
    )  # fmt: skip
    assert len(config.image_block) == image + sum(tokens) + sum(task_tokens)
    sequences = [[5] * pad + [*config.image_block, 7] * count for count in rows]
    length = max(map(len, sequences)) + 1
    layout = find_images(torch.tensor([row + [0] * (length - len(row)) for row in sequences]), config)
    assert layout.row.tolist() == [i for i, count in enumerate(rows) for _ in range(count)]
    for number, own in enumerate(layout.image):
        start = pad + (number - sum(rows[: int(layout.row[number])])) * (len(config.image_block) + 1)
        assert own.nonzero()[:, 0].tolist() == list(range(start, start := start + image))
        if tokens:
            assert layout.fed is not None
            assert layout.fed[number].nonzero()[:, 0].tolist() == list(range(start, start := start + sum(tokens)))
        for i, count in enumerate(task_tokens):
            assert layout.columns[f"t{i}"][number].tolist() == list(range(start, start := start + count))
    assert int(layout.special.sum()) == sum(rows) * len(config.image_block)


@torch.no_grad()
def test_features_are_projected_and_stand_between_the_image_and_the_task_tokens(
    fed: Student, images: list[Image.Image]
) -> None:
    model, processor = fed
    ids = batch(processor, ["what <image> this"], images[:1])["input_ids"]
    names = processor.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    first = names.index("<image>")
    assert names[first + 16 : first + 22] == ["<depth_features>"] * 4 + ["<style_features>", "<gen_0>"]
    layout, given = find_images(ids, model.config), features(1)
    pixels = model.image_features(processor.pixel_values(images[:1]))
    embeds = model.embed(ids, layout, pixels, model.project_features(given, 1))[0]
    assert_close(embeds[first : first + 16], pixels[0])
    for name, start in (("depth", first + 16), ("style", first + 20)):
        up, gelu, down = model.encoder_projectors[name]
        assert_close(embeds[start : start + len(given[name][0])], down(gelu(up(given[name][0]))))
    assert_close(embeds[first + 21 : first + 23], model.task_tokens["gen"])


@torch.no_grad()
def test_each_image_is_read_with_its_own_features(fed: Student, images: list[Image.Image]) -> None:
    model, processor = fed
    together, given = batch(processor, ["<image> <image> what", "two", "<image> this"], images), features(3)
    out = model(**together, encoder_features=given, predict=True)
    other = features(3, seed=1)
    mixed = {name: torch.cat([of[:2], other[name][2:]]) for name, of in given.items()}
    changed = model(**together, encoder_features=mixed, predict=True)
    assert_close(changed.logits[:2], out.logits[:2])
    assert not torch.allclose(changed.logits[2], out.logits[2], atol=1e-3)
    alone = model(
        **batch(processor, ["<image> this"], images[2:]), encoder_features={n: of[2:] for n, of in given.items()}
    )
    assert_close(alone.logits[0], out.logits[2, -alone.logits.shape[1] :], atol=1e-4, rtol=1e-4)
    keys = find_images(together["input_ids"], model.config).key_mask(None, "depth")
    assert keys.sum(1).tolist() == [(together["input_ids"][row] < 18).sum() + 16 + 4 for row in (0, 0, 2)]


def test_every_projector_gets_a_gradient_even_from_text_alone(fed: Student, images: list[Image.Image]) -> None:
    model, processor = fed
    projector = [p for _, p in parameter_groups(model)["projector"]]
    assert len(projector) == 4 + 2 * 4
    for questions, pictures in ((["<image> what", "two"], images[:1]), (["what"], [])):
        model.zero_grad()
        inputs = batch(processor, questions, pictures)
        model(**inputs, encoder_features=features(len(pictures)) if pictures else None).logits.square().sum().backward()
        for parameter in projector:
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) is bool(pictures)


@torch.no_grad()
def test_generation_equals_decoding_step_by_step_without_a_cache(fed: Student, images: list[Image.Image]) -> None:
    model, processor = fed
    model.generation_config.eos_token_id = None  # go on to the end
    inputs, given = batch(processor, ["<image> <image> what", "two", "<image>"], images), features(3)
    ids = inputs["input_ids"]
    got = model.generate(**inputs, encoder_features=given, max_new_tokens=5)
    assert torch.equal(got, model.generate(**inputs, encoder_features=given, max_new_tokens=5, use_cache=False))
    mask = inputs["attention_mask"]
    for _ in range(5):
        logits = model(ids, inputs["pixel_values"], mask, encoder_features=given).logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    assert torch.equal(got, ids)


@torch.no_grad()
def test_every_beam_of_a_row_sees_the_features_of_its_images(fed: Student, images: list[Image.Image]) -> None:
    model, processor = fed
    model.generation_config.eos_token_id = None
    inputs, given = batch(processor, ["<image> <image> what", "<image> two", "what"], images), features(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pixels, tokens = model.image_features(inputs["pixel_values"]), model.project_features(given, 3)
    embeds = model.embed(ids, find_images(ids, model.config), pixels, tokens)
    expected = model.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=3, max_new_tokens=6)
    got = model.generate(**inputs, encoder_features=given, num_beams=3, max_new_tokens=6)
    assert torch.equal(got[:, ids.shape[1] :], expected)


@torch.no_grad()
def test_an_ordinary_folder(fed: Student, images: list[Image.Image], tmp_path: Path) -> None:
    for part in fed:
        part.save_pretrained(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_block == model.config.image_block == fed[0].config.image_block
    inputs, given = batch(processor, ["<image> what"], images[:1]), features(1)
    assert_close(model(**inputs, encoder_features=given).logits, fed[0](**inputs, encoder_features=given).logits)


def test_what_a_student_is_not_fed_is_as_without(make_student: Callable[..., Student]) -> None:
    """So that two students of one seed differ in what is compared, and in nothing else."""
    plain, fed = (make_student(seed=3, encoders=encoders)[0].state_dict() for encoders in ([], ENCODERS))
    added = {name for name in fed if name.startswith("encoder_projectors.")}
    assert plain.keys() == fed.keys() - added
    for name in plain:
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(plain[name], fed[name]), name


def test_what_needs_the_image_alone_refuses_a_student_that_is_fed(fed: Student, tmp_path: Path) -> None:
    with pytest.raises(OlaError, match=r"fed teachers' features \(depth, style\) has no form as a stock LLaVA"):
        export_plain(*fed, tmp_path / "plain")
    for part in fed:
        part.save_pretrained(tmp_path / "student")
    with pytest.raises(OlaError, match=r"student: this student is fed teachers' features \(depth, style\)"):
        load_for_inference(tmp_path / "student")
    assert not (tmp_path / "plain").exists()


def test_what_does_not_fit_is_refused(fed: Student, make_student: Callable[..., Student], images: Any) -> None:
    model, processor = fed
    inputs, given = batch(processor, ["<image> what", "<image>"], images[:2]), features(2)
    with pytest.raises(OlaError, match=r"encoder_features\.depth: missing; .* expected \(2, 4, 6\)"):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(OlaError, match=r"encoder_features\.style: missing"):
        model(**inputs, encoder_features={"depth": given["depth"]})
    for beams in (1, 2):
        with pytest.raises(OlaError, match=r"encoder_features\.depth: \(\d, 4, 6\); .* expected \(\d, 4, 6\)"):
            model.generate(**inputs, encoder_features=features(3), num_beams=beams, max_new_tokens=1)
    with pytest.raises(OlaError, match=r"encoder_features\.seg: this student is fed no such .* depth, style"):
        model(**inputs, encoder_features={**given, "seg": given["depth"]})
    plain, its_processor = make_student()
    with pytest.raises(OlaError, match=r"encoder_features\.depth: .* its encoders: none"):
        plain(**batch(its_processor, ["<image>"], images[:1]), encoder_features=features(1))
    with pytest.raises(OlaError, match="contains '<style_features>', the token of an encoder"):
        batch(processor, ["<style_features>"], [])
    with pytest.raises(OlaError, match="16 image tokens followed by 15 encoder and task tokens"):
        model(inputs["input_ids"][:, :30], inputs["pixel_values"], encoder_features=given)


@pytest.mark.parametrize(
    ("encoders", "ids", "message"),
    [
        ([{"name": "depth", "tokens": 4}], {"depth": 9}, "encoders.depth.width: missing"),
        (
            [{"name": "depth", "tokens": 0, "width": 2}],
            {"depth": 9},
            "encoders.depth.tokens: 0; expected an integer of",
        ),
        ([{"name": "depth", "tokens": 4, "with": 2}], {"depth": 9}, r"depth\.with: unknown key; did you mean 'width'"),
        ([ENCODERS[0], ENCODERS[0]], {"depth": 9}, "depth, depth names an encoder twice"),
        (["depth"], {"depth": 9}, "encoders: 'depth'; expected a list of dictionaries"),
        (ENCODERS, {"depth": 9}, "encoder_token_ids: depth; encoders: depth, style"),
        (ENCODERS, {"depth": 9, "style": 9}, "an id is used twice"),
        (ENCODERS, {"depth": 9, "style": 49}, "or is that of the image"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(encoders: list[Any], ids: dict[str, int], message: str) -> None:
    with pytest.raises(OlaError, match=message):
        OlaVlmConfig(text_config=TEXT, image_token_index=49, encoders=encoders, encoder_token_ids=ids)
