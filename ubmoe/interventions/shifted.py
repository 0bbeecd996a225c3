"""Attention in which the score of the text's first key is shifted by a constant, in every head.

Read causally, a head gives that key a share of what a row sees. A shift moves this share to
whatever is wanted; of the other keys a row's shares among themselves stay, as long as its input is
the same. Of the unmasked attention, which DP counts, the first key's share and DP-after move along.

Shapes: B texts, T tokens, t of them no padding, L layers, H heads, K key-value heads, d and e sizes
of a head's keys and values.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ubmoe.config import UserError

REACH = 30.0  # of a shift: e^30 times the first key's weight, or that part of it
HALVINGS = 40  # of this interval, to float32's precision
# Measured of every head: the first key's share of a causal row, and of the unmasked softmax
# DP's `first`, DP-after, and DP-after without the first key.
SEEN = ("used", "first", "after", "after without first")
MORE = ("softcap", "s_aux", "indices", "block_indices")  # than a softmax over all earlier tokens


@dataclass(eq=False)
class Shifts:
    """An attention function for causal reading.

    by_layer: (H,) added to the first key's scores. scales: (H,) by which a layer's heads' outputs
    are multiplied. wanted: (L, H) shares that the first key
    should get of what causal rows see; where they are given, a forward finds the shifts that do so
    over its texts, layer after layer: each sees what was shifted before it. seen: (B, H, 4) of
    every layer since it was cleared, SEEN as means over the rows of a text. rows: where it is a
    list, (H, rows) the used share of every row of a layer's texts.
    """

    by_layer: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, Tensor] = field(default_factory=dict)
    wanted: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] | None = None

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
        _refuse(module, query.shape[2], others)
        layer: Any = module.layer_idx
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        repeats = query.shape[1] // key.shape[1]
        key, values = (states.repeat_interleave(repeats, 1) for states in (key, value))
        if attention_mask is None:
            attention_mask = torch.ones(len(query), query.shape[2], device=query.device)
        real = attention_mask.bool()

        def scores(text: int) -> Tensor:
            """(H, t, t) in fp32, of one text: those of a batch would not fit."""
            q, k = (states[text, :, real[text]].to(value.dtype).float() for states in (query, key))
            return scaling * q @ k.transpose(1, 2)

        output, seen, rows = value.new_zeros(*query.shape[:3], value.shape[-1]), [], []
        with torch.autocast(query.device.type, enabled=False):  # which would round the shares
            if self.wanted is not None:
                odds = [_odds(_causal(scores(text))) for text in range(len(query))]
                self.by_layer[layer] = shifts_to(odds, self.wanted[layer])
            for text in range(len(query)):
                whole = scores(text)
                if layer in self.by_layer:
                    whole[..., 0] += self.by_layer[layer][:, None]
                weights = _causal(whole).softmax(-1)
                mixed = weights @ values[text, :, real[text]].float()
                if layer in self.scales:
                    mixed *= self.scales[layer][:, None, None]
                output[text, :, real[text]] = mixed.to(value.dtype)
                seen.append(_seen(whole, weights))
                rows.append(weights[..., 0])
        self.seen.append(torch.stack(seen).cpu())
        if self.rows is not None:
            self.rows.append(torch.cat(rows, 1).cpu())
        return output.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, tokens: int, others: dict[str, Any]) -> None:
    """Raises UserError for attention that is more than a causal softmax over all earlier tokens."""
    window = others.get("sliding_window") or getattr(module, "sliding_window", None) or tokens
    more = [name for name in MORE if others.get(name) is not None]
    more += ["sliding_window"] if window < tokens else []
    if more:
        raise UserError(
            f"{type(module).__name__} attends with {', '.join(more)}; expected a softmax "
            "over all earlier tokens, as Llama's or Qwen2's: its first key cannot be shifted"
        )


def _causal(scores: Tensor) -> Tensor:
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf"))


def _odds(scores: Tensor) -> Tensor:
    """(H, t) log of the first key's weight over that of all others: the logit of its share."""
    return scores[..., 0] - scores[..., 1:].logsumexp(-1)


def shifts_to(odds: list[Tensor], wanted: Tensor) -> Tensor:
    """(H,) shifts that move the mean share of the first key to `wanted`, (H,), by bisection.

    odds: of every text (H, t); a share is the sigmoid of odds and shift. The mean is over texts of
    means over rows, as of DP. REACH at most, where no shift reaches it.
    """
    low = torch.full_like(wanted, -REACH)
    high = -low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        shares = [(of_text + middle[:, None]).sigmoid().mean(1) for of_text in odds]
        too_low = torch.stack(shares).mean(0) < wanted
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2


def _seen(scores: Tensor, weights: Tensor) -> Tensor:
    """(H, 4), SEEN. scores: unmasked; weights: the causal ones."""
    unmasked = scores.softmax(-1)
    after = unmasked.triu(1).sum(-1)
    without = scores[..., 1:].softmax(-1).triu().sum(-1)  # of the keys from the second on
    columns = (weights[..., 0], unmasked[..., 0], after, without)
    return torch.stack([column.mean(1) for column in columns], -1)
