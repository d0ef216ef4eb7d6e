"""What packing and adopting share: looking at a sample, index rows, lists of what was left out, processes in order."""

import json
import os
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from olavlm.data.corpus import IMAGE_PLACEHOLDER, content_hash, conversation
from olavlm.data.images import decode_image
from olavlm.errors import OlaError

#: File names that mean an image; what the bytes are is seen when they are decoded.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif")

#: Called with (done, total, what is counted); total is None where it is not known.
Progress = Callable[[int, int | None, str], None]

Item = TypeVar("Item")
Result = TypeVar("Result")

_KEY_LENGTH = 60  # characters; leaves room for the extension in any file system's 255 bytes


@dataclass(frozen=True)
class Issue:
    """One sample, image or tar that was not taken as it is, and why; a line of ``left_out.jsonl`` or ``renamed.jsonl``.

    Attributes:
        source: the JSON file, folder or tar it is in.
        key: the sample's id; empty where a whole tar is meant.
        file: the image or member it is about, or the source itself.
        reason: what is wrong with it.
    """

    source: str
    key: str
    file: str
    reason: str

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class PackReport:
    """What became of a source.

    Attributes:
        out: the corpus.
        tars: tars added.
        samples: samples added.
        images: images added.
        already: samples (packing) or tars (adopting) that the corpus had already.
        left_out: samples, images or tars that are not in the corpus, or cannot be decoded, and why.
        renamed: samples whose id another sample has too, packed under a key that carries their content hash.
    """

    out: Path
    tars: int
    samples: int
    images: int
    already: int
    left_out: list[Issue]
    renamed: list[Issue]


@dataclass(frozen=True)
class ImageFacts:
    """What the index says of an image's bytes; the hash names them, `error` is None if they decode."""

    bytes: int
    hash: str
    width: int
    height: int
    error: str | None


@dataclass(frozen=True)
class Text:
    """A sample's text member: where it lies in the tar, and how many characters its turns have."""

    member: str
    offset: int
    bytes: int
    length: int


def look_at(data: bytes) -> ImageFacts:
    """Decode an image once to see that it can be, and how large it is."""
    try:
        width, height = decode_image(data).size
    except ValueError as error:
        return ImageFacts(len(data), content_hash(data), 0, 0, str(error))
    return ImageFacts(len(data), content_hash(data), width, height, None)


def text_length(text_member: str, data: bytes, images: int) -> int:
    """Characters of all turns of a sample with that many images.

    Raises:
        ValueError: the text is no conversation, or does not speak of that many images.
    """
    values = [turn["value"] for turn in conversation(text_member, data)]
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ValueError("text holds half a surrogate pair, which is no Unicode") from None
    placeholders = sum(value.count(IMAGE_PLACEHOLDER) for value in values)
    if placeholders != images:
        raise ValueError(f"{images} images, but {placeholders} times {IMAGE_PLACEHOLDER} in the conversation")
    return sum(map(len, values))


def index_rows(key: str, images: list[tuple[int, ImageFacts]], text: Text) -> list[dict[str, Any]]:
    """A sample's rows of `INDEX_SCHEMA`.

    Args:
        key: the sample's key.
        images: offset in the tar and facts of every image, in order.
        text: the text member.
    """
    common = {
        "key": key,
        "modality": "image" if images else "text",
        "text_member": text.member,
        "text_offset": text.offset,
        "text_bytes": text.bytes,
        "text_length": text.length,
    }
    none = (-1, 0, ImageFacts(0, "", 0, 0, None))
    return [
        common
        | {
            "image_index": i,
            "image_offset": offset,
            "image_bytes": facts.bytes,
            "image_hash": facts.hash or None,
            "width": facts.width,
            "height": facts.height,
            "error": facts.error,
        }
        for i, offset, facts in ([(i, *image) for i, image in enumerate(images)] or [none])
    ]


def safe_key(name: str) -> str:
    """A key for WebDataset: letters and digits of any script, ``_`` and ``-``, at most 60 characters.

    A dot would end the key and begin the extension, a slash would make a folder. Where something had to be replaced the
    first digits of the name's hash are added, so that different names stay different; the same name gives the same key.
    """
    key = re.sub(r"[^\w-]", "_", name)
    if key == name and 0 < len(key) <= _KEY_LENGTH:
        return key
    digest = content_hash(name.encode("utf-8", "surrogatepass"))[:8]
    return f"{key[: _KEY_LENGTH - 9]}-{digest}"


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, together: int = 1
) -> Iterator[Result]:
    """`map` in processes (with one worker: in this one): results in the order of the items.

    Threads would not do: decoding and hashing release the GIL, but parsing JSON, opening an image and moving samples
    about do not, and would keep all but a few cores waiting.

    Args:
        function: picklable, as are its results.
        items: read at most 2 × `workers` × `together` ahead of the results.
        workers: processes. They start where they are needed and end with this one, however it ends.
        together: items that travel at once, where one is so little work that sending it alone would cost more.

    Raises:
        OlaError: a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    rest = iter(items)
    chunks = iter(lambda: list(islice(rest, together)), [])
    context = get_context("forkserver")  # a plain fork would copy whatever lock a thread of this process holds
    context.set_forkserver_preload([__name__])
    running: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(workers, context, _begin_worker, (dict(os.environ),)) as pool:
        try:
            for chunk in chunks:
                running.append(pool.submit(_each, function, chunk))
                if len(running) >= 2 * workers:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool:
            raise OlaError(
                "a worker process was killed (out of memory?); run the same command again, perhaps with fewer --workers"
            ) from None
        finally:
            for future in running:
                future.cancel()


def _each(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _begin_worker(environment: dict[str, str]) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a killed parent cannot tell its workers to stop.

    The environment is the parent's of now (an object store's credentials), not that of when the server was started.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
