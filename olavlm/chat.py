"""Questions about an image, answered in the terminal."""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from olavlm.data.images import decode_image
from olavlm.errors import OlaError
from olavlm.model import OlaVlmForConditionalGeneration, OlaVlmProcessor


class Chat:
    """A conversation about one image.

    Args:
        model: on its device, with its dtype.
        processor: the model's own.
        image: mode RGB.
    """

    def __init__(self, model: OlaVlmForConditionalGeneration, processor: OlaVlmProcessor, image: Image.Image) -> None:
        self.model, self.processor, self.image = model, processor, image
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str, max_new_tokens: int, echo: bool = True) -> str:
        """The answer, greedy: written to stdout as it comes, returned without outer white space, kept as history.

        Args:
            question: what the human says next; the image stands before the first.
            max_new_tokens: most tokens of the answer.
            echo: write to stdout.

        Raises:
            OlaError: image or task tokens in the question, or no room left in the model's context.
        """
        turns = [*self.turns, {"from": "human", "value": question if self.turns else f"<image>\n{question}"}]
        inputs = self.processor(images=[self.image], text=self.processor.prompt(turns)).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        length, context = inputs["input_ids"].shape[1], self.model.config.llm.max_position_embeddings
        if length >= context:
            raise OlaError(f"question: the conversation takes {length} tokens; the model reads at most {context}")
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if echo else None
        with torch.inference_mode():
            output = self.model.generate(  # type: ignore[misc]
                **inputs, max_new_tokens=min(max_new_tokens, context - length), do_sample=False, streamer=streamer
            )
        answer: str = self.processor.tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
        self.turns = [*turns, {"from": "gpt", "value": answer}]
        return answer


def converse(chat: Chat, max_new_tokens: int) -> int:
    """Answer one question per line of stdin until it ends (Ctrl-D) or Ctrl-C.

    A question that cannot be asked is told and forgotten at a terminal; in a pipe it is an error.

    Returns:
        The exit code.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        print("One question per line; Ctrl-D ends.")
    try:
        while True:
            question = input("> " if terminal else "").strip()
            if not question:
                continue
            try:
                chat.ask(question, max_new_tokens)
            except OlaError as error:
                if not terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)
    except EOFError:
        code = 0
    except KeyboardInterrupt:
        code = 130
    if terminal:
        print()
    return code


def load_image(file: Path) -> Image.Image:
    """The image in a file, upright, mode RGB.

    Raises:
        OlaError: no such file, or one that cannot be decoded.
    """
    try:
        return decode_image(file.read_bytes())
    except OSError as error:
        raise OlaError(f"{file}: {error.strerror or error}; expected an image") from None
    except ValueError as error:
        raise OlaError(f"{file}: {error}; expected an image") from None
