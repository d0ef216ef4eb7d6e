"""What ships in ``pipelines/demo_world/weights``: it loads the usual way, is small, and knows its world."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM, OneFormerForUniversalSegmentation, OneFormerProcessor

from olavlm.eval.cv_bench import build_prompt
from pipelines.demo_world.build import tell
from pipelines.demo_world.card import model_card
from pipelines.demo_world.features import decode, load_teachers, stored_targets
from pipelines.demo_world.gates import Measured
from pipelines.demo_world.make_teachers import GATES
from pipelines.demo_world.places import LAYOUT, layout, segment_names
from pipelines.demo_world.probes import miou
from pipelines.demo_world.questions import Question, deal_letters, text_only
from pipelines.demo_world.recipe import FULL, JOBS
from pipelines.demo_world.records import Record, sha256, weights_file
from pipelines.demo_world.samples import Samples, render_samples
from pipelines.demo_world.train_language import IGNORE, Chat, encode, hear

WEIGHTS = Path(__file__).parents[3] / "pipelines" / "demo_world" / "weights"
FOLDERS = ("depth", "seg", "gen/image_encoder", "student/vision", "student/llm")


@pytest.fixture(scope="module")
def unseen() -> Samples:
    return render_samples("gates", 100, seed=1, workers=1)


@pytest.fixture(scope="module")
def gates() -> Measured:
    return Measured(**json.loads((WEIGHTS / GATES).read_text()))


def test_all_together_stay_below_ten_megabytes() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 10e6


@pytest.mark.parametrize("folder", FOLDERS)
def test_stored_in_half_precision_safetensors(folder: str) -> None:
    config = json.loads((WEIGHTS / folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert (WEIGHTS / folder / "model.safetensors").is_file()


def test_every_training_left_its_record(gates: Measured) -> None:
    """What the card says is what lies there: hashes, gates, steps."""
    card = (WEIGHTS / "MODEL_CARD.md").read_text()
    records = {name: Record.read(WEIGHTS / job.folder) for name, job in JOBS.items()}
    for name, record in records.items():
        assert record is not None
        assert record.steps == FULL.steps[name]
        assert record.sha256 == sha256(weights_file(WEIGHTS / JOBS[name].folder))
    assert card == model_card(WEIGHTS, {n: r for n, r in records.items() if r}, gates, FULL.judge)


def test_the_gates_are_those_of_these_weights(unseen: Samples, gates: Measured) -> None:
    """A hundred scenes scatter by a few hundredths; another teacher, or none, would be farther off."""
    teachers = load_teachers(WEIGHTS)
    metres = decode(teachers["depth"], stored_targets(teachers["depth"], unseen))
    ratio = metres / torch.from_numpy(unseen.depth.astype(np.float32))
    delta1 = float((torch.maximum(ratio, 1 / ratio) < 1.25).float().mean())
    assert delta1 == pytest.approx(gates.outputs["depth: δ1, decoded target"], abs=0.05)

    labels = decode(teachers["seg"], stored_targets(teachers["seg"], unseen))
    labels = F.interpolate(labels[:, None].float(), size=(64, 64))[:, 0].long()
    found = miou(unseen.semantic.astype(np.int64), labels.numpy(), 7).mean()
    assert found == pytest.approx(gates.outputs["seg: mIoU, decoded target"], abs=0.07)


def test_targets_say_more_than_the_tower_and_boxes(gates: Measured) -> None:
    known = {"gen: objects of each colour and shape, R²"}  # the tower has been made to read objects, patch by patch
    for name, found in gates.probes.items():
        assert found["target"] > found["geometry"], name
        assert (found["target"] > found["tower"]) == (name not in known), name


def test_segmentation_teacher_runs_by_its_own_processor(unseen: Samples) -> None:
    model = OneFormerForUniversalSegmentation.from_pretrained(WEIGHTS / "seg", dtype=torch.float32).eval()
    processor = OneFormerProcessor.from_pretrained(WEIGHTS / "seg")
    inputs = processor(Image.fromarray(unseen.images[0]), ["semantic"], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 64)])
    assert (labels.numpy() == unseen.semantic[0]).mean() > 0.8


def test_generation_target_is_not_trivial_for_the_student(gates: Measured) -> None:
    teacher = json.loads((WEIGHTS / "gen" / "image_encoder" / "config.json").read_text())
    tower = json.loads((WEIGHTS / "student" / "vision" / "config.json").read_text())
    assert teacher["projection_dim"] == 96
    assert (tower["image_size"] // tower["patch_size"]) ** 2 == 64
    assert gates.outputs["gen: R² of the target, read from the tower"] < 0.9


def test_language_model_knows_every_word_of_the_world() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "student" / "llm")
    told = [t for chunk in tell("finetune", 100, 1, 1) for t in chunk]
    texts = [turn["value"].removeprefix("<image>\n") for t in told for turn in t.caption]
    texts += [q.prompt for t in told for q in t.questions]
    rng = np.random.default_rng(0)
    texts += [text for _ in range(50) for text in text_only(rng)]
    for text in texts:
        pieces = tokenizer.tokenize(text)
        assert not any(piece.startswith("##") for piece in pieces), pieces
        assert tokenizer.unk_token not in pieces


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which is left? (A) right (B) left", "left (B)"),
        ("Which is left? (A) left (B) right", "left (A)"),
        ("Which is below? (A) above (B) below", "below (B)"),
        ("Which number is larger, 2 or 5?", "The number 5 is larger."),
    ],
)
def test_language_model_answers_in_its_chat_format(question: str, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "student" / "llm")
    model = LlamaForCausalLM.from_pretrained(WEIGHTS / "student" / "llm", dtype=torch.float32).eval()
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    replies = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(replies[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer


def test_nothing_points_to_where_it_was_made() -> None:
    for file in WEIGHTS.rglob("*.json"):
        assert "/tmp" not in file.read_text()
        assert "/work" not in file.read_text()


def test_language_model_answers_from_maps_what_is_asked_of_pictures() -> None:
    """It must know numbers and all four directions before it sees: no student learns them in minutes."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "student" / "llm")
    model = LlamaForCausalLM.from_pretrained(WEIGHTS / "student" / "llm", dtype=torch.float32).eval()
    by_kind: dict[str, list[tuple[list[str], Question]]] = defaultdict(list)
    for told in itertools.chain(*tell("gates", 120, 1, 1)):
        seen = layout(told.rendering.panoptic, segment_names(told.scene, told.rendering))
        for question in told.questions:
            if question.task in ("Count", "Relation"):
                by_kind[question.kind].append((seen, question))
    assert len(by_kind) == 7
    for kind, pairs in by_kind.items():
        dealt = deal_letters([question for _, question in pairs[:60]], np.random.default_rng(0))
        rows = encode([asked_of_a_map(seen, q) for (seen, _), q in zip(pairs, dealt, strict=False)], tokenizer)
        with torch.no_grad():
            best = model(inputs_embeds=hear(model, rows.ids)).logits[:, :-1].argmax(-1)
        labels = rows.labels[:, 1:]
        ends = labels == tokenizer.eos_token_id
        right = float(((best == labels) | (labels == IGNORE) | ends).all(1).float().mean())
        assert right > (0.45 if kind == "objects" else 0.75), kind  # of all objects each has to be named, in order


def asked_of_a_map(seen: list[str], question: Question) -> Chat:
    cells = tuple(f"{cell} row{i // LAYOUT + 1} column{i % LAYOUT + 1}" for i, cell in enumerate(seen))
    return Chat(cells, 8, ((build_prompt(question.prompt).removeprefix("<image>\n"), question.reply),))
