"""Where the images of a batch are: found by token id, never by an offset from a template."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from olavlm.errors import OlaError
from olavlm.model.configuration import OlaVlmConfig


@dataclass(frozen=True)
class ImageLayout:
    """Positions of the images of a batch of B rows of L tokens; n images in all.

    `find_images` makes the student's. For another model make one of wherever its images are: tokens of an image need
    not be neighbours, nor equally many for every image.

    Raises:
        OlaError: `image` has not a row for every image.
    """

    batch: int  # B
    row: Tensor  # (n,) int64, the row each image is in
    image: Tensor  # (n, L) bool, the tokens of that row which are the image's
    columns: Mapping[str, Tensor]  # task → (n, task_tokens) int64, where in that row the image's task tokens are
    fed: Tensor | None = None  # (n, L) bool, the tokens of that row which are teachers' features of the image
    one_per_row: bool = field(init=False)  # image i is in row i: rows need no gathering

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or self.image.dtype != torch.bool or len(self.image) != self.images:
            raise OlaError(
                f"layout.image: {tuple(self.image.shape)} of {self.image.dtype}; expected {self.images} rows of bool, "
                "one for each image"
            )
        own = self.images == self.batch and bool((self.row == torch.arange(self.batch, device=self.row.device)).all())
        object.__setattr__(self, "one_per_row", own)

    @property
    def images(self) -> int:
        """How many images the batch has."""
        return int(self.row.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.batch, int(self.image.shape[1])

    @property
    def special(self) -> Tensor:
        """(B, L) bool, every token of the batch that stands for an image: its own, features fed and task tokens."""
        own = self._own
        return own.new_zeros(self.shape, dtype=torch.int64).index_add(0, self.row, own.long()).bool()

    def rows(self, hidden: Tensor) -> Tensor:
        """The row of each image: (B, L, …) → (n, L, …)."""
        return hidden if self.one_per_row else hidden[self.row]

    def key_mask(self, attention_mask: Tensor | None, task: str | None, read_text: bool = True) -> Tensor:
        """The positions that the predictor of `task` attends to for each image, (n, L) bool.

        These are the image's own tokens, the task's own tokens behind them (none for ``task=None``), and all text of
        the row; never padding, never another image or its task tokens, never another task's tokens, never the teachers'
        features that a student is fed: what is asked is what the others know of them. Without `read_text` nothing
        behind the image and its task tokens is a key. The predictor has no notion of position, so masking a
        position out equals the published concatenation that leaves it out.

        Args:
            attention_mask: (B, L), nonzero where a token is no padding; None where there is no padding.
        """
        keys = ~self.rows(self.special) | self.image
        if task is not None:
            keys = keys.scatter(1, self.columns[task], True)
        if not read_text:
            column = torch.arange(self.shape[1], device=keys.device)
            keys = keys & (column <= (self._own * column).amax(1, keepdim=True))
        if attention_mask is not None:
            keys = keys & self.rows(attention_mask).bool()
        return keys

    @property
    def _own(self) -> Tensor:
        """(n, L) bool, an image's own tokens, the features of it that are fed, and its task tokens."""
        own = self.image if self.fed is None else self.image | self.fed
        for columns in self.columns.values():
            own = own.scatter(1, columns, True)
        return own


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it looks at the ids, which no graph can
def find_images(input_ids: Tensor, config: OlaVlmConfig) -> ImageLayout:
    """Locate every image of a batch, in row-major order.

    An image occupies one block: ``[image tokens][first encoder's tokens]…[first task's tokens]…``.

    Args:
        input_ids: (B, L) int64.

    Raises:
        OlaError: image, encoder or task tokens that do not form whole blocks, as after a careless truncation.
    """
    block = torch.tensor(config.image_block, device=input_ids.device)
    tokens, fed = config.image_seq_length, config.encoder_tokens
    is_image = input_ids == config.image_token_index
    at = is_image.nonzero()[::tokens]
    row, start = at[:, 0], at[:, 1:]
    columns = start + torch.arange(len(block), device=input_ids.device)  # (n, block)
    found = input_ids[row[:, None], columns.clamp(max=input_ids.shape[1] - 1)]
    whole = (found == block).all() & (columns < input_ids.shape[1]).all()
    special = int((is_image | torch.isin(input_ids, block)).sum())
    if special != found.numel() or not bool(whole):
        others = "encoder and task tokens" if fed else "task tokens"
        raise OlaError(
            f"input_ids: {int(is_image.sum())} image tokens and {special - int(is_image.sum())} {others} do not "
            f"form whole blocks of {tokens} image tokens followed by {len(block) - tokens} {others}"
        )
    counts = [task.task_tokens for task in config.task_configs]
    of_image, of_encoders, of_all_tasks = torch.split_with_sizes(columns, [tokens, fed, sum(counts)], dim=1)
    of_tasks = torch.split_with_sizes(of_all_tasks, counts, dim=1)
    nowhere = torch.zeros_like(is_image[row])
    return ImageLayout(
        batch=input_ids.shape[0],
        row=row,
        image=nowhere.scatter(1, of_image, True),
        columns={task.name: part for task, part in zip(config.task_configs, of_tasks, strict=True)},
        fed=nowhere.scatter(1, of_encoders, True) if fed else None,
    )
