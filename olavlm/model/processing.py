"""`OlaVlmProcessor`: from images and conversations to what the student reads."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from olavlm.config import View
from olavlm.data.images import apply_view, upright_rgb
from olavlm.errors import OlaError

IMAGE_TOKEN = "<image>"
IGNORE = -100

#: Conversation layout of language models that come without one: ``USER: …\nASSISTANT: …</s>\n``, system text first.
DEFAULT_CHAT_TEMPLATE = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

#: Turns every message's content into a text, for the template that follows.
#: Templates are rendered with `trim_blocks`: the newline at the end belongs to the last tag.
_CONTENTS_AS_TEXT = """\
{%- set texts = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set content.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set content.text = content.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = content.text | replace('<image>', '@image_text') -%}
  {%- set texts.messages = texts.messages + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = texts.messages %}
"""

#: What a caller may ask of `__call__` because it is what is done.
_DONE_ANYWAY: dict[str, tuple[Any, ...]] = {
    "return_tensors": ("pt",),
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "add_special_tokens": (False,),
}

#: Stands for an answer where its place in the rendered conversation is looked for.
_MARK = "\x00answer\x00"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def task_token(task: str, index: int) -> str:
    """The special token that marks the position of a task's `index`-th inserted token."""
    return f"<{task}_{index}>"


def encoder_token(encoder: str) -> str:
    """The special token that marks every position of an encoder's features."""
    return f"<{encoder}_features>"


def contents_as_text(image_text: str = IMAGE_TOKEN) -> str:
    """The beginning of a chat template: contents in parts (``[{"type": "image"}, {"type": "text", …}]``) become texts.

    Args:
        image_text: what is written for every image, be it a part or an ``<image>`` in a text.
    """
    return _CONTENTS_AS_TEXT.replace("@image_text", image_text)


class _Answer(NamedTuple):
    """Where an answer is in a rendered conversation, in characters."""

    start: int
    end: int  # behind the special token that ends it
    turn_end: int  # behind the white space after that


class Encoded(NamedTuple):
    """A conversation as training sample."""

    input_ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) int64, −100 outside the answers
    answers_cut: int  # answers that `max_length` left out, or left the beginning of


