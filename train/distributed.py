"""The processes of a run: what torchrun started, or just this one. On a single process they all do next to nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from olavlm import runs

#: How long a rank waits for another in a collective. Not NCCL's ten minutes: the first one pins a large corpus on an
#: object store, writes a checkpoint of 100 GB and checks one while the others wait. A rank that dies torchrun notices.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among those of the run, and its device; a context manager that parts from them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> "World":
        """Join the processes torchrun started (nccl on GPUs, gloo on CPUs); without torchrun, a world of one."""
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        return cls(int(os.environ.get("RANK", 0)), size, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Part from the other processes; not on an error, which often is this one's alone.

        On GPUs parting waits for what the others are at, and they wait for this process: the reason would never be
        told. This way the process tells it and ends, and torchrun ends the others.
        """
        if self.size > 1 and error is None:
            dist.destroy_process_group()

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """`runs.alone` for all ranks: whoever else is at work in the folder, no rank has changed anything in it."""
        with runs.alone(folder) if self.rank == 0 else nullcontext():
            self.barrier()
            yield

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """All ranks' rows, in rank order, and the number of the first that is this rank's.

        Args:
            rows: (n, width, …); n may differ between ranks and be 0.
        """
        if self.size == 1:
            return rows, 0
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        lengths: list[int] = self.sum(counts).tolist()
        if not any(lengths):
            return rows, 0
        # As bytes, padded to the longest: every backend can gather those, whatever the codec's dtype.
        flat = rows.flatten(1).contiguous().view(torch.uint8)
        padded = flat.new_zeros((max(lengths), flat.shape[1]))
        padded[: len(rows)] = flat
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        joined = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return joined.view(rows.dtype).reshape(len(joined), *rows.shape[1:]), sum(lengths[: self.rank])

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum every gradient over the ranks; a parameter without one (no image in the batch) gets zeros, always.

        A sum, not a mean: losses are normalised by the counts of the global batch already. It happens once, after
        the last micro-step, so that accumulation costs no traffic. Sharded gradients are summed already.
        """
        parameters = [p for p in parameters if not isinstance(p, DTensor)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
        for work in pending:
            work.wait()

    def broadcast(self, parameters: list[nn.Parameter]) -> None:
        """Give every rank the first one's values."""
        if self.size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)
