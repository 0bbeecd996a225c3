"""The two-expert mixture: the original ("uni") and the bidirectionally tuned ("bi") FFN.

It is a stock Qwen2-MoE: expert 0 is uni, expert 1 is bi, `mlp.gate` is the router of each layer,
and the shared expert, which the architecture demands, is small and adds exactly zero. With x the
input of a layer's FFN and p = softmax(W x) over the two experts, the layer gives
p_uni FFN_uni(x) + p_bi FFN_bi(x) at top_k 2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ExpertsInterface

from ubmoe.config import Route, UserError
from ubmoe.models.lora import cast

UNI, BI = 0, 1
SHARED_SIZE = 16  # of the zero expert; size 0 loads in transformers, but not in other engines
EXPERTS = "ubmoe"
FREE = (
    "dtype",
    "use_cache",
    "transformers_version",
    "_name_or_path",
)  # may differ between uni and bi
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


# --- joining --------------------------------------------------------------------------------------


def join(uni: PreTrainedModel, bi: PreTrainedModel, top_k: int = 2) -> PreTrainedModel:
    """The mixture of two dense models that differ in their FFNs only; its routers are zero.

    The routers are float32 whatever the dtype of the rest. Raises UserError for models that are
    not Qwen2, whose shapes differ, or that differ outside the FFN: the mixture would drop that.
    """
    check_alike(uni, bi)
    with no_init_weights():
        model: Any = Qwen2MoeForCausalLM(mixture_config(uni.config, top_k))
    cast(model, uni.dtype)
    ffn, rest = _parted(uni.state_dict())
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for number, weights in enumerate((ffn, _parted(bi.state_dict())[0])):
        _put_expert(model, number, weights)
    for block in blocks(model):
        block.gate.float()
        block.gate.register_forward_pre_hook(_in_its_dtype)
    model.generation_config = uni.generation_config
    set_route(model, "learned")
    return model.to(uni.device).eval()


def _in_its_dtype(gate: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A float32 router reads bfloat16 states; a loader casts it, and needs no help."""
    return tuple(each.to(gate.weight.dtype) for each in inputs)


def mixture_config(dense: Any, top_k: int, experts: int = 2) -> Qwen2MoeConfig:
    """The Qwen2-MoE configuration of a dense Qwen2 one, every layer sparse, causal."""
    known = Qwen2MoeConfig().to_dict().keys() | {"head_dim"}
    same = {key: value for key, value in dense.to_dict().items() if key in known}
    return Qwen2MoeConfig(
        **same
        | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": dense.intermediate_size,
            "shared_expert_intermediate_size": SHARED_SIZE,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "qkv_bias": True,
            "is_causal": True,
        }
    )


