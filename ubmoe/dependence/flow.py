"""A layer's own attention where no one kernel computes it: windows, soft caps, sinks, odd sizes.

Shapes: B texts, T tokens, R rows of a block, H heads, K key-value heads, d and e sizes of a head's
keys and values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ubmoe.dependence.shares import ROWS
from ubmoe.layered import visible


@dataclass(frozen=True)
class Rule:
    """A layer's own attention, beside its queries, keys and values."""

    scaling: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    sink: Tensor | None = None  # (H,), a score that takes weight and gives no value

    def visible(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(R, C) which columns a row may see."""
        return visible(rows, columns, self.causal, self.window)

    def windowed(self, tokens: int) -> bool:
        """Whether the window hides anything of a text."""
        return self.window is not None and self.window < tokens

    def maskable(self, key: Tensor, value: Tensor) -> bool:
        """Whether it is softmax attention with heads of one size under some mask: sdpa's.

        Unequal head sizes make sdpa fall back to its materialising kernel.
        """
        return not self.softcap and self.sink is None and key.shape[-1] == value.shape[-1]

    def plain(self, key: Tensor, value: Tensor) -> bool:
        """The same, causal or of all keys."""
        return self.maskable(key, value) and not self.windowed(key.shape[2])


def batch_flow(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, real: Tensor, masks: bool
) -> Tensor:
    """Attention of texts padded on the right: (B, H, T, d), (B, K, T, d), (B, K, T, e), (B, T) ->
    (B, H, T, e).

    masks: whether a window may be a T x T mask, as a GPU wants it; else it is walked along.
    """
    if rule.plain(key, value) or (masks and rule.maskable(key, value)):
        return _masked_flow(query, key, value, rule, real)
    texts = zip(query, key, value, real, strict=True)
    return torch.stack([flow(q, k, v, rule, row) for q, k, v, row in texts])


def _masked_flow(query: Tensor, key: Tensor, value: Tensor, rule: Rule, real: Tensor) -> Tensor:
    tokens = query.shape[2]
    mask = None if rule.causal else real[:, None, None]
    if rule.windowed(tokens):
        places = torch.arange(tokens, device=query.device)
        seen = rule.visible(places[:, None], places)
        mask = seen if mask is None else mask & seen
        # a row of padding behind the window of the last token sees itself alone
        mask = mask | torch.eye(tokens, dtype=torch.bool, device=query.device)
    causal = rule.causal and mask is None and tokens > 1
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=rule.scaling, enable_gqa=True
    )


def flow(query: Tensor, key: Tensor, value: Tensor, rule: Rule, real: Tensor) -> Tensor:
    """A text's own attention, never T x T: (H, T, d), (K, T, d), (K, T, e), (T,) -> (H, T, e)."""
    lows = range(0, query.shape[1], ROWS)
    blocks = [_flow_rows(query, key, value, low, rule, real) for low in lows]
    return torch.cat(blocks, dim=1).to(value.dtype)


def _flow_rows(
    query: Tensor, key: Tensor, value: Tensor, low: int, rule: Rule, real: Tensor
) -> Tensor:
    """(H, R, e) in fp32: the rows from `low` on, over no more keys than they may see."""
    heads, tokens, size = query.shape
    groups = len(key)
    high = min(low + ROWS, tokens)
    reach = rule.window or tokens
    left, right = max(0, low - reach), high if rule.causal else min(tokens, high + reach)
    keys = key[:, left:right].float().transpose(1, 2)  # (K, d, C)
    scores = (query[:, low:high].float() * rule.scaling).reshape(groups, -1, size) @ keys
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    rows = torch.arange(low, high, device=query.device)[:, None]
    columns = torch.arange(left, right, device=query.device)
    # a row of padding sees itself at least
    visible = rule.visible(rows, columns) & real[left:right] | (rows == columns)
    scores = scores.view(heads, high - low, -1).masked_fill(~visible, float("-inf"))
    if rule.sink is not None:
        sinks = rule.sink.float().view(heads, 1, 1).expand(-1, high - low, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : right - left]  # (H, R, C)
    mixed = weights.reshape(groups, -1, right - left) @ value[:, left:right].float()
    return mixed.view(heads, high - low, -1)
