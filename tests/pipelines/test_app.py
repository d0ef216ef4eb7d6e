"""The app over real HTTP: a tiny untrained student, the demo world's teachers, images of all kinds."""

import contextlib
import http.client
import io
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from olavlm.config import load_pipeline
from olavlm.errors import OlaError
from olavlm.model.export import load_for_inference
from pipelines import app as app_module
from pipelines.app import Desk, Server
from train import student as students

PIPELINE = """
name: asked
student: {tasks: [depth, seg], layers: {depth: [2], seg: [3]}}
stages: {pretrain: {losses: {depth: 1}}}
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, write_pipeline: Callable[[Path, str], str]) -> str:
    return write_pipeline(tmp_path_factory.mktemp("asked"), PIPELINE)


@pytest.fixture(scope="module")
def model(pipeline: str) -> Path:
    folder = Path(pipeline).parent / "model"
    for part in students.create(load_pipeline(pipeline)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def desk(model: Path, pipeline: str) -> Desk:
    return Desk(model, pipeline=pipeline)


@contextlib.contextmanager
def serve(desk: Any) -> Iterator[Server]:
    """A server of this desk on a free port, closed at the end."""
    with Server(desk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def served(desk: Desk) -> Iterator[Server]:
    with serve(desk) as server:
        yield server


def request(server: Server, method: str, path: str = "/", body: bytes = b"", **headers: str) -> tuple[int, str]:
    """Status and page."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)  # type: ignore[misc]
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def ask(server: Server, **fields: bytes) -> tuple[int, str]:
    """Send the form as a browser does."""
    body = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="a.png"\r\nContent-Type: image/png' if name == "image" else b"", value)
        for name, value in fields.items()
    )
    return request(server, "POST", "/", body + b"--edge--\r\n", Content_Type="multipart/form-data; boundary=edge")


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_and_a_question_give_an_answer_and_what_the_layers_see(served: Server, read_page: Any) -> None:
    status, text = request(served, "GET")
    assert status == 200
    assert "<textarea" in text
    assert "What the layers see" not in text
    status, text = ask(served, image=png(), question=b"What is <this>?", kept=b"")
    assert status == 200
    page = read_page(text)
    shown = [image["alt"] for image in page.images]
    for task, layer in (("depth", 2), ("seg", 3)):
        assert {f"{task}, decoded map, teacher's target", f"{task}, decoded map, layer {layer}"} <= set(shown)
    assert "What is <this>?" in page.text
    answer = served.desk.ask(Image.open(io.BytesIO(png())), "What is <this>?")[0]
    assert answer is not None
    assert " ".join((answer or "(empty)").split()) in " ".join(page.text.split())
    assert not re.search(r"https?://", text)


def test_the_next_question_needs_no_upload(served: Server) -> None:
    _, text = ask(served, image=png("blue"), question=b"", kept=b"")
    kept = re.search(r'name="kept" value="(\w+)"', text)
    assert kept
    status, text = ask(served, image=b"", question=b"How many?", kept=kept[1].encode())
    assert status == 200
    assert kept[1] in text
    assert '<p class="answer">' in text
    for i in range(16):
        served.remember(png(f"rgb({i}, 0, 0)"))
    status, text = ask(served, image=b"", question=b"How many?", kept=kept[1].encode())
    assert status == 400
    assert "image: none given, or forgotten since; expected a file" in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": b"?"}, "image: none given"),
        ({"image": b"no image", "question": b"?"}, "image: not an image in a known format; expected JPEG"),
        ({"image": png()[:50], "question": b"?"}, "image: cannot be decoded"),
        ({"image": png(), "question": b"word " * 5000}, "question: the conversation takes"),
        ({"image": png(), "question": b"<image> again"}, "images: 1 given; the texts have 2 <image>"),
    ],
)
def test_bad_input_is_one_line_on_the_page(served: Server, read_page: Any, fields: Any, said: str) -> None:
    status, text = ask(served, **fields)
    assert status == 400
    (line,) = re.findall(r'<p class="error" role="alert">(.*?)</p>', text)
    assert line
    assert said in read_page(text).text


def test_requests_that_are_none(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MAX_BYTES", 3 * 2**20)
    status, text = ask(served, image=b"x" * (3 * 2**20 + 1), question=b"?")
    assert status == 413
    assert "image: 3 MiB; expected at most 3 MiB" in text
    assert request(served, "POST", "/", b"question=1", Content_Type="text/plain")[0] == 400
    assert request(served, "GET", "/other")[0] == 404
    with socket.create_connection(served.server_address[:2]) as bare:
        bare.sendall(b"POST / HTTP/1.0\r\nContent-Length: \xb2\r\n\r\n")
        assert bare.makefile("rb").readline().split()[1] == b"411"
    with socket.create_connection(served.server_address[:2]) as gone:
        gone.sendall(b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\n")
    assert request(served, "GET")[0] == 200  # who went away harms nobody


class Broken:
    """A desk whose student fails."""

    folder = seeing = missing = "x"

    def ask(self, *_: Any) -> Any:
        raise RuntimeError("out of memory")


def test_what_nobody_foresaw_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Broken()) as server:
        status, text = ask(server, image=png(), question=b"?")
    assert status == 500
    assert "unexpected: out of memory" in text
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_one_student_may_answer_and_another_show_its_layers(
    desk: Desk, model: Path, pipeline: str, tmp_path: Path
) -> None:
    bare, processor = load_for_inference(model)
    bare.config.tasks = [task | {"layers": []} for task in bare.config.tasks]
    for part in (bare, processor):
        part.save_pretrained(tmp_path / "bare")
    alone = Desk(tmp_path / "bare", pipeline=pipeline)
    assert "no predictors in this student" in alone.missing
    image = Image.open(io.BytesIO(png()))
    assert alone.ask(image, "What?") == (desk.ask(image, "What?")[0], [])
    both = Desk(tmp_path / "bare", model, pipeline)
    assert [view.task for view in both.ask(image, "")[1]] == [view.task for view in desk.ask(image, "")[1]]
    with pytest.raises(OlaError, match="no predictors in this student"):
        Desk(model, tmp_path / "bare", pipeline)


def test_a_port_in_use_is_one_clear_line(served: Server) -> None:
    port = served.server_address[1]
    with pytest.raises(OlaError, match=rf"127\.0\.0\.1:{port}: cannot listen there \(Address already in use\)"):
        Server(served.desk, "127.0.0.1", port)


def test_ctrl_c_ends_it(desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app_module, "Desk", lambda *_: desk)
    addresses: list[Any] = []

    class Heard(Server):
        def service_actions(self) -> None:  # the server's loop calls it, so that Ctrl-C comes amid serving
            if not addresses:
                addresses.append(self.server_address)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(app_module, "Server", Heard)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    try:
        app_module.app(Path("model"), None, None, "127.0.0.1", 0)
    finally:
        signal.signal(signal.SIGINT, before)
    (address,) = addresses
    assert capsys.readouterr().out == f"http://127.0.0.1:{address[1]}/  (Ctrl-C ends it)\n\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
