"""The student: task tokens, predictions, generation, saving; and the published defects it must not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

from olavlm.errors import OlaError
from olavlm.model import (
    OlaVlmConfig,
    OlaVlmForConditionalGeneration,
    OlaVlmProcessor,
    TaskTargets,
    embedding_losses,
    find_images,
    parameter_groups,
)

Student = tuple[OlaVlmForConditionalGeneration, OlaVlmProcessor]
Predictions = dict[str, dict[int, Tensor]]


def batch(
    processor: OlaVlmProcessor, questions: list[str], images: list[Image.Image], left: bool = False, extra: int = 0
) -> dict[str, Tensor]:
    """Question–answer pairs, padded to the longest plus `extra`."""
    rows = [
        processor.encode_conversation([{"from": "human", "value": q}, {"from": "gpt", "value": "a red cube"}], 500)
        for q in questions
    ]
    length = max(len(row.input_ids) for row in rows) + extra

    def pad(row: Tensor, value: int) -> Tensor:
        padding = row.new_full((length - len(row),), value)
        return torch.cat([padding, row] if left else [row, padding])

    return {
        "input_ids": torch.stack([pad(row.input_ids, 0) for row in rows]),
        "labels": torch.stack([pad(row.labels, -100) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row.input_ids), 0) for row in rows]),
        "pixel_values": processor.pixel_values(images),
    }


def flat(predictions: Predictions) -> dict[str, Tensor]:
    return {f"{task}@{layer}": x for task, layers in predictions.items() for layer, x in layers.items()}


def loss_of(model: OlaVlmForConditionalGeneration, out: Any) -> Tensor:
    """A whole training loss: text and every embedding loss, against targets of ones."""
    targets = {}
    for task in model.config.task_configs:
        n = next(iter(out.predictions[task.name].values())).shape[0]
        values = torch.linspace(-1, 1, n * task.queries * task.width).view(n, task.queries, task.width)
        targets[task.name] = TaskTargets(values, torch.ones(n, dtype=torch.bool), values, torch.arange(n), n)
    weights = dict.fromkeys(targets, 0.5)
    return out.loss + embedding_losses(out.predictions, targets, model.logit_scales, weights, 0.3).total


@torch.no_grad()
def test_predictions_come_per_image_in_row_major_order(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    together = batch(processor, ["<image> what", "two", "<image> this <image> there"], images)
    out = model(**together, predict=True)
    assert {name: tuple(x.shape) for name, x in flat(out.predictions).items()} == {
        "gen@2": (3, 1, 12),
        "gen@4": (3, 1, 12),
        "depth@1": (3, 16, 20),
        "depth@3": (3, 16, 20),
        "seg@4": (3, 16, 8),
    }
    for rows, pictures in ((slice(0, 1), images[:1]), (slice(2, 3), images[1:])):
        kept = {k: v[rows] for k, v in together.items() if k != "pixel_values"}
        alone = model(**kept, pixel_values=processor.pixel_values(pictures), predict=True)
        first = 0 if rows.start == 0 else 1
        for name, expected in flat(alone.predictions).items():
            assert_close(flat(out.predictions)[name][first : first + len(pictures)], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_two_images_of_a_row_have_predictions_of_their_own(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> <image> what"], images[:2])
    for name, x in flat(model(**inputs, predict=True).predictions).items():
        assert not torch.allclose(x[0], x[1], atol=1e-4), name
    layout = find_images(inputs["input_ids"], model.config)
    read = layout.key_mask(inputs["attention_mask"], "depth") & layout.rows(layout.special)
    assert read.sum(1).tolist() == [16 + 4, 16 + 4]
    assert not (read[0] & read[1]).any()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_published_defect_5_padding_changes_no_prediction(
    student: Student, images: list[Image.Image], use_cache: bool, left: bool
) -> None:
    model, processor = student
    how = {"predict": True, "use_cache": use_cache}
    alone = model(**batch(processor, ["<image> what"], images[:1]), **how)
    padded = model(**batch(processor, ["<image> what"], images[:1], left=left, extra=9), **how)
    beside = model(
        **batch(processor, ["<image> what", "<image> " + "this is a ball " * 4], images[:2], left=left), **how
    )
    for other in (padded, beside):
        for name, expected in flat(alone.predictions).items():
            assert_close(flat(other.predictions)[name][:1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_left_and_right_padding_give_the_same_logits(
    student: Student, images: list[Image.Image], use_cache: bool
) -> None:
    model, processor = student
    questions = ["<image> what <image>", "one", "<image> this is a ball"]
    sides = [batch(processor, questions, images, left=left, extra=2) for left in (True, False)]
    left, right = (model(**inputs, use_cache=use_cache).logits[inputs["attention_mask"].bool()] for inputs in sides)
    assert_close(left, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_behind_the_tokens_leaves_attention_its_causal_kernel(
    student: Student, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = student
    seen = []

    def attend(
        query: Tensor, *args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Tensor:
        if query.shape[-2] != tower_tokens:
            seen.append((attn_mask is None, is_causal))
        return original(query, *args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    original = torch.nn.functional.scaled_dot_product_attention
    tower_tokens = 16 + 1
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for left in (False, True):
        model(**batch(processor, ["<image> what", "two"], images[:1], left=left), use_cache=False)
    depth = model.config.llm.num_hidden_layers
    assert seen == [(True, True)] * depth + [(False, False)] * depth


@torch.no_grad()
def test_published_defect_6_layers_do_not_shift_with_other_outputs(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> what"], images[:1])
    plain = model(**inputs, predict=True)
    model.set_attn_implementation("eager")
    more = model(**inputs, predict=True, output_attentions=True, output_hidden_states=True, use_cache=True)
    assert more.attentions is not None
    for name, expected in flat(plain.predictions).items():
        assert_close(flat(more.predictions)[name], expected, atol=1e-5, rtol=1e-4)
    with model.capture({1, 4}) as hidden:
        model(**inputs)
    assert_close(hidden[1], more.hidden_states[1])
    assert_close(hidden[4], model.model.language_model.norm(hidden_before_norm(model, inputs)), atol=1e-5, rtol=1e-4)


def hidden_before_norm(model: OlaVlmForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    seen = []
    handle = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_keys_are_the_text_the_image_and_its_own_task_tokens(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["what <image> this"], images[:1], extra=3)
    layout = find_images(inputs["input_ids"], model.config)
    names = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())

    def keys(task: str | None, read_text: bool) -> list[str]:
        mask = layout.key_mask(inputs["attention_mask"], task, read_text)
        return [name for name, kept in zip(names, mask[0], strict=True) if kept]

    before, image = ["<s>", "USER", ":", "what"], ["<image>"] * 16
    after = ["this", "ASSISTANT", ":", "a", "red", "cube", "</s>"]
    depth = [f"<depth_{i}>" for i in range(4)]
    assert keys("depth", True) == before + image + depth + after
    assert keys("depth", False) == before + image + depth
    assert keys(None, True) == before + image + after


@torch.no_grad()
def test_predictors_read_the_text_only_if_told_so(
    make_student: Callable[..., Student], images: list[Image.Image]
) -> None:
    for read in (True, False):
        model, processor = make_student(predictors_read_text=read)
        one = model(**batch(processor, ["<image> what"], images[:1]), predict=True)
        other = model(**batch(processor, ["<image> ball"], images[:1]), predict=True)
        for name, x in flat(one.predictions).items():
            assert torch.allclose(x, flat(other.predictions)[name], atol=1e-5) is not read


@torch.no_grad()
def test_task_tokens_are_inserted_behind_the_image(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    ids = batch(processor, ["<image> what"], images[:1])["input_ids"]
    layout = find_images(ids, model.config)
    features = model.image_features(processor.pixel_values(images[:1]))
    embeds = model.embed(ids, layout, features)[0]
    start = int(layout.image[0].nonzero()[0])
    assert_close(embeds[start : start + 16], features[0])
    assert_close(embeds[start + 16 : start + 18], model.task_tokens["gen"])
    depth = model.task_tokens["depth"]
    assert_close(embeds[start + 18 : start + 22], torch.stack([depth[4 * i : 4 * i + 4].mean(0) for i in range(4)]))
    words = model.get_input_embeddings()(ids[0])
    text = ~layout.special[0]
    assert_close(embeds[text], words[text])


def test_every_trained_parameter_gets_a_gradient_even_from_text_alone(
    student: Student, images: list[Image.Image]
) -> None:
    model, processor = student
    for questions, pictures in ((["<image> what", "two"], images[:1]), (["what", "two"], [])):
        model.zero_grad()
        out = model(**batch(processor, questions, pictures), predict=True)
        loss = loss_of(model, out)
        loss.backward()
        for part, parameters in parameter_groups(model).items():
            for name, parameter in parameters:
                if part != "vision_tower":
                    assert parameter.grad is not None, name
                    assert parameter.grad.isfinite().all(), name
                    learns = bool(pictures) or part == "language_model"
                    assert bool(parameter.grad.any()) is learns or part == "logit_scales", name
    assert_close(loss, out.loss)  # published defect 4: NaN there


def test_published_defect_1_embedding_losses_are_not_zero(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    out = model(**batch(processor, ["<image> what", "<image> this"], images[:2]), predict=True)
    assert loss_of(model, out).item() > out.loss.item() + 0.1


def test_published_defect_7_no_layer_is_dropped_and_no_weight_ignored(
    make_student: Callable[..., Student], images: list[Image.Image]
) -> None:
    """Published: of "d8-16-20" only two layers are used, and a weight without a decimal point is none."""
    depth = {"name": "depth", "kind": "dense", "queries": 16, "width": 20, "task_tokens": 4}
    model, processor = make_student([depth | {"layers": [1, 2, 4]}])
    out = model(**batch(processor, ["<image> what"], images[:1]), predict=True)
    assert list(out.predictions["depth"]) == [1, 2, 4]
    targets = {"depth": TaskTargets.of_batch(torch.zeros(1, 16, 20))}
    losses = embedding_losses(out.predictions, targets, dict(model.logit_scales.items()), {"depth": 1}, 0.0)
    assert len(losses.parts) == 3
    assert_close(losses.total, sum(losses.parts.values()))
    for layers in ("8-16-20", 8, ["8"], [8.0]):
        with pytest.raises(OlaError, match=r"tasks.depth.layers"):
            make_student([depth | {"layers": layers}])


def test_pixel_values_may_be_empty_or_absent_without_images(student: Student) -> None:
    model, processor = student
    inputs = batch(processor, ["what"], [])
    expected = model(**inputs).logits
    inputs["pixel_values"] = None  # type: ignore[assignment]
    assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(student: Student, images: list[Image.Image], reentrant: bool) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> what", "<image> this"], images[:2])
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model, model(**inputs, predict=True, use_cache=False)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients().items():
        assert_close(grad, plain[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, hidden by it
def test_compiled() -> None:
    """With and without predictors, in turns; from embeddings, as compiling the vision tower too takes twice as long."""
    config = OlaVlmConfig(
        text_config=LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        ),
        image_token_index=39,
        image_seq_length=4,
        tasks=[{"name": "gen", "kind": "pooled", "queries": 1, "width": 6, "layers": [1], "task_tokens": 2}],
        task_token_ids={"gen": [40, 41]},
    )
    model = OlaVlmForConditionalGeneration(config)
    ids = torch.tensor([[1, 2, *config.image_block, 5, 6], [3, *config.image_block, 5, 6, 0]])
    embeds = model.embed(ids, find_images(ids, config), model.image_features(torch.randn(2, 3, 8, 8)))
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "inputs_embeds": embeds.detach()}
    compiled = torch.compile(model, backend="eager")
    for predict in (True, False):
        got, expected = compiled(**inputs, predict=predict), model(**inputs, predict=predict)
        assert_close(got.logits, expected.logits)
    prediction = compiled(**inputs, predict=True).predictions["gen"][1]
    assert_close(prediction, model(**inputs, predict=True).predictions["gen"][1])
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(prediction.square().sum(), [weight])
    assert gradient.any()


def test_published_defect_9_task_tokens_in_bf16_are_saved_loaded_and_trained(
    make_student: Callable[..., Student], images: list[Image.Image], tmp_path: Path
) -> None:
    model, processor = make_student(dtype=torch.bfloat16)
    inputs = batch(processor, ["<image> what", "<image> this"], images[:2])
    names = {name for name, _ in model.named_parameters() if name.startswith("task_tokens.")}
    assert names == {"task_tokens.gen", "task_tokens.depth", "task_tokens.seg"}
    before = {name: table.clone() for name, table in model.task_tokens.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    out = model(**inputs, predict=True)
    loss = loss_of(model, out)
    loss.backward()
    optimizer.step()
    assert out.logits.dtype == torch.bfloat16
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, table in again.task_tokens.items():
        assert table.dtype == torch.bfloat16
        assert_close(table, model.task_tokens[name])
        assert not torch.equal(table, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_fp32_and_trains(
    make_student: Callable[..., Student], images: list[Image.Image], dtype: torch.dtype
) -> None:
    model, processor = make_student(dtype=dtype)
    exact, _ = make_student()
    inputs = batch(processor, ["<image> what", "<image> this"], images[:2])
    out = model(**inputs, predict=True)
    expected = exact(**inputs, predict=True)
    assert out.logits.dtype == dtype
    for name, x in flat(out.predictions).items():
        assert x.dtype == dtype
        assert_close(x.float(), flat(expected.predictions)[name], atol=0.15, rtol=0.1)
    loss = loss_of(model, out)
    assert_close(loss, loss_of(exact, expected), atol=0.05, rtol=0.02)
    loss.backward()
    for part, parameters in parameter_groups(model).items():
        for name, parameter in parameters:
            if part != "vision_tower":
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


def test_bf16_autocast_over_fp32_weights(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> what", "<image> this"], images[:2])
    exact = flat(model(**inputs, predict=True).predictions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs, predict=True)
        loss = loss_of(model, out)
    loss.backward()
    for name, x in flat(out.predictions).items():
        assert_close(x.float(), exact[name], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("tie", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16), (False, torch.float16)]
)
@torch.no_grad()
def test_round_trip(
    make_student: Callable[..., Student], images: list[Image.Image], tmp_path: Path, tie: bool, dtype: torch.dtype
) -> None:
    model, processor = make_student(tie=tie, dtype=dtype)
    inputs = batch(processor, ["<image> what", "two"], images[:1])
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)  # in the dtype it was saved in
    assert isinstance(again, OlaVlmForConditionalGeneration)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), OlaVlmConfig)
    assert again.config.task_configs == model.config.task_configs
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tie
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert_close(tensor, state[name], atol=0, rtol=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    first, second = model(**inputs, predict=True), again(**inputs, predict=True)
    assert_close(second.logits, first.logits)
    for name, x in flat(second.predictions).items():
        assert_close(x, flat(first.predictions)[name])
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens


def test_parts_missing_from_a_checkpoint_are_initialised_like_new_where_told_so(
    student: Student, make_student: Callable[..., Student], tmp_path: Path
) -> None:
    model, _ = student
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("task_tokens", "predictors.gen", "logit"))}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(5)
    again, _ = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert_close(again.task_tokens["depth"].std(), torch.tensor(1.0), atol=0.15, rtol=0)
    assert_close(again.logit_scales["gen"].data, torch.tensor([2.0]))
    assert_close(again.predictors["depth"]["1"].project_in.weight, model.predictors["depth"]["1"].project_in.weight)
    fresh = again.predictors["gen"]["2"].project_in.weight
    assert fresh.abs().max() <= 32**-0.5  # uniform within 1 / √fan_in
    assert fresh.std() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_tokens.gen": None, "logit_scales.seg": None}, "lacks 2 tensors, among them logit_scales.seg$"),
        ({"teacher.weight": (3,)}, "has 1 unknown tensors, among them teacher.weight$"),
        ({"task_tokens.gen": (3, 32)}, r"task_tokens.gen is \(3, 32\), expected \(2, 32\)$"),
        ({"task_tokens.gen": None, "more": (1,)}, "lacks 1 tensors, among them task_tokens.gen; has 1 unknown"),
    ],
)
def test_a_checkpoint_that_is_not_exactly_the_models_is_refused(
    student: Student, tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    model, _ = student
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if name not in change}
    state |= {name: torch.zeros(shape) for name, shape in change.items() if shape is not None}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(OlaError, match=f"^{tmp_path}: .*{message}"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_torn_checkpoint_is_refused(student: Student, tmp_path: Path) -> None:
    student[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OlaError, match=f"^{tmp_path}: cannot be loaded, a file of weights is damaged"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_configuration_without_predictors_leaves_those_of_the_checkpoint_unread(
    student: Student, tmp_path: Path
) -> None:
    model, _ = student
    model.save_pretrained(tmp_path)
    config = OlaVlmConfig.from_pretrained(tmp_path)
    config.tasks = [task | {"layers": []} for task in config.tasks or []]
    again = OlaVlmForConditionalGeneration.from_pretrained(tmp_path, config=config)
    assert again.state_dict().keys() == {n for n in model.state_dict() if not n.startswith("predictors.")}
    config.tasks[1]["layers"] = [1]  # of two
    with pytest.raises(OlaError, match=r"has \d+ unknown tensors, among them predictors.depth.3"):
        OlaVlmForConditionalGeneration.from_pretrained(tmp_path, config=config)


@torch.no_grad()
def test_generation_equals_decoding_step_by_step_without_a_cache(student: Student, images: list[Image.Image]) -> None:
    """A batch of one image, no image, several turns with two images: row by row, each new token from the whole row."""
    model, processor = student
    talks = [["<image> what is this"], ["two"], ["<image> there", "a red ball", "what <image> is this"]]
    speakers = ["human", "gpt", "human"]
    texts = [
        processor.prompt([{"from": who, "value": value} for who, value in zip(speakers, talk, strict=False)])
        for talk in talks
    ]
    model.generation_config.eos_token_id = None  # go on to the end
    inputs = processor(text=texts, images=images)
    got = model.generate(**inputs, max_new_tokens=7)[:, inputs["input_ids"].shape[1] :]
    suppressed = model.generation_config.suppress_tokens
    for row, (text, picture) in enumerate(zip(texts, (images[:1], [], images[1:]), strict=True)):
        one = processor(text=text, images=picture)
        ids = one["input_ids"]
        for _ in range(7):
            logits = model(input_ids=ids, pixel_values=one.get("pixel_values")).logits[:, -1]
            logits[:, suppressed] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert_close(got[row], ids[0, one["input_ids"].shape[1] :])


@torch.no_grad()
def test_every_beam_of_a_row_sees_all_of_its_images(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    model.generation_config.eos_token_id = None
    prompts = [processor.prompt([{"from": "human", "value": text}]) for text in ("<image> <image> what", "<image> two")]
    inputs = processor(text=[*prompts, "what"], images=images)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    embeds = model.embed(ids, find_images(ids, model.config), model.image_features(pixels))
    mask = inputs["attention_mask"]
    expected = model.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=3, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, num_beams=3, max_new_tokens=6)[:, ids.shape[1] :], expected)


@torch.no_grad()
def test_generate_runs_no_predictor_and_writes_no_marker(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    for predictors in model.predictors.values():
        for predictor in predictors.values():
            predictor.register_forward_hook(lambda *_: pytest.fail("a predictor ran"))
    markers = model.config.image_block
    model.lm_head.weight[markers] = 100 * model.lm_head.weight[5]  # tempting
    inputs = processor(text=processor.prompt([{"from": "human", "value": "<image>"}]), images=images[:1])
    reply = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert not set(reply.tolist()) & set(markers)


@torch.no_grad()
def test_without_task_tokens_predictors_own_their_latents(
    make_student: Callable[..., Student], images: list[Image.Image]
) -> None:
    tasks = [
        {"name": "gen", "kind": "pooled", "queries": 1, "width": 12, "layers": [2], "task_tokens": 0},
        {
            "name": "depth",
            "kind": "dense",
            "queries": 9,
            "width": 20,
            "layers": [4],
            "task_tokens": 0,
            "depth_mlps": True,
        },
    ]
    model, processor = make_student(tasks)
    assert model.predictors["depth"]["4"].latents.shape == (1, 9, 20)
    assert not model.task_tokens
    out = model(**batch(processor, ["<image> what", "<image>"], images[:2]), predict=True)
    assert out.predictions["depth"][4].shape == (2, 9, 20)
    assert out.predictions["gen"][2].shape == (2, 1, 12)


def test_the_plain_baseline_has_no_task_at_all(make_student: Callable[..., Student], images: list[Image.Image]) -> None:
    model, processor = make_student([])
    out = model(**batch(processor, ["<image> what"], images[:1]), predict=True)
    assert out.predictions == {}
    assert out.loss.isfinite()


def test_given_embeddings_are_used_as_they_are(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> what"], images[:1])
    pixels = inputs.pop("pixel_values")
    embeds = model.embed(
        inputs["input_ids"], find_images(inputs["input_ids"], model.config), model.image_features(pixels)
    )
    expected = model(**inputs, pixel_values=pixels, predict=True)
    got = model(**inputs, inputs_embeds=embeds, predict=True)
    assert_close(got.logits, expected.logits)
    for name, x in flat(got.predictions).items():
        assert_close(x, flat(expected.predictions)[name])


def test_what_does_not_fit_is_refused(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = batch(processor, ["<image> what", "<image> this"], images[:2])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with pytest.raises(OlaError, match="pixel_values: 1 images; the input_ids have room for 2"):
        model(input_ids=ids, pixel_values=pixels[:1])
    with pytest.raises(OlaError, match="pixel_values: 0 images"):
        model(input_ids=ids)
    with pytest.raises(OlaError, match="do not form whole blocks of 16 image tokens followed by 10 task tokens"):
        model(input_ids=ids[:, :22], pixel_values=pixels)
    stray = ids.clone()
    stray[0, -1] = model.config.image_block[-1]
    with pytest.raises(OlaError, match="32 image tokens and 21 task tokens"):
        model(input_ids=stray, pixel_values=pixels)
    with pytest.raises(OlaError, match="neither input_ids nor inputs_embeds"):
        model()
    with pytest.raises(OlaError, match="input_ids missing"):
        model(inputs_embeds=torch.zeros(1, 4, 32), predict=True)
    with pytest.raises(OlaError, match="attention_mask: shape"):
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones(2, 5), predict=True)
    with pytest.raises(OlaError, match=r"input_ids: shape \(2, \d+\); expected that of the inputs_embeds, \(1, 4\)"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 4, 32), predict=True)
    with pytest.raises(OlaError, match=r"layers: \[2, 5\]; expected numbers from 1 to 4"), model.capture({2, 5}):
        pass


def test_a_prompt_beyond_the_context_is_refused(student: Student, images: list[Image.Image]) -> None:
    model, processor = student
    inputs = processor(text=processor.prompt([{"from": "human", "value": "<image> what"}]), images=images[:1])
    length = inputs["input_ids"].shape[1]
    model.config.llm.max_position_embeddings = length
    model.generate(**inputs, max_new_tokens=1)
    model.config.llm.max_position_embeddings = length - 1
    with pytest.raises(OlaError, match=f"input_ids: {length} tokens; the language model's context has {length - 1}"):
        model.generate(**inputs, max_new_tokens=1)


def test_parameter_groups_name_every_parameter_a_loss_can_reach(student: Student) -> None:
    model, _ = student
    groups = parameter_groups(model)
    assert list(groups) == ["vision_tower", "projector", "language_model", "task_tokens", "predictors", "logit_scales"]
    named = [name for parameters in groups.values() for name, _ in parameters]
    assert len(set(named)) == len(named)
    left_out = set(dict(model.named_parameters())) - set(named)
    assert {name.split(".")[3] for name in left_out} == {"linear_2", "linear_3"}
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in left_out)


def test_published_defect_8_nothing_of_a_teacher_is_in_the_student(student: Student) -> None:
    model, _ = student
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "model",
        "lm_head",
        "task_tokens",
        "predictors",
        "logit_scales",
    }
