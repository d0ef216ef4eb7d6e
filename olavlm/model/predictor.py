"""The embedding predictor: a one-block Perceiver resampler from an LLM layer's hidden states to a teacher's feature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 4, 32


class EmbeddingPredictor(nn.Module):
    """Predicts a teacher's feature, ``queries`` tokens of ``width``, from hidden states (method of arXiv 2412.09585).

        latents = project_in(queries);  x = project_in(hidden)            # own latents are not projected
        latents += out(softmax(q kᵀ / √32) v)                             # q from latents; k, v from [x; latents]
        latents += down(gelu(up(norm(latents))))
        result = norm_out(project_out(latents))                           # → linear_1(result) with depth MLPs

    Args:
        hidden: width of the hidden states read.
        dim: inner width.
        width: width of the prediction.
        queries: number of latents the predictor owns; None where the caller passes the queries.
        depth_mlps: own the three published MLPs ``linear_1..3``. The prediction is ``linear_1``'s output; the other two
            only ever fed a visualisation. They are kept so that published checkpoints load whole, and never get a
            gradient.
    """

    def __init__(self, hidden: int, dim: int, width: int, queries: int | None = None, depth_mlps: bool = False) -> None:
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.latents = nn.Parameter(torch.empty(1, queries, dim)) if queries else None
        self.project_in = nn.Linear(hidden, dim)
        self.norm_hidden = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, inner, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp_up = nn.Linear(dim, dim, bias=False)
        self.mlp_down = nn.Linear(dim, dim, bias=False)
        self.project_out = nn.Linear(dim, width)
        self.norm_out = nn.LayerNorm(width)
        self.linear_1, self.linear_2, self.linear_3 = (_mlp(width) if depth_mlps else None for _ in range(3))
        self.freeze_unused()
        self.reset_parameters()

    def freeze_unused(self) -> None:
        """``linear_2`` and ``linear_3`` want no gradient: no loss reaches them."""
        for unused in (self.linear_2, self.linear_3):
            if unused is not None:
                unused.requires_grad_(False)

    def reset_parameters(self) -> None:
        """torch's own fan-in initialisation, as published; own latents N(0, 1) / √dim."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        if self.latents is not None:
            nn.init.normal_(self.latents, std=self.latents.shape[-1] ** -0.5)

    def forward(self, hidden: Tensor, key_mask: Tensor, queries: Tensor | None = None) -> Tensor:
        """The prediction, (n, queries, width): `resample`, then ``linear_1`` where there is one."""
        result = self.resample(hidden, key_mask, queries)
        return result if self.linear_1 is None else self.linear_1(result)

    def resample(self, hidden: Tensor, key_mask: Tensor, queries: Tensor | None = None) -> Tensor:
        """What the resampler alone makes of the hidden states; ``linear_1..3`` all read this.

        Args:
            hidden: (n, L, hidden) hidden states; cast to the predictor's dtype.
            key_mask: (n, L) bool, the positions to read.
            queries: (n or 1, queries, hidden), one set for all where the first size is 1; None with own latents.

        Returns:
            (n, queries, width).
        """
        x = self.project_in(hidden.to(self.project_in.weight.dtype))
        if self.latents is not None:
            latents: Tensor = self.latents
        else:
            assert queries is not None, "a predictor without latents of its own needs queries"
            latents = self.project_in(queries.to(self.project_in.weight.dtype))
        latents = latents + self._attend(self.norm_hidden(x), self.norm_latents(latents), key_mask)
        latents = latents + self.mlp_down(F.gelu(self.mlp_up(self.norm_mlp(latents))))
        result: Tensor = self.norm_out(self.project_out(latents))
        return result

    def _attend(self, x: Tensor, latents: Tensor, key_mask: Tensor) -> Tensor:
        """Latents (n or 1, Q, dim) attend to x (n, L, dim), where `key_mask` allows, and to themselves: (n, Q, dim)."""
        n = x.shape[0]
        query = _heads(self.to_query(latents)).expand(n, -1, -1, -1)
        # What is the same for every image (queries from a table) is projected once, then expanded.
        of_latents = _heads(self.to_key_value(latents)).expand(n, -1, -1, -1)
        key, value = torch.cat([_heads(self.to_key_value(x)), of_latents], dim=2).chunk(2, dim=1)
        mask = F.pad(key_mask, (0, latents.shape[1]), value=True)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _heads(x: Tensor) -> Tensor:
    """(n, L, k · 128) → (n, k · 4, L, 32)."""
    return x.view(*x.shape[:-1], x.shape[-1] // HEAD_DIM, HEAD_DIM).transpose(1, 2)
