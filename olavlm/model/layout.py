"""Where the images of a batch are: found by token id, never by an offset from a template."""

from dataclasses import dataclass

import torch
from torch import Tensor

from olavlm.errors import OlaError
from olavlm.model.configuration import OlaVlmConfig


@dataclass(frozen=True)
class ImageLayout:
    """Positions of the images of a batch of B rows of L tokens, in row-major order; n images in all.

    An image occupies one block: ``[image tokens][first task's tokens][second task's tokens]…``.
    """

    row: Tensor  # (n,) int64, the row each image is in
    start: Tensor  # (n,) int64, the column of its first image token
    image_tokens: int
    spans: dict[str, tuple[int, int]]  # task → first and last + 1 column of its tokens, relative to `start`
    block: int  # tokens an image occupies in all
    special: Tensor  # (B, L) bool, image and task tokens
    one_per_row: bool  # image i is in row i: rows need no gathering

    @property
    def images(self) -> int:
        """How many images the batch has."""
        return int(self.row.shape[0])

    def columns(self, task: str) -> Tensor:
        """Columns of a task's tokens, (n, task_tokens) int64."""
        first, last = self.spans[task]
        return self.start[:, None] + torch.arange(first, last, device=self.start.device)

    def rows(self, hidden: Tensor) -> Tensor:
        """The row of each image: (B, L, …) → (n, L, …)."""
        return hidden if self.one_per_row else hidden[self.row]

    def key_mask(self, attention_mask: Tensor | None, task: str | None, read_text: bool = True) -> Tensor:
        """The positions that the predictor of `task` attends to for each image, (n, L) bool.

        These are the image's own tokens, the task's own tokens behind them (none for ``task=None``), and all text of
        the row; never padding, never another image's block or another task's tokens. Without `read_text` nothing behind
        the image's block is a key. The predictor has no notion of position, so masking a position out equals the
        published concatenation that leaves it out.

        Args:
            attention_mask: (B, L), nonzero where a token is no padding; None where there is no padding.
        """
        column = torch.arange(self.special.shape[1], device=self.special.device)
        offset = column - self.start[:, None]  # (n, L) relative to the image
        keys = ~self.rows(self.special) | ((offset >= 0) & (offset < self.image_tokens))
        if task is not None:
            first, last = self.spans[task]
            keys = keys | ((offset >= first) & (offset < last))
        if not read_text:
            keys = keys & (offset < self.block)
        if attention_mask is not None:
            keys = keys & self.rows(attention_mask).bool()
        return keys


def find_images(input_ids: Tensor, config: OlaVlmConfig) -> ImageLayout:
    """Locate every image block of a batch.

    Args:
        input_ids: (B, L) int64.

    Raises:
        OlaError: image or task tokens that do not form whole blocks, as after a careless truncation.
    """
    block = torch.tensor(config.image_block, device=input_ids.device)
    length = config.image_seq_length
    is_image = input_ids == config.image_token_index
    special = is_image | torch.isin(input_ids, block)
    at = is_image.nonzero()[::length]
    row, start = at[:, 0], at[:, 1]
    images = int(at.shape[0])
    if images:
        columns = start[:, None] + torch.arange(len(block), device=input_ids.device)
        found = input_ids[row[:, None], columns.clamp(max=input_ids.shape[1] - 1)]
        whole = (found == block).all() & (columns[:, -1] < input_ids.shape[1]).all()
    if int(special.sum()) != images * len(block) or (images and not bool(whole)):
        raise OlaError(
            f"input_ids: {int(is_image.sum())} image tokens and {int((special & ~is_image).sum())} task tokens do not "
            f"form whole blocks of {length} image tokens followed by {len(block) - length} task tokens"
        )
    spans, first = {}, length
    for task in config.task_configs:
        spans[task.name] = (first, first + task.task_tokens)
        first += task.task_tokens
    one_per_row = images == input_ids.shape[0] and bool((row == torch.arange(images, device=row.device)).all())
    return ImageLayout(row, start, length, spans, len(block), special, one_per_row)
