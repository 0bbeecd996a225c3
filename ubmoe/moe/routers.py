"""The routers' weights: how they start, and what they give to the bi expert."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ubmoe.config import MoeSection
from ubmoe.data.chats import Chat
from ubmoe.moe.routes import BI, blocks, route_of

log = logging.getLogger(__name__)
FITTED_ON = 100  # chats that `router_init: uni` is fitted on
ROLES = ("prompt", "answer", "template", "punctuation")


def router_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The (2, D) weights of every layer's router, by name."""
    return {
        name: value for name, value in model.named_parameters() if name.endswith(".mlp.gate.weight")
    }


@torch.no_grad()
def start_routers(model: PreTrainedModel, seed: int) -> None:
    """`router_init: normal`: N(0, initializer_range), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for value in router_weights(model).values():
        drawn = torch.randn(value.shape, generator=generator)
        value.copy_(drawn * model.config.initializer_range)


MARGIN = 4.0  # logit of uni over bi that the fitted direction aims at: a share of 0.98
RIDGE = 1e-3  # of the fit, relative to the mean square of the inputs


@torch.no_grad()
def fit_routers(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """`router_init: uni`: the direction w of least squares with x . w = 1 for the FFN inputs x.

    A router has no bias, so a constant preference has to be a direction that all inputs share.
    `batches` are (1, T) token ids; the inputs are those of the uni route. The rows become
    +-MARGIN / 2 times w.
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
        direction = moments.direction().to(block.gate.weight)
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

    def direction(self) -> Tensor:
        scale = RIDGE * self.square.trace() / len(self.total)
        return torch.linalg.solve(self.square + scale * torch.eye(len(self.total)), self.total)


@torch.no_grad()
def bi_share(model: PreTrainedModel, batches: list[Tensor]) -> list[Tensor]:
    """The routers' weight of bi in each (1, T) text: (layers, T) probabilities for each text."""
    shares = []
    for ids in batches:
        output: Any = model.base_model(
            input_ids=ids.to(model.device), use_cache=False, output_router_logits=True
        )
        logits = torch.stack([router_logit.float() for router_logit in output.router_logits])
        shares.append(logits.softmax(-1)[..., BI])
    return shares


def start(
    model: PreTrainedModel,
    settings: MoeSection,
    chats: list[Chat],
    held_out: list[Chat],
    seed: int,
) -> dict[str, Any]:
    """Set the routers as `router_init` says; returns the share of held-out tokens on the uni side.

    `zeros` is the exact average of the two FFNs at top_k 2.
    """
    if settings.router_init == "normal":
        start_routers(model, seed)
    elif settings.router_init == "uni":
        fit_routers(model, [torch.tensor([chat.ids]) for chat in chats[:FITTED_ON]])
    texts = [torch.tensor([chat.ids]) for chat in held_out[:FITTED_ON]]
    uni_side = torch.cat([share.flatten() < 0.5 for share in bi_share(model, texts)])
    report = {"uni_side_percent": uni_side.float().mean().item() * 100}
    said = "routers start from %s: of held-out tokens %.1f %% are on the uni side"
    log.info(said, settings.router_init, report["uni_side_percent"])
    return report


def shares_by_role(model: PreTrainedModel, chats: list[Chat]) -> list[dict[str, float | None]]:
    """For each layer, the mean weight of bi over the tokens of each role; None without such."""
    shares = torch.cat(bi_share(model, [torch.tensor([chat.ids]) for chat in chats]), dim=1)
    weights = shares.cpu().double().numpy()
    roles = np.array([role for chat in chats for role in chat.roles])
    places = {role: roles == role for role in ROLES}
    return [
        {role: float(layer[at].mean()) if at.any() else None for role, at in places.items()}
        for layer in weights
    ]
