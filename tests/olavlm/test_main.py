"""The student's command line."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import logging

from olavlm import cli
from olavlm.__main__ import main
from olavlm.chat import Chat, load_image
from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration
from olavlm.model.export import load_for_inference
from olavlm.model.published import published_name

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def student(tiny_student: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a student that talks."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny_student:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (40, 30), "red").save(file)
    return file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line: exit code, stdout, stderr."""
    verbosity = logging.get_verbosity()

    def run(*arguments: Any, stdin: Any = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["olavlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        code = cli.run(main)
        return code, *capsys.readouterr()

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


class Terminal:
    """A stdin that is a terminal: gives lines, then raises what ends it."""

    def __init__(self, *lines: str, end: type[BaseException]) -> None:
        self.lines, self.end = list(lines), end

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        if not self.lines:
            raise self.end
        return self.lines.pop(0) + "\n"


def reply(student: Path, picture: Path, turns: list[dict[str, str]], max_new_tokens: int = 8) -> str:
    """What the whole student answers to a conversation."""
    model = OlaVlmForConditionalGeneration.from_pretrained(student)
    _, processor = load_for_inference(student)
    inputs = processor(images=[load_image(picture)], text=processor.prompt(turns))
    out = model.generate(**inputs, max_new_tokens=max_new_tokens)
    answer: str = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def test_one_question_for_scripts(run: Run, student: Path, picture: Path) -> None:
    expected = reply(student, picture, [human("<image>\nHow many chair ?")])
    assert expected
    found = run("chat", student, picture, "--once", "How many chair ?", "--max-new-tokens", 8)
    assert found == (0, expected + "\n", "")


def test_the_readmes_own_code_gives_the_reply_alone(student: Path, picture: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.partition("## The student in your own code")[2].split("```")[1].removeprefix("python\n")
    names: dict[str, Any] = {"image": load_image(picture)}
    exec(code.replace("runs/demo/finetune/model", str(student)), names)
    assert names["reply"].strip() == reply(student, picture, [human("<image>\nDescribe the image.")], 64)


def test_one_question_per_line_with_the_history_kept(run: Run, student: Path, picture: Path) -> None:
    first = reply(student, picture, [human("<image>\nHow many chair ?")])
    turns = [human("<image>\nHow many chair ?"), {"from": "gpt", "value": first}, human("table ?")]
    second = reply(student, picture, turns)
    assert second != reply(student, picture, [human("<image>\ntable ?")])  # the history matters
    code, out, err = run("chat", student, picture, "--max-new-tokens", 8, stdin="How many chair ?\n\n  \ntable ?\n")
    assert (code, out, err) == (0, f"{first}\n{second}\n", "")


@pytest.mark.parametrize(("end", "code"), [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_ctrl_d_and_ctrl_c_leave_cleanly(
    run: Run, student: Path, picture: Path, end: type[BaseException], code: int
) -> None:
    expected = reply(student, picture, [human("<image>\ntable ?")])
    terminal = Terminal("<image> again", "table ?", end=end)
    found, out, err = run("chat", student, picture, "--max-new-tokens", 8, stdin=terminal)
    assert found == code
    assert out == f"One question per line; Ctrl-D ends.\n> > {expected}\n> \n"
    assert err == "error: images: 1 given; the texts have 2 <image>\n"  # told, and the conversation goes on


def test_a_question_that_cannot_be_asked_ends_a_pipe(run: Run, student: Path, picture: Path) -> None:
    code, _, err = run("chat", student, picture, stdin="what is <gen_0>\n")
    assert code == 2
    assert err == "error: text: contains '<gen_0>', a task token\n"


def test_no_predictor_is_loaded(student: Path, tiny_student: tuple[Any, Any]) -> None:
    model, processor = load_for_inference(student)
    assert not list(model.predictors.parameters())
    assert model.config.image_block == tiny_student[0].config.image_block == processor.image_block
    state = tiny_student[0].state_dict()
    assert {name for name in state if not name.startswith("predictors.")} == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_context_has_an_end(student: Path, picture: Path) -> None:
    model, processor = load_for_inference(student)
    chat = Chat(model, processor, load_image(picture))
    length = len(processor(images=[chat.image], text=processor.prompt([human("<image>\ntable")]))["input_ids"][0])
    model.config.llm.max_position_embeddings = length
    with pytest.raises(OlaError, match=f"the conversation takes {length} tokens; the model reads at most {length}"):
        chat.ask("table", 8)
    assert not chat.turns
    model.config.llm.max_position_embeddings = length + 1
    assert len(processor.tokenizer(chat.ask("table", 8)).input_ids) <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; expected an image"),
        (b"text", "not an image in a known format"),
        (b"", "empty"),
    ],
)
def test_an_image_that_is_none(run: Run, student: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "image.png"
    if content is not None:
        file.write_bytes(content)
    code, out, err = run("chat", student, file, "--once", "table ?")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}: {message}")
    assert err.count("\n") == 1


def test_a_model_that_is_none(run: Run, student: Path, picture: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        code, out, err = run("chat", tmp_path, picture, "--once", "table ?")
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1

    refused("no model here, config.json is missing")
    (tmp_path / "config.json").write_text('{"model_type": "ola_llama"}')
    refused("model_type: 'ola_llama'; expected 'ola_vlm' (published checkpoints are converted first")
    (tmp_path / "config.json").write_bytes((student / "config.json").read_bytes())
    refused("cannot be loaded")
    for file in student.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = OlaVlmForConditionalGeneration.from_pretrained(student).state_dict()
    save_file(
        {n: t for n, t in state.items() if n != "lm_head.weight"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    refused("lacks 1 tensors, among them lm_head.weight")
    save_file(state | {"teacher.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused("has 1 unknown tensors, among them teacher.weight")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be loaded")


def test_convert_and_export(run: Run, tiny_student: tuple[Any, Any], picture: Path, tmp_path: Path) -> None:
    model, _ = tiny_student
    text, vision = model.config.llm, model.config.vision_config
    published, tower, ours = tmp_path / "published", tmp_path / "tower", tmp_path / "ours"
    published.mkdir()
    state = {published_name(n, {"gen": [1]}): t.clone() for n, t in model.state_dict().items()}
    save_file(state | {"oneformer.weight": torch.ones(1)}, published / "model.safetensors")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    gen = {"num_tokens": 1, "output_dim": 8, "img_layer_indices": "1"}
    config = {key: getattr(text, key) for key in keys} | {"model_type": "ola_llama", "mm_projector_type": "mlp2x_gelu"}
    config |= {"aux_mode": "gen", "num_task_tokens": 2, "task_token_format": "expand_emb", "image_gen": gen}
    (published / "config.json").write_text(json.dumps(config))
    vision.save_pretrained(tower)
    code, out, err = run("convert", published, ours, "--vision-tower", tower)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{len(state)} tensors kept",
        "1 dropped: segmentation teacher (OneFormer)",
        f"every name is in {ours / 'conversion.json'}",
    ]
    assert run("convert", published, ours, "--vision-tower", tower)[0] == 2  # already there

    code, _, err = run("export", "--plain", ours, tmp_path / "plain")
    assert code == 2
    assert f"{ours}: cannot be loaded" in err  # there was no tokenizer to make a processor of


def test_export(run: Run, student: Path, tmp_path: Path) -> None:
    code, out, err = run("export", "--plain", student, tmp_path / "plain")
    assert (code, err) == (0, "")
    assert out.endswith("write for every image: <image><gen_0><gen_1>\n")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "llava"


def test_help_has_examples_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from olavlm.__main__ import main; sys.argv = ['olavlm', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("chat", "convert", "export --plain"):
        assert f"python -m olavlm {command}" in done.stdout
