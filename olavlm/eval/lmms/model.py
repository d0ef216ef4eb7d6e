"""The class behind lmms-eval's ``--model olavlm``: conversations with images in, replies out, in batches."""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from rich.progress import track

from olavlm.chat import load_image
from olavlm.errors import OlaError
from olavlm.eval.generate import generate_texts
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor


class OlaVlm(lmms):
    """A student in lmms-eval's chat interface.

    Args:
        pretrained: the model's folder, as a stage exports it.
        batch_size: conversations per forward pass.
        device: default: this process's GPU (``LOCAL_RANK``), or the CPU where there is none.
        dtype: of the weights; ``auto``: as they were saved.
        max_new_tokens: most tokens of a reply where the task does not say.

    Raises:
        OlaError: no model there, one that is fed stored features, or a batch size that is no number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 1024,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OlaError(f"batch_size: {batch_size!r}; expected a positive number")
        if not (Path(pretrained) / "config.json").is_file():
            raise OlaError(f"pretrained: no model in {pretrained}; expected the model/ folder of a stage")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        model: Any = OlaVlmForConditionalGeneration.from_pretrained(pretrained, dtype=dtype)
        if model.config.encoders:
            fed = ", ".join(encoder["name"] for encoder in model.config.encoders)
            raise OlaError(f"pretrained: {pretrained} is fed stored features ({fed}), which other images have none of")
        self.model = model.to(self.device).eval()
        self.processor = OlaVlmProcessor.from_pretrained(pretrained)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The replies to the requests, in their order; greedy unless the task asks for samples.

        Args:
            requests: with the arguments ``(context, doc_to_messages, generation_kwargs, doc_id, task, split)``.

        Raises:
            OlaError: a conversation with video or sound.
        """
        batches = [
            (settings, alike[start : start + self.batch_size])
            for settings, group in groupby(requests, key=lambda request: request.args[2])
            for alike in [list(group)]
            for start in range(0, len(alike), self.batch_size)
        ]
        shown = track(batches, "olavlm", disable=self.rank > 0)
        return [reply for settings, batch in shown for reply in self._reply(batch, settings)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: the student has learned to answer questions, not to be asked again with what it said."""
        raise NotImplementedError("olavlm: no multi-round tasks")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: chat tasks generate."""
        raise NotImplementedError("olavlm: no tasks scored by log-likelihood")

    def _reply(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        """The replies to requests of one kind."""
        prompts, images = [], []
        for request in requests:
            _, to_messages, _, doc_id, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
            pictures, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise OlaError(f"task {task}: a conversation with video or sound; expected images and text")
            images += [load_image(Path(one)) if isinstance(one, str) else one for one in pictures]
            conversation = messages.to_hf_messages()
            prompts.append(self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        # Greedy at a temperature of 0 or none, whatever else a task says.
        names = ("temperature", "top_p", "top_k") if settings.get("temperature") else ()
        chosen = {key: settings[key] for key in ("max_new_tokens", "num_beams", *names) if key in settings}
        chosen = {"max_new_tokens": self.max_new_tokens, "do_sample": bool(names)} | chosen
        replies = generate_texts(self.model, self.processor, prompts, images, **chosen)
        for stop in _stops(settings):
            replies = [reply.split(stop)[0].strip() for reply in replies]
        return replies


def _stops(settings: dict[str, Any]) -> list[str]:
    """The texts a reply ends before."""
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]