class OlaVlmProcessor(ProcessorMixin):
    """Expands every ``<image>`` into image, encoder and task tokens inside the language model's own chat template.

    Args:
        image_processor: the vision tower's; its ``image_mean`` and ``image_std`` are used.
        tokenizer: a fast tokenizer that knows ``<image>`` and the task tokens.
        view: how an image becomes a square (see `olavlm.data.images.apply_view`); a stage may set the attribute.
        image_size: side of the vision tower's input in pixels.
        image_seq_length: image tokens per image.
        task_tokens: pairs of task and number of inserted tokens, in the order of the sequence (a list, because a saved
            dictionary comes back sorted).
        encoder_tokens: pairs of encoder and number of tokens of its features, likewise. The features themselves come
            from a target store, and go to the model beside what the processor makes.
        chat_template: default: the tokenizer's, or `DEFAULT_CHAT_TEMPLATE` where it has none. transformers'
            `apply_chat_template` takes contents in parts with any of them.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        view: View = "squash",
        image_size: int = 336,
        image_seq_length: int = 576,
        task_tokens: Sequence[Sequence[Any]] = (),
        chat_template: str | None = None,
        encoder_tokens: Sequence[Sequence[Any]] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise OlaError(
                f"tokenizer: {type(tokenizer).__name__}; expected a fast one, which tells where its tokens are"
            )
        template = chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
        template = contents_as_text() + template.removeprefix(contents_as_text())  # a saved one has it already
        super().__init__(image_processor, tokenizer, chat_template=template)  # type: ignore[no-untyped-call]
        self.view: View = view
        self.image_size = image_size
        self.image_seq_length = image_seq_length
        self.task_tokens = [(str(task), int(count)) for task, count in task_tokens]
        self.image_token = IMAGE_TOKEN
        self.image_token_id: int = self._id(IMAGE_TOKEN)
        self.task_token_ids = {
            task: [self._id(task_token(task, i)) for i in range(count)] for task, count in self.task_tokens
        }
        self.encoder_tokens = [(str(encoder), int(count)) for encoder, count in encoder_tokens]
        self.encoder_token_ids = {encoder: self._id(encoder_token(encoder)) for encoder, _ in self.encoder_tokens}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._closing = re.compile(
            rf"(\s*(?:{'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))}))?(\s*)"
        )
        #: The token ids one image occupies: image tokens, then every encoder's, then every task's, in order.
        self.image_block = [
            *[self.image_token_id] * image_seq_length,
            *(self.encoder_token_ids[encoder] for encoder, count in self.encoder_tokens for _ in range(count)),
            *(i for ids in self.task_token_ids.values() for i in ids),
        ]
        self._inserted = {*self.image_block} - {self.image_token_id}

    def pixel_values(self, images: Sequence[Image.Image], out: Tensor | None = None) -> Tensor:
        """The vision tower's input: each image brought into the view, scaled to [0, 1] and normalised.

        Args:
            images: n of them, of any mode; EXIF orientation is applied and transparency filled, as in training.
            out: where to write it; default: new memory.

        Returns:
            (n, 3, S, S) fp32.
        """
        size = self.image_size
        out = torch.empty(len(images), 3, size, size) if out is None else out
        mean, std = (
            np.asarray(values, np.float32)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        for image, values in zip(images, out.numpy(), strict=True):  # one at a time: it stays in the processor's cache
            values[...] = np.asarray(apply_view(upright_rgb(image), self.view, size)).transpose(2, 0, 1)
            values /= 255
            values -= mean
            values /= std
        return out

    def prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """The text a reply to these turns starts from, in the chat template; `__call__` takes it.

        Args:
            turns: ``{"from": "human" | "gpt" | "system", "value": …}``, ``<image>`` where an image goes.
        """
        return self._render(_messages(turns), reply=True)

    def encode_conversation(self, turns: Sequence[dict[str, str]], max_length: int) -> Encoded:
        """A conversation as training sample: only the answers, each with the special token that ends it, are learned.

        What the template writes between a prompt and the answer (Qwen3's empty thoughts before the last one) is part
        of the answer; what it writes behind the end of an answer (Phi-3's end of text) is not.

        A conversation longer than `max_length` is cut behind the last answer that fits, and inside the first answer
        where not even that one does. Where the first question leaves no room for an answer, nothing is learned of the
        text, and the question is cut, but never inside an image. The images of what is cut off are gone: what remains
        needs the first `images_in(input_ids)`.

        Args:
            turns: as for `prompt`, with one answer at least.
            max_length: most tokens, image and task tokens included.

        Returns:
            Token ids, labels, and how many answers were lost in the cut.

        Raises:
            OlaError: no answer, an unknown speaker, task tokens in the text.
        """
        messages = _messages(turns)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise OlaError(f"conversation: no answer in {len(turns)} turns; expected a turn from 'gpt'")
        text, spans = self._answers(messages)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        input_ids: list[int] = []
        labels: list[int] = []
        ends: list[int] = []  # of each answer's turn, in tokens
        images: list[int] = []  # where each image's block starts
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            while len(ends) < len(spans) and start >= spans[len(ends)].turn_end:
                ends.append(len(input_ids))
            answer = spans[min(len(ends), len(spans) - 1)]
            if token == self.image_token_id:
                images.append(len(input_ids))
            expanded = self._expand(token)
            learn = start < answer.end and end > answer.start and token != self.image_token_id
            input_ids += expanded
            labels += [token] if learn else [IGNORE] * len(expanded)
        ends += [len(input_ids)] * (len(spans) - len(ends))
        fitting = [end for end in ends if end <= max_length]
        cut = fitting[-1] if fitting else max_length
        cut = next((start for start in images if start < cut < start + len(self.image_block)), cut)
        return Encoded(torch.tensor(input_ids[:cut]), torch.tensor(labels[:cut]), len(ends) - len(fitting))

    def images_in(self, input_ids: Tensor) -> int:
        """How many images a sequence of token ids has room for."""
        return int((input_ids == self.image_token_id).sum()) // self.image_seq_length

    def __call__(self, images: Any = None, text: str | Sequence[str] = (), **kwargs: Any) -> BatchFeature:
        """A batch for `generate`.

        Args:
            images: all images of the batch, in the order of their ``<image>`` in the texts: one, a list, or a list of
                each text's.
            text: prompts as `prompt` renders them (no special tokens are added).

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L) int64, padded on the left, and ``pixel_values`` (n, 3, S, S)
            fp32 where there are images.

        Raises:
            OlaError: images and ``<image>`` do not match in number, task tokens in the text, unknown arguments.
        """
        for name, value in kwargs.items():
            if value is not None and value not in _DONE_ANYWAY.get(name, ()):
                known = " or ".join(map(repr, _DONE_ANYWAY.get(name, ())))
                raise OlaError(f"processor: {name}: {value!r}; expected {known or 'images and text only'}")
        texts = [text] if isinstance(text, str) else list(text)
        images = _flat(images)
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        wanted = sum(ids.count(self.image_token_id) for ids in encoded)
        if wanted != len(images):
            raise OlaError(f"images: {len(images)} given; the texts have {wanted} {IMAGE_TOKEN}")
        rows = [[i for token in ids for i in self._expand(token)] for ids in encoded]
        length = max((len(row) for row in rows), default=0)
        pad = self.tokenizer.pad_token_id
        data = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows], dtype=torch.int64),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }
        if images:
            data["pixel_values"] = self.pixel_values(images)
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def _answers(self, messages: list[dict[str, str]]) -> tuple[str, list["_Answer"]]:
        """The rendered conversation and where its answers are.

        An answer starts where the prompt for it ends, and ends before what the template writes behind a mark put in its
        place. What a template makes of the answer itself, or of the conversation's end, plays no part.
        """
        text = self._render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:i], reply=True)
                marked = self._render([*messages[:i], message | {"content": _MARK}, *messages[i + 1 :]])
                behind = marked.rpartition(_MARK)[2]
                start, end = len(prompt), len(text) - len(behind)
                if not text.startswith(prompt) or not text.endswith(behind) or start > end:
                    raise OlaError(
                        f"chat_template: what it writes around turn {i + 1} changes with the turns after it or with "
                        "what it says, so that answers cannot be told from questions"
                    )
                closing = self._closing.match(text, end)
                assert closing is not None  # every part of it is optional
                spans.append(_Answer(start, max(end, closing.end(1)), closing.end()))
        return text, spans

    def _render(self, messages: list[dict[str, str]], reply: bool = False) -> str:
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=reply
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise OlaError(f"chat_template: refuses the turns {roles}: {error}") from None
        return rendered

    def _expand(self, token: int) -> list[int]:
        """One token of the text as the sequence has it."""
        if token == self.image_token_id:
            return self.image_block
        if token in self._inserted:
            what = "the token of an encoder" if token in self.encoder_token_ids.values() else "a task token"
            raise OlaError(f"text: contains {self.tokenizer.convert_ids_to_tokens(token)!r}, {what}")
        return [token]

    def _id(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise OlaError(f"tokenizer: does not know {token!r}; `build_student` adds the student's special tokens")
        return int(found)


def _flat(images: Any) -> list[Image.Image]:
    """None, an image or lists of them as one list."""
    if images is None or isinstance(images, Image.Image):
        return [] if images is None else [images]
    if not isinstance(images, list | tuple):
        raise OlaError(f"images: {type(images).__name__}; expected PIL images")
    return [image for some in images for image in _flat(some)]


def _messages(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """LLaVA's turns as chat messages."""
    for i, turn in enumerate(turns):
        if turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise OlaError(f"conversation turn {i + 1}: {turn!r}; expected from 'human' or 'gpt' and a text as value")
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