def check_alike(uni: PreTrainedModel, bi: PreTrainedModel) -> None:
    """Raises UserError unless both are dense Qwen2 and equal outside the FFN, tensor by tensor."""
    for word, model in (("model.name", uni), ("ubmoe.bi", bi)):
        if model.config.model_type != "qwen2":
            raise UserError(
                f"{word}: {model.name_or_path} is {model.config.model_type}; expected qwen2 "
                "(Qwen2.5 or Qwen1.5), of which Qwen2-MoE is the mixture"
            )
    ours, theirs = uni.state_dict(), bi.state_dict()
    shapes = [name for name, value in ours.items() if _shape(theirs.get(name)) != value.shape]
    shapes += [name for name in theirs if name not in ours]
    if shapes:
        raise UserError(f"ubmoe.bi: other shapes than model.name in {_listed(shapes)}")
    configs = [mixture_config(model.config, 1).to_dict() for model in (uni, bi)]
    other = [key for key, value in configs[0].items() if value != configs[1][key]]
    if own := [key for key in other if key not in FREE]:
        raise UserError(f"ubmoe.bi: another {_listed(own)} than model.name; expected the same")
    differ = [
        name
        for name, value in ours.items()
        if ".mlp." not in name and not torch.equal(value, theirs[name].to(value))
    ]
    if differ:
        raise UserError(
            f"ubmoe.bi: differs from model.name outside the FFN, in {_listed(differ)}; the mixture "
            "would drop that; expected an encoder tuned with train: [ffn]"
        )


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _parted(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the FFNs, and the rest."""
    ffn = {name: value for name, value in weights.items() if ".mlp." in name}
    return ffn, {name: value for name, value in weights.items() if name not in ffn}


@torch.no_grad()
def _put_expert(model: PreTrainedModel, number: int, ffn: dict[str, Tensor]) -> None:
    for layer, block in enumerate(blocks(model)):
        gate, up, down = (ffn[f"model.layers.{layer}.mlp.{name}.weight"] for name in PROJECTIONS)
        block.experts.gate_up_proj[number].copy_(torch.cat((gate, up)))
        block.experts.down_proj[number].copy_(down)


def blocks(model: PreTrainedModel) -> list[Any]:
    """The sparse block of every layer."""
    inner: Any = model.base_model
    return [layer.mlp for layer in inner.layers]


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether every layer holds exactly a uni and a bi expert."""
    return all(
        getattr(getattr(mlp, "experts", None), "num_experts", 0) == 2 for mlp in blocks(model)
    )


# --- routes ---------------------------------------------------------------------------------------


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
    return _ffn(experts, BI if getattr(experts.config, "is_causal", True) is False else UNI, states)


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


# --- routers --------------------------------------------------------------------------------------


def routers(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The (2, D) weights of every layer's router, by name."""
    return {
        name: value for name, value in model.named_parameters() if name.endswith(".mlp.gate.weight")
    }


@torch.no_grad()
def start_routers(model: PreTrainedModel, seed: int) -> None:
    """`router_init: normal`: N(0, initializer_range), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for value in routers(model).values():
        drawn = torch.randn(value.shape, generator=generator)
        value.copy_(drawn * model.config.initializer_range)


MARGIN = 4.0  # logit of uni over bi that the fitted direction aims at: a share of 0.98


@torch.no_grad()
def fit_routers(model: PreTrainedModel, batches: list[Tensor], ridge: float = 1e-3) -> None:
    """`router_init: uni`: the direction w of least squares with x . w = 1 for the FFN inputs x.

    A router has no bias, so a constant preference has to be a direction that all inputs share.
    `batches` are (1, T) token ids; the inputs are those of the uni route. The rows become
    +-MARGIN / 2 times w; `ridge` is relative to the mean square of the inputs.
    """
    sums = [_Moments(block.gate.weight) for block in blocks(model)]
    hooks = [b.register_forward_pre_hook(s) for b, s in zip(blocks(model), sums, strict=True)]
    try:
        with route_of(model, "uni"):
            for ids in batches:
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for block, moments in zip(blocks(model), sums, strict=True):
        direction = moments.direction(ridge).to(block.gate.weight)
        block.gate.weight.copy_(torch.stack((direction, -direction)) * MARGIN / 2)


class _Moments:
    """Sums of x x^T and x over the tokens that a router has seen, in float64."""

    def __init__(self, weight: Tensor) -> None:
        width = weight.shape[1]
        self.square = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].reshape(-1, len(self.total)).cpu().double()
        self.square += states.T @ states
        self.total += states.sum(0)

    def direction(self, ridge: float) -> Tensor:
        scale = ridge * self.square.trace() / len(self.total)
        return torch.linalg.solve(self.square + scale * torch.eye(len(self.total)), self.total)


@torch.no_grad()
def bi_share(model: PreTrainedModel, batches: list[Tensor]) -> list[Tensor]:
    """What each (1, T) text's routers give to bi: (layers, T) probabilities for each text."""
    shares = []
    for ids in batches:
        output: Any = model.base_model(
            input_ids=ids.to(model.device), use_cache=False, output_router_logits=True
        )
        logits = torch.stack([each.float().cpu() for each in output.router_logits])
        shares.append(logits.softmax(-1)[..., BI])
    return shares
