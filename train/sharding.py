"""The language model's parameters, gradients and optimizer state in slices, one per rank (torch's `fully_shard`).

Only the language model is sharded: every forward pass runs all of it, so all ranks gather and reduce the same things in
the same order whatever their batches hold. The small parts, which a batch without images does not use, stay whole on
every rank, and `World.sum_gradients` adds up their gradients. Checkpoints and exports hold whole tensors, so a run may
go on with another number of ranks, sharded or not.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from olavlm.model import OlaVlmForConditionalGeneration
from olavlm.model.modeling import PARTS
from train.distributed import World


def shard(model: OlaVlmForConditionalGeneration, world: World, dtype: torch.dtype | None) -> None:
    """Replace the language model's parameters by this rank's slices of the first rank's, in place.

    The model gets to the device layer by layer, so that it never has to hold more than one of them whole.

    Args:
        model: in main memory, with its parameters' final dtypes.
        world: two ranks or more; every one must call.
        dtype: bfloat16 to gather and compute in; None for the parameters' own. Gradients are summed in fp32.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.language_model.layers:
        _settle(layer, world)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    _settle(model, world)
    whole = {p for name, p in model.named_parameters() if not name.startswith(PARTS["language_model"])}
    root: Any = fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # A sum over ranks, not a mean: losses are normalised by global counts already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(
                True
            )  # without it a factor is applied by an operation of NCCL's own
    # Views among its outputs; nothing in the training step writes into an output.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _settle(module: nn.Module, world: World) -> None:
    """Move a module to its device; what is trained of it, and not in slices yet, becomes the first rank's."""
    module.to(world.device)
    world.broadcast([p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)])


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been called on the model."""
    return isinstance(model, FSDPModule)


def collect(tensors: dict[str, Tensor], world: World, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors as a file is to hold them, whole and in the first rank's memory; {} on the others. All must call.

    Args:
        tensors: by name; one with several names (a tied embedding) stays one.
        world: every rank.
        dtype: what to turn them into; None: their own.
    """
    found: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in found:
            whole = _whole(tensor.detach())
            found[id(tensor)] = whole.to("cpu", dtype) if world.rank == 0 else whole.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in tensors.items()} if world.rank == 0 else {}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, other: Tensor) -> Tensor:
    """`whole` as `other` is laid out: this rank's slice where that is sharded."""
    if not isinstance(other, DTensor) or whole.dim() == 0:
        return whole
    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients so that their norm, over whole and sharded ones together, is at most `largest`.

    Returns:
        The norm before, a scalar on the parameters' device.
    """
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = _whole(norms[0]) if len(norms) == 1 else torch.stack([_whole(n) for n in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest, norm)
    return norm
