"""A page on this computer: give an image, ask a question, see the answer and what the student's layers see.

The standard library serves it; nothing is written to a disk, and nothing is asked of the network.
"""

import hashlib
import sys
import threading
from collections import OrderedDict
from email.parser import BytesParser
from email.policy import HTTP
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from olavlm.chat import Chat
from olavlm.data.images import decode_image
from olavlm.errors import OlaError
from olavlm.model.export import load_for_inference
from pipelines.page import render
from pipelines.see import MAP, Source, Student, TaskView, load_student, look, open_sources, stated_by

MAX_BYTES = 32 * 2**20  # of a request: one image and a question
_CHUNK = 2**20
_IMAGES = 16  # that are remembered, so that another question needs no upload
_NEW_TOKENS = 256  # of an answer at most


class Desk:
    """The students behind the page: one that answers, and one whose layers are shown.

    Args:
        folder: of the student that answers.
        layers_of: of the one whose layers are shown; default: the same, if it was saved with predictors.
        pipeline: whose teachers and data; default: those of the run that this one lies in.

    Raises:
        OlaError: no student in a folder; no predictors in `layers_of`, or other features than a teacher's.
    """

    def __init__(self, folder: Path, layers_of: Path | None = None, pipeline: str | None = None) -> None:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        set_verbosity_error()  # type: ignore[no-untyped-call]  # predictors that the answering one does without
        self.folder, self.seeing = folder, layers_of or folder
        self.missing = ""
        self.sources: dict[str, Source] = {}
        self._seer: Student | None = None
        try:
            self._seer = load_student(self.seeing)
        except OlaError as error:
            if layers_of:
                raise
            self.missing = f"{error}: give that one as --layers-of"
        if self._seer and self.seeing == folder:
            self._answerer = self._seer
        else:
            model, processor = load_for_inference(folder)
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._answerer = model.to(device or "cpu"), processor  # type: ignore[arg-type]
        if self._seer:
            self.sources = open_sources(self._seer[0], *stated_by(self.seeing.resolve().parent, pipeline))
        self._one_at_a_time = threading.Lock()

    def ask(self, image: Image.Image, question: str) -> tuple[str | None, list[TaskView]]:
        """The answer (None without a question), and the views of every task ([] without predictors).

        Raises:
            OlaError: what a chat refuses, for example a question that is too long.
        """
        with self._one_at_a_time:
            answer = Chat(*self._answerer, image).ask(question, _NEW_TOKENS, echo=False) if question else None
            views = look(self._seer, [image], self.sources)[0] if self._seer else []
        return answer, sorted(views, key=lambda view: not any(row.what == MAP for row in view.rows))  # maps first


class Server(ThreadingHTTPServer):
    """Serves the page of a desk until it is closed."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, desk: Desk, host: str, port: int) -> None:
        self.desk = desk
        self.images: OrderedDict[str, Image.Image] = OrderedDict()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OlaError(
                f"{host}:{port}: cannot listen there ({reason}); choose others with --host, --port"
            ) from None

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/"  # type: ignore[str-bytes-safe]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no news; anything else is told in the terminal."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def remember(self, data: bytes) -> str:
        """Decode an image and keep it for further questions; returns its name.

        Raises:
            OlaError: not an image.
        """
        try:
            image = decode_image(data)
        except ValueError as error:
            raise OlaError(f"image: {error}; expected JPEG, PNG, WebP …") from None
        name = hashlib.sha256(data).hexdigest()[:16]
        self.images[name] = image
        while len(self.images) > _IMAGES:
            self.images.popitem(last=False)
        return name


class _Handler(BaseHTTPRequestHandler):
    """One request: GET gives the form, POST the form with an answer."""

    server: Server
    timeout = 60  # seconds a silent connection is kept

    def do_GET(self) -> None:
        """The empty form."""
        if self.path != "/":
            self._reply(HTTPStatus.NOT_FOUND, error=f"{self.path}: nothing here; the page is at /")
        else:
            self._reply(HTTPStatus.OK)

    def do_POST(self) -> None:
        """The form with an answer, or with what is wrong in one line."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._reply(HTTPStatus.LENGTH_REQUIRED, error="request: no Content-Length; expected a form")
            return
        if int(length) > MAX_BYTES:
            for start in range(0, int(length), _CHUNK):  # a browser reads no answer before it has sent everything
                self.rfile.read(min(_CHUNK, int(length) - start))
            said = f"image: {int(length) / 2**20:.0f} MiB; expected at most {MAX_BYTES // 2**20} MiB"
            self._reply(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error=said)
            return
        form = _form(self.headers.get("Content-Type", ""), self.rfile.read(int(length)))
        name, question = (form.get(field, b"").decode(errors="replace").strip() for field in ("kept", "question"))
        try:
            if form.get("image"):
                name = self.server.remember(form["image"])
            image = self.server.images.get(name)
            if image is None:
                raise OlaError("image: none given, or forgotten since; expected a file")
            answer, views = self.server.desk.ask(image, question)
        except OlaError as error:
            self._reply(HTTPStatus.BAD_REQUEST, kept=name, question=question, error=str(error))
        except Exception as error:
            self._reply(HTTPStatus.INTERNAL_SERVER_ERROR, kept=name, question=question, error=f"unexpected: {error}")
            raise
        else:
            self._reply(HTTPStatus.OK, kept=name, question=question, answer=answer, views=views)

    def _reply(self, status: HTTPStatus, kept: str = "", question: str = "", **said: Any) -> None:
        """The page: the form as it was filled in, and an answer with views, or an error."""
        desk, image = self.server.desk, self.server.images.get(kept)
        shown = {"answer": None, "views": [], "error": "", **said}
        page = render(
            "app.html.j2", desk=desk, kept=kept if image else "", image=image, question=question, **shown
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page itself says what happened."""


def app(folder: Path, layers_of: Path | None, pipeline: str | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        folder: of the student that answers.
        layers_of: as `Desk` has it.
        pipeline: as `Desk` has it.
        host: address to listen on.
        port: to listen on; 0 takes a free one.

    Raises:
        OlaError: as `Desk`, or host and port cannot be listened on.
    """
    with Server(Desk(folder, layers_of, pipeline), host, port) as server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a ``multipart/form-data`` body; {} if it is none."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    fields = {}
    for part in message.iter_parts() if message.is_multipart() else ():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            fields[name] = content
    return fields
