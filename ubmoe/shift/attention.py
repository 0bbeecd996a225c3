"""Attention in which the score of the text's first key is shifted by a constant, in every head.

A head gives that key a share `first` of its unmasked attention, as DP counts it. A shift moves this
share to whatever is wanted, and of the other keys their shares among themselves stay: DP-after
becomes (1 - first) times what it is without the first key, which is as it was in this head.

Shapes: B texts, T tokens, L layers, H heads, K key-value heads, d and e sizes of a head's keys and
values.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ubmoe.config import UserError

REACH = 30.0  # of a shift: e^30 times the first key's weight, or that part of it
HALVINGS = 40  # of this interval, to float32's precision


@dataclass
class Shifts:
    """An attention function for causal reading.

    by_layer: (H,) what is added to the first key's scores. wanted: (L, H) shares of that key; where
    they are given, a forward finds the shifts that give them, over its texts, layer after layer:
    each sees what was shifted before it. seen: of every layer of the last forward, (B, H, 2) the
    shares of the first key and of the keys after a row, as means over the rows of a text.
    """

    by_layer: dict[int, Tensor] = field(default_factory=dict)
    wanted: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(B, H, T, d), (B, K, T, d), (B, K, T, e), a (B, T) padding mask -> (B, T, H, e)."""
        _refuse(module, others)
        layer: Any = module.layer_idx
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        repeats = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
        if attention_mask is None:
            attention_mask = torch.ones(len(query), query.shape[2], device=query.device)
        real = attention_mask.bool()
        scores = [
            (scaling * one[:, own].float()) @ other[:, own].float().transpose(1, 2)
            for one, other, own in zip(query, key, real, strict=True)
        ]  # (H, t, t) each, of its t tokens
        if self.wanted is not None:
            self.by_layer[layer] = shifts_to([_odds(each) for each in scores], self.wanted[layer])
        output = value.new_zeros(*query.shape[:3], value.shape[-1])
        for text, each in enumerate(scores):
            if layer in self.by_layer:
                each[..., 0] += self.by_layer[layer][:, None]
            hidden = torch.ones_like(each, dtype=torch.bool).triu(1)
            weights = each.masked_fill(hidden, float("-inf")).softmax(-1)
            output[text, :, real[text]] = (weights @ value[text, :, real[text]].float()).to(value)
        self.seen.append(torch.stack([_shares(each) for each in scores]).cpu())
        return output.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, others: dict[str, Any]) -> None:
    """Raises UserError for attention that is more than a causal softmax."""
    window = others.get("sliding_window") or getattr(module, "sliding_window", None)
    more = {"a window": window, "a softcap": others.get("softcap"), "sinks": others.get("s_aux")}
    for said, value in more.items():
        if value is not None:
            raise UserError(f"model.name: attends with {said}; its first key cannot be shifted")


def _odds(scores: Tensor) -> Tensor:
    """(H, T) log of the first key's weight over that of all others: the logit of its share."""
    return scores[..., 0] - scores[..., 1:].logsumexp(-1)


def shifts_to(odds: list[Tensor], wanted: Tensor) -> Tensor:
    """(H,) what moves the mean share of the first key to `wanted`, (H,), by halving.

    odds: of every text (H, T); a share is the sigmoid of odds and shift. The mean is over texts of
    means over rows, as of DP. At most REACH either way, where no shift reaches it.
    """
    low = torch.full_like(wanted, -REACH)
    high = -low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        shares = [(each + middle[:, None]).sigmoid().mean(1) for each in odds]
        too_low = torch.stack(shares).mean(0) < wanted
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2


def _shares(scores: Tensor) -> Tensor:
    """(H, 2) of the unmasked softmax: of the first key, and of those after a row."""
    weights = scores.softmax(-1)
    return torch.stack([weights[..., 0].mean(1), weights.triu(1).sum(-1).mean(1)], -1)
