"""Batched greedy replies, written down as they come."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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


def generate_replies(
    model: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    requests: Sequence[Request],
    file: Path,
    *,
    batch: int,
    max_new_tokens: int,
    features: ImageFeatures | None = None,
    progress: Callable[[int], None] = lambda replies: None,
) -> list[dict[str, Any]]:
    """Ask everything that `file` has no reply to yet; every batch is appended to it as soon as it is there.

    Greedy, so the replies are a function of the model and the requests. Batches are cut from the whole list and a batch
    that was interrupted is asked again whole: a resumed run gives exactly the replies of an unbroken one.

    Args:
        model: on its device, with its dtype.
        processor: the model's own, with the view it was trained in.
        requests: ids are unique.
        file: JSON lines ``{"id", "prompt", "reply", **facts}``; a torn last line, left by a kill, is dropped.
        batch: requests per forward pass; padded on the left.
        max_new_tokens: most tokens per reply.
        features: of the requests' images, for a student with encoders.
        progress: told how many replies have come or were there already.

    Returns:
        One line per request, in their order.

    Raises:
        OlaError: `file` is broken or holds a reply to another prompt; an image cannot be decoded, or lacks a feature.
    """
    if features:
        features.check({request.id: request.image for request in requests})
    known = _read(file, requests)
    model.eval()  # type: ignore[no-untyped-call]
    for start in range(0, len(requests), batch):
        asked = requests[start : start + batch]
        if not all(request.id in known for request in asked):
            replies = _reply(model, processor, asked, max_new_tokens, features)
            lines = [
                {"id": r.id, "prompt": r.prompt, "reply": reply, **r.facts}
                for r, reply in zip(asked, replies, strict=True)
            ]
            with file.open("a") as log:
                log.write("".join(json.dumps(line) + "\n" for line in lines if line["id"] not in known))
            known |= {line["id"]: line for line in lines}
        progress(len(asked))
    return [known[request.id] for request in requests]


def _reply(
    model: OlaVlmForConditionalGeneration,
    processor: OlaVlmProcessor,
    requests: Sequence[Request],
    max_new_tokens: int,
    features: ImageFeatures | None,
) -> list[str]:
    """The replies to one batch, without special tokens and outer white space."""
    images = []
    for request in requests:
        try:
            images.append(decode_image(request.image))
        except ValueError as error:
            raise OlaError(f"question {request.id}: image cannot be decoded: {error}") from None
    prompts = [processor.prompt([{"from": "human", "value": request.prompt}]) for request in requests]
    inputs = processor(images=images, text=prompts).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if features:
        inputs["encoder_features"] = features.read([request.image for request in requests], model.device)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[misc]
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _read(file: Path, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """The replies `file` already holds, by id; cuts off what a kill has left half written."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as log:
            log.truncate(len(whole))
    prompts = {request.id: request.prompt for request in requests}
    known = {}
    for number, line in enumerate(io.BytesIO(whole), 1):
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
