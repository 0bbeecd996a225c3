"""Who decides which expert a token gets: the routers, or a forced route; and the experts' forward.

The mixture is a stock Qwen2-MoE: expert 0 is uni, expert 1 is bi, `mlp.gate` is the router of each
layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from ubmoe.bidirectional import is_bidirectional
from ubmoe.config import Route, UserError

UNI, BI = 0, 1
EXPERTS = "ubmoe"


def blocks(model: PreTrainedModel) -> list[Any]:
    """The sparse block of every layer."""
    inner: Any = model.base_model
    return [layer.mlp for layer in inner.layers]


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether every layer holds exactly a uni and a bi expert."""
    layers: Any = getattr(model.base_model, "layers", None)  # none under other families' names
    experts = (getattr(getattr(layer, "mlp", None), "experts", None) for layer in layers or [None])
    return all(getattr(expert, "num_experts", 0) == 2 for expert in experts)


def set_route(model: PreTrainedModel, route: Route) -> None:
    """Let the routers decide (`learned`), or force every token: `uni`, `bi`, `half` of each, `mode`
    (uni where the mask is causal, bi where it is bidirectional), or `average`, one FFN of averaged
    weights.

    A forced single route computes one FFN as the dense model does, bit for bit. Nothing of it is
    saved. Raises UserError for a model that is no mixture.
    """
    if not is_mixture(model):
        raise UserError(f"ubmoe.route: {model.name_or_path} is no mixture of two experts")
    model.set_experts_implementation(EXPERTS)
    for block in blocks(model):
        block.route = route
        if route == "learned":
            vars(block).pop("forward", None)
        else:  # neither a router nor the zero expert has anything to say
            block.forward = partial(FORCED[route], block.experts)


@contextmanager
def route_of(model: PreTrainedModel, route: Route) -> Iterator[PreTrainedModel]:
    """The model with a route that ends with the block."""
    before: Route = getattr(blocks(model)[0], "route", "learned")
    set_route(model, route)
    try:
        yield model
    finally:
        set_route(model, before)


def _half(experts: Any, states: Tensor) -> Tensor:
    return (_ffn(experts, UNI, states) + _ffn(experts, BI, states)) / 2


def _average(experts: Any, states: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj.mean(0).chunk(2)
    inner = experts.act_fn(linear(states, gate)) * linear(states, up)
    return linear(inner, experts.down_proj.mean(0))


def _by_mask(experts: Any, states: Tensor) -> Tensor:
    return _ffn(experts, BI if is_bidirectional(experts.config) else UNI, states)


def experts_forward(module: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """(tokens, D) states, (tokens, k) experts and weights -> (tokens, D).

    The public interface for another way to compute the experts. With two experts and k = 2 every
    token needs both, so nothing is gathered or scattered.
    """
    if index.shape[1] == 1:
        return _top_1(module, states, index[:, 0], weights)
    share = torch.where(index[:, :1] == BI, weights[:, :1], weights[:, 1:])  # (tokens, 1) of bi
    rest = torch.where(index[:, :1] == UNI, weights[:, :1], weights[:, 1:])
    uni, bi = _ffn(module, UNI, states), _ffn(module, BI, states)
    return (uni * rest + bi * share).to(states.dtype)


def _top_1(module: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.empty_like(states)
    for expert in (UNI, BI):
        chosen = (index == expert).nonzero()[:, 0]
        if len(chosen) == len(states):  # nothing to gather
            return (_ffn(module, expert, states) * weights).to(states.dtype)
        if len(chosen):
            values = _ffn(module, expert, states[chosen]) * weights[chosen]
            out = out.index_copy(0, chosen, values.to(states.dtype))
    return out


def _ffn(module: Any, expert: int, states: Tensor) -> Tensor:
    """One expert, in the very matrix products of the dense model."""
    gate, up = module.gate_up_proj[expert].chunk(2)
    inner = module.act_fn(linear(states, gate)) * linear(states, up)
    return linear(inner, module.down_proj[expert])


FORCED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "uni": lambda experts, states: _ffn(experts, UNI, states),
    "bi": lambda experts, states: _ffn(experts, BI, states),
    "half": _half,
    "average": _average,
    "mode": _by_mask,
}
ExpertsInterface.register(EXPERTS, experts_forward)
