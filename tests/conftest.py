"""What tests of several folders need: a student small enough to answer hundreds of questions a second (what it says is
random), processes that start at once, and an object store."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from olavlm.data.objects import ObjectPath, _store
from olavlm.model import build_student

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["USER", ":", "ASSISTANT", "(", ")", "A", "B", "C", "D", "How", "many", "?", "1", "2", "3", "chair", "table"],
]
TASKS = [{"name": "gen", "kind": "pooled", "queries": 1, "width": 8, "layers": [1], "task_tokens": 2}]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of two workers neither waits for the other at the end."""
    items.sort(key=lambda item: item.path.name != "test_kill.py")


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor: 16 image tokens, 2 layers, word-level vocabulary."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("student")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder / "vision")
    CLIPImageProcessorPil().save_pretrained(folder / "vision")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "llm")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.5,
        )
    ).save_pretrained(folder / "llm")
    return build_student(str(folder / "vision"), str(folder / "llm"), TASKS)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """What torch makes is float32 after every test as before it: transformers changes that while it reads weights."""
    yield
    left, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float32)
    assert left == torch.float32


@dataclass
class Ended:
    """What became of the processes of a job."""

    codes: list[int]  # of each rank; negative: the signal that ended it
    output: str


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[..., Ended]]:
    """Runs ``python -m MODULE …`` in real processes, several ranks at wish; see processes.py for what a job may ask."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    server = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("processes.py"))],  # -P: beside it lies another `train`
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin
    assert server.stdout

    def run(*argv: str, module: str = "train", ranks: int = 1, **asked: Any) -> Ended:
        server.stdin.write(json.dumps({"module": module, "argv": argv, "ranks": ranks, **asked}, default=str) + "\n")
        server.stdin.flush()
        return Ended(**json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    """A real S3 API on loopback, which the AWS_* variables name while it runs."""
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    from moto.s3.responses import S3Response

    lock, put_object = threading.Lock(), S3Response.put_object

    def one_at_a_time(self: S3Response) -> object:
        with lock:  # S3's conditional writes are atomic; moto looks, and then writes
            return put_object(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", one_at_a_time)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield f"http://{host}:{port}"
        server.stop()


_buckets = count()


@pytest.fixture
def s3(_s3_server: str) -> ObjectPath:
    """An empty bucket."""
    bucket = f"bucket-{next(_buckets)}"
    urllib.request.urlopen(urllib.request.Request(f"{_s3_server}/{bucket}", method="PUT")).close()
    return ObjectPath(bucket, "")


@pytest.fixture(scope="session")
def objects() -> Callable[[ObjectPath], dict[str, bytes]]:
    """Every object below a prefix, with its content."""

    def read(prefix: ObjectPath) -> dict[str, bytes]:
        listed = [entry["path"] for page in _store(prefix.bucket).list(prefix.key or None) for entry in page]
        return {key.removeprefix(f"{prefix.key}/"): ObjectPath(prefix.bucket, key).read_bytes() for key in listed}

    return read


@pytest.fixture(scope="session")
def upload() -> Callable[[Path, ObjectPath], None]:
    """Copies a folder below a prefix."""

    def copy(folder: Path, prefix: ObjectPath) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                (prefix / str(file.relative_to(folder))).put(file.read_bytes())

    return copy
