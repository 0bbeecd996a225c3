"""Shares of the unmasked softmax from flash kernels: no scores are ever written, at any length.

A row's keys fall into four parts: the text's first, the row's own, those between, and those after.
Each part's sum is a log-sum-exp of its own: one causal kernel gives that of the keys between, and
another, over the texts read backwards, that of the keys after. No part is a difference of others,
so that none is negative and a sink drowns nothing. The kernels' outputs, weighed by these sums, are
the layer's own attention too: all together costs one causal attention more than the layer's.

Shapes: B texts, T tokens, R rows, H heads, K key-value heads, d the size of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten
FLASH_SIZES = range(8, 257, 8)  # of a head, that CUDA's flash and efficient kernels take
FLASH_CAPABILITY = (8, 0)  # of a GPU, from which flash kernels take half precision
NO_KEY = torch.finfo(torch.float32).min  # a score that any other makes vanish, and no NaN
LEAD = 2  # rows that have no key between the first and their own


class Texts:
    """Where a batch's texts stand, (B, T): from the first column on, with padding behind them.

    Shared by all layers: the padding rows and the first one, each row's place when its text is
    read backwards (padding stays), and the factors that turn sums over rows into means.
    """

    def __init__(self, mask: Tensor) -> None:
        self.real = mask.bool()
        places = torch.arange(mask.shape[1], device=mask.device)
        lengths = mask.sum(1, keepdim=True)
        self.padding = ~self.real[:, None, :, None]
        self.first_row = places == 0
        self.backwards = torch.where(self.real, lengths - 1 - places, places)[:, None]
        # of a text of one token nothing is left without its first
        kept = torch.cat(((lengths > 0).expand(-1, 4), (lengths > 1).expand(-1, 3)), 1)
        self.factors = (kept / lengths.double())[:, None]  # (B, 1, 7)


def computed_here(query: Tensor) -> bool:
    """Whether a kernel of this device gives the log-sum-exp of such queries, (B, H, T, d)."""
    kind = query.device.type
    return kind == "cpu" or (kind == "cuda" and query.shape[-1] in FLASH_SIZES)


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of each row to the keys up to its own number, and the log-sum-exp of its scores:
    (B, H, R, d), (B, K, R, d), (B, K, R, d) -> (B, H, R, d), and (B, H, R) in fp32.
    """
    if not query.shape[2]:
        return query, query[..., 0].float()
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scaling
        )
    if _flashes(query):
        mixed, log, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, scale=scaling
        )
        return mixed, log
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    mixed, log, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=scaling
    )
    return mixed, log.narrow(2, 0, query.shape[2])  # its rows are rounded up


def _flashes(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY


class Parts(NamedTuple):
    """The keys of every row in four parts: the text's first, the row's own, those between, after.

    logs: (B, H, T, 4) in fp32, the log of each part's sum; the first row's own key counts as the
    first alone. between, after: the means of these keys' values, (B, H, T - LEAD, d) of the rows
    that have any, and (B, H, T, d), where it is asked for.
    """

    logs: Tensor
    between: Tensor
    after: Tensor | None

    def shares(self, texts: Texts) -> Tensor:
        """The COLUMNS as a mean over the texts' own rows, (B, H, 7) in fp64."""
        whole, without = self.logs.softmax(-1), self.logs[..., 1:].softmax(-1)
        rows = torch.cat((whole, without), -1).masked_fill_(texts.padding, 0.0)
        means = rows.sum(2, dtype=torch.float64) * texts.factors
        first, itself, between, after, *rest = means.unbind(-1)
        at_itself = whole[:, :, 0, 0] * texts.factors[..., 0]  # the first row's first key
        before = between + (first - at_itself)
        return torch.stack((itself + at_itself, before, after, first, *rest), -1)

    def flow(self, value: Tensor) -> Tensor:
        """The attention itself, (B, H, T, d) in fp32, over the parts whose values there are."""
        count = 3 if self.after is None else 4
        first, itself, between, *after = self.logs[..., :count].softmax(-1)[..., None].unbind(3)
        values = value.repeat_interleave(first.shape[1] // value.shape[1], 1)
        total = torch.addcmul(itself * values, first, values[:, :, :1])
        total[:, :, LEAD:].addcmul_(between[:, :, LEAD:], self.between)
        if self.after is not None:
            total.addcmul_(after[0], self.after)
        return total


def parts_of(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scaling: float,
    texts: Texts,
    bidirectional: bool = False,
) -> Parts:
    """The Parts of (B, H, T, d) queries, (B, K, T, d) keys and values, all of one dtype.

    value: where the flow is asked for; bidirectional: where it sees the keys after a row, too.
    """
    first, itself = _scores_of_two(query, key, scaling)
    itself.masked_fill_(texts.first_row, NO_KEY)
    keys, values = (None if states is None else states[:, :, 1:-1] for states in (key, value))
    assert keys is not None
    between, log = causal(query[:, :, LEAD:], keys, keys if values is None else values, scaling)
    log_between = pad(log, (min(LEAD, query.shape[2]), 0), value=float("-inf"))
    after, log_after = _after(query, key, value if bidirectional else None, scaling, texts)
    return Parts(torch.stack((first, itself, log_between, log_after), -1), between, after)


def _scores_of_two(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Against the first key and against the row's own, each (B, H, T) in fp32.

    Products, and no matrix product: that one may be rounded to ten bits on a GPU.
    """
    queries = query.unflatten(1, (key.shape[1], -1)).float() * scaling  # (B, K, H / K, T, d)
    keys = key[:, :, None].float()
    first, itself = (
        (queries * compared).sum(-1).flatten(1, 2) for compared in (keys[:, :, :, :1], keys)
    )
    return first, itself


def _after(
    query: Tensor, key: Tensor, value: Tensor | None, scaling: float, texts: Texts
) -> tuple[Tensor | None, Tensor]:
    """The keys after each row: the means of their values where these are given, (B, H, T, d),
    and the log of the sum, (B, H, T).
    """
    tensors = [query, key] if value is None else [query, key, value]
    place = texts.backwards[..., None].expand(
        -1, sum(t.shape[1] for t in tensors), -1, query.shape[3]
    )
    turned = torch.cat(tensors, 1).gather(2, place).split([t.shape[1] for t in tensors], 1)
    keys = turned[1][:, :, :-1]
    values = keys if value is None else turned[2][:, :, :-1]
    mixed, log = causal(turned[0][:, :, 1:], keys, values, scaling)
    heads = query.shape[1]
    log = pad(log, (1, 0), value=float("-inf")).gather(2, texts.backwards.expand(-1, heads, -1))
    if value is None:
        return None, log
    return pad(mixed, (0, 0, 1, 0)).gather(2, place[:, :heads]), log
