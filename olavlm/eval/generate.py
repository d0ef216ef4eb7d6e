"""Batched greedy replies, written down as they come."""

import glob
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from olavlm.data.atomic import replace
from olavlm.data.images import decode_image
from olavlm.errors import OlaError
from olavlm.eval.features import ImageFeatures
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor


@dataclass(frozen=True)
class Request:
    """One question to a student."""

    id: str
    prompt: str  # what the human says, one <image> in it
    image: bytes  # encoded
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON values, kept beside the reply


class Ranks(Protocol):
    """The processes that share the work; `train.distributed.World` is one."""

    @property
    def rank(self) -> int:
        """This process among them, from 0."""

    @property
    def size(self) -> int:
        """How many they are."""

    def barrier(self) -> None:
        """Wait for the others."""


class Alone:
    """One process, without others."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Nobody to wait for."""


ALONE = Alone()


def generate_replies(
    model: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    requests: Sequence[Request],
    file: Path,
    *,
    batch: int,
    max_new_tokens: int,
    features: ImageFeatures | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Ask everything that `file` has no reply to yet; every batch is written down as soon as it is there.

    Greedy, so the replies are a function of the model and the requests. Batches are cut from the whole list and a batch
    that was interrupted is asked again whole: a resumed run, on whatever number of ranks, gives exactly the replies of
    an unbroken one. Each rank asks every `size`-th batch and writes beside `file`, to ``{stem}.rank{rank}.jsonl``;
    rank 0 puts these together when all have come, or when a run begins that finds them.

    Args:
        model: on its device, with its dtype.
        processor: the model's own, with the view it was trained in.
        requests: ids are unique; the same on all ranks.
        file: JSON lines ``{"id", "prompt", "reply", **facts}``; a torn last line, left by a kill, is dropped.
        batch: requests per forward pass; padded on the left.
        max_new_tokens: most tokens per reply.
        features: of the requests' images, for a student with encoders.
        ranks: all of them call this function.
        progress: told, after every batch, how many replies this rank has and will have, those already there included.

    Returns:
        One line per request, in their order; the same on all ranks.

    Raises:
        OlaError: `file` is broken or holds a reply to another prompt; an image cannot be decoded, or lacks a feature.
    """
    if features:
        features.check({request.id: request.image for request in requests})
    if ranks.rank == 0:
        _join(file, requests)
    ranks.barrier()
    known = _read(file, requests)
    batches = [requests[start : start + batch] for start in range(0, len(requests), batch)]
    mine = [asked for asked in batches if any(r.id not in known for r in asked)][ranks.rank :: ranks.size]
    ranks.barrier()  # `file` is left alone until all have read it
    done, of = len(known), len(known) + sum(request.id not in known for asked in mine for request in asked)
    progress(done, of)
    model.eval()  # type: ignore[no-untyped-call]
    for asked in mine:
        replies = _reply(model, processor, asked, max_new_tokens, features)
        lines = [
            json.dumps({"id": r.id, "prompt": r.prompt, "reply": reply, **r.facts})
            for r, reply in zip(asked, replies, strict=True)
            if r.id not in known
        ]
        with file.with_suffix(f".rank{ranks.rank}.jsonl").open("a") as log:
            log.write("".join(line + "\n" for line in lines))
        done += len(lines)
        progress(done, of)
    ranks.barrier()
    if ranks.rank == 0:
        _join(file, requests)
    ranks.barrier()
    known = _read(file, requests)
    return [known[request.id] for request in requests]


def generate_texts(
    model: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    **settings: Any,
) -> list[str]:
    """One forward pass's replies, without special tokens and outer white space.

    Args:
        model: on its device, with its dtype.
        processor: the model's own.
        prompts: as `processor.prompt` renders them.
        images: all of them, in the order of their ``<image>`` in the prompts; mode RGB.
        settings: of `model.generate`, ``max_new_tokens`` at least, and inputs. Greedy unless they say otherwise.
    """
    inputs = processor(images=list(images), text=prompts).to(model.device)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        output = model.generate(**inputs, **(greedy | settings))  # type: ignore[misc]
    new = output[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _reply(
    model: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    requests: Sequence[Request],
    max_new_tokens: int,
    features: ImageFeatures | None,
) -> list[str]:
    """The replies to one batch."""
    images = []
    for request in requests:
        try:
            images.append(decode_image(request.image))
        except ValueError as error:
            raise OlaError(f"question {request.id}: image cannot be decoded: {error}") from None
    prompts = [processor.prompt([{"from": "human", "value": request.prompt}]) for request in requests]
    fed = {"encoder_features": features.read([r.image for r in requests], model.device)} if features else {}
    return generate_texts(model, processor, prompts, images, max_new_tokens=max_new_tokens, **fed)


def _join(file: Path, requests: Sequence[Request]) -> None:
    """Put what ranks wrote beside `file` into it, in the order of the requests, and remove their files."""
    parts = sorted(file.parent.glob(f"{glob.escape(file.stem)}.rank*.jsonl"))
    known: dict[str, dict[str, Any]] = {}
    for part in (file, *parts):
        known |= _read(part, requests)
    ordered = [known[request.id] for request in requests if request.id in known]
    data = "".join(json.dumps(line) + "\n" for line in ordered).encode()
    if data != (file.read_bytes() if file.exists() else b""):
        replace(file, data)
    for part in parts:
        part.unlink()


def _read(file: Path, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """The replies `file` already holds, by id; what a kill has left half written does not count."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    prompts = {request.id: request.prompt for request in requests}
    known = {}
    for number, line in enumerate(io.BytesIO(data[: data.rfind(b"\n") + 1]), 1):
        try:
            reply = json.loads(line)
            there, now = reply["prompt"], prompts.get(reply["id"])
        except (ValueError, KeyError, TypeError):
            raise OlaError(f"{file}: line {number} is no reply: {line[:60]!r}; remove the file to ask again") from None
        if there != now:
            raise OlaError(
                f"{file}: the reply to {reply['id']} was given to {there!r}, the benchmark now asks {now!r}; "
                "remove the file to ask again"
            )
        known[reply["id"]] = reply
    return known
