"""Sharded training: each process holds its part of the weights, gradients and optimiser state.

torch's `fully_shard` (FSDP2) over the modules all of whose weights train. What is frozen stays
whole on every device.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ubmoe.config import TrainingSection, UserError

log = logging.getLogger(__name__)
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")  # their state has the shape of the weights
THROUGH = (PreTrainedModel, GradientCheckpointingLayer, nn.ModuleList)  # never one part


@contextmanager
def sharding(
    model: PreTrainedModel, section: TrainingSection, distributed: str, bf16: bool
) -> Iterator[None]:
    """Inside, under `fsdp2` and several processes, what trains is float32 and in parts.

    Copies are sharded, one after the other, and stand in the modules' places; the modules return
    with the trained weights, in their own dtype, when the body has ended well. Raises UserError
    for what cannot be sharded.
    """
    count = PartialState().num_processes
    if distributed != "fsdp2" or count == 1:
        yield
        return
    if section.optim not in OPTIMIZERS:
        raise UserError(
            f"optim: {section.optim} is not for distributed: fsdp2; expected "
            f"{' or '.join(OPTIMIZERS)}, or distributed: ddp"
        )
    _refuse_shared(model)
    mesh, places = init_device_mesh(model.device.type, (count,)), list(_parts(model))
    kept = [getattr(parent, name) for parent, name in places]
    for parent, name in places:
        setattr(parent, name, _sharded_copy(getattr(parent, name), mesh, bf16))
    shared = FSDPRoot([getattr(parent, name) for parent, name in places])
    fully_shard(shared, mesh=mesh)
    shared()
    log.info("fsdp2: %d modules train, in %d parts", len(places), count)
    yield
    for (parent, name), module in zip(places, kept, strict=True):
        _fill(module, getattr(parent, name))
        setattr(parent, name, module)


class FSDPRoot(nn.Module):
    """Makes the modules one FSDP model: called once, it lets them share streams and prefetching.

    The language model itself cannot be its root: `fully_shard` would change its class for good.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self) -> None:
        """Nothing to compute: the modules are called from their places in the model."""


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of the largest modules inside a layer all of whose weights train."""
    for name, child in module.named_children():
        train = [value.requires_grad for value in child.parameters()]
        if train and all(train) and not isinstance(child, THROUGH):
            yield module, name
        elif any(train):
            yield from _parts(child)


def _refuse_shared(model: nn.Module) -> None:
    """Raises UserError for a weight that trains in two modules: each would have its own."""
    parameters = model.named_parameters(remove_duplicate=False)
    uses = Counter(value for _, value in parameters if value.requires_grad)
    if any(count > 1 for count in uses.values()):
        raise UserError(
            "train: the embedding is also the head of this model, and cannot train under "
            "distributed: fsdp2; expected ffn, attention or ffn_up_down, or distributed: ddp"
        )


def _sharded_copy(module: nn.Module, mesh: Any, bf16: bool) -> nn.Module:
    """A sharded float32 copy; the module itself is emptied.

    Under autocast a linear layer uses its weights in bfloat16, and gets them so; others, norms
    and embeddings, use them as they are.
    """
    leaves = [
        leaf for leaf in module.modules() if next(leaf.parameters(recurse=False), None) is not None
    ]
    policy = MixedPrecisionPolicy()
    if bf16 and all(isinstance(leaf, nn.Linear) for leaf in leaves):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    sharded = copy.deepcopy(module).float()
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for value in module.parameters():
        value.data = value.data.new_empty(0)
    return sharded


@torch.no_grad()
def _fill(module: nn.Module, trained: nn.Module) -> None:
    """Give an emptied module the weights of its sharded copy."""
    for value, trained_value in zip(module.parameters(), trained.parameters(), strict=True):
        value.data = whole(trained_value.detach()).to(value.dtype)


def max_over_processes(count: int, device: torch.device) -> int:
    """The largest of the processes' counts."""
    largest = torch.tensor(count, device=device)
    all_reduce(largest, ReduceOp.MAX)
    return int(largest)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(value, DTensor) for value in model.parameters())


def whole(value: Tensor) -> Tensor:
    """All of a tensor; where it is in parts, every process has to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def alike(value: Tensor, target: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `own`; all of it if that is whole."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def gathered(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's state as one process would have it, on the CPU; {} but on the first one."""
    main = PartialState().is_main_process
    state_dict, states = optimizer.state_dict(), {}
    for number, state in state_dict["state"].items():
        full = {name: whole(value) for name, value in state.items()}
        if main:
            states[number] = {name: value.cpu() for name, value in full.items()}
    return state_dict | {"state": states} if main else {}


def scattered(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole state with this process's parts of it, for `optimizer.load_state_dict`."""
    weights = [value for group in optimizer.param_groups for value in group["params"]]
    states = {
        number: {
            name: alike(value, weights[number]) if value.shape == weights[number].shape else value
            for name, value in state.items()
        }
        for number, state in saved["state"].items()
    }
    return saved | {"state": states}
