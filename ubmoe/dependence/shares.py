"""Shares of the unmasked softmax of a batch, by blocks of rows: for scores that no kernel computes.

For every query row i of the unmasked, scaled scores s of one layer and head (UBMoE, ICML 2025,
section 3, as in its released `caculate_dp.py`, heiyonghua/ubmoe_llm 2f41795): main = exp(s_ii),
before = sum_{j<i} exp(s_ij), after = sum_{j>i} exp(s_ij), each over their sum.

Of the same sums come the share of the text's first token (`first`: before it for every row but its
own) and the triple with that key left out of every row (`without_first`): a language model sinks
attention that has nowhere to go there (Xiao et al., 2309.17453), and DP cannot be read without it.

Shapes: B texts, T tokens, H heads, K key-value heads, R rows of a block, d the size of a head.
"""

import torch
from torch import Tensor

ROWS = 32  # of a block: its scores, H x 32 x T in fp32, should stay in the processor's cache


def row_shares(
    query: Tensor,
    key: Tensor,
    scaling: float,
    softcap: float | None = None,
    real: Tensor | None = None,
    rows: int = ROWS,
) -> Tensor:
    """The COLUMNS of every head, as a mean over rows: (B, H, T, d), (B, K, T, d) -> (B, H, 7).

    real: (B, T), which tokens are no padding, where there is any (on the right). Independent sums
    in fp32 over all keys of a text, `rows` of them at a time; a sliding window or a sink of the
    flow does not limit what is observed, a softcap of the scores belongs to them. Of a text of one
    token nothing is left without its first: zeros. Nothing waits for the device.
    """
    texts, heads, tokens, _ = query.shape
    keys = key.float().transpose(2, 3)  # (B, K, d, T)
    blocks = []
    buffer = torch.empty(texts * heads * min(rows, tokens) * tokens, device=query.device)
    for low in range(0, tokens, rows):
        high = min(low + rows, tokens)
        scores = _scores(query[:, :, low:high], keys, scaling, softcap, buffer)  # (B, H, R, T)
        if real is not None:
            scores.masked_fill_(~real[:, None, None], float("-inf"))
        first = scores[..., 0].clone()
        scores[..., 0] = float("-inf")
        top, first = relative(scores.amax(-1), first)
        weights = scores.sub_(top[..., None]).exp_()
        square = weights[..., low:high]  # (B, H, R, R), the block on the diagonal
        main = square.diagonal(dim1=2, dim2=3)
        before = weights[..., :low].sum(-1) + square.tril(-1).sum(-1)
        after = weights[..., high:].sum(-1) + square.triu(1).sum(-1)
        columns = columns_of(torch.stack((main, before, after), dim=-1), first, low)
        blocks.append(sum_of_rows(columns, None if real is None else real[:, low:high]))
    return mean_of_rows(torch.stack(blocks).sum(0), real, tokens)


FARTHEST = 80.0  # e^80 is in float32's range, and e^-80 far below its precision


def relative(top: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of a row's scores but the first key's -> the maximum to subtract, and the first
    key's own exponential.

    A sink's score would make the others vanish.
    """
    top = torch.where(top.isinf(), first, top)  # a text of one token
    return top, (first - top).clamp_max(FARTHEST).exp()


def columns_of(rest: Tensor, first: Tensor, low: int = 0) -> Tensor:
    """The columns of the rows from `low` on: (B, H, R, 3) sums without the
    first key, (B, H, R) its own -> (B, H, R, 7).
    """
    at_first = torch.zeros_like(rest)
    at_first[..., 1] = first  # it comes before every row
    if low == 0:  # but its own
        at_first[:, :, 0] = at_first[:, :, 0].roll(-1, dims=-1)
    whole = rest + at_first
    total, left = whole.sum(-1, keepdim=True), rest.sum(-1, keepdim=True)
    without = rest / left.clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.cat((whole / total, first[..., None] / total, without), dim=-1)


def sum_of_rows(columns: Tensor, real: Tensor | None) -> Tensor:
    """(B, H, R, 7), (B, R) which are no padding -> (B, H, 7) in fp64."""
    if real is not None:
        columns = columns.masked_fill(~real[:, None, :, None], 0.0)
    return _double(columns).sum(2)


def mean_of_rows(total: Tensor, real: Tensor | None, tokens: int) -> Tensor:
    """(B, H, 7) sums over the texts' own rows, of (B, T) `real` ones or all `tokens`."""
    return total / (tokens if real is None else _double(real).sum(1)[:, None, None])


def _double(value: Tensor) -> Tensor:
    """In fp64, which Apple's devices lack."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def _scores(
    query: Tensor, keys: Tensor, scaling: float, softcap: float | None, buffer: Tensor
) -> Tensor:
    """Against all keys, in `buffer`: (B, H, R, d), (B, K, d, T) -> (B, H, R, T) in fp32."""
    texts, heads, rows, size = query.shape
    groups, tokens = keys.shape[1], keys.shape[3]
    scores = buffer[: texts * heads * rows * tokens].view(texts * groups, -1, tokens)
    queries = query.float().mul(scaling).reshape(texts * groups, -1, size)
    torch.bmm(queries, keys.reshape(texts * groups, size, tokens), out=scores)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.view(texts, heads, rows, tokens)


def unmasked_attention(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """The map that the shares come from, for a short text: (H, T, d), (K, T, d) -> (H, T, T)."""
    heads, tokens, _ = query.shape
    buffer = torch.empty(heads * tokens * tokens, device=query.device)
    keys = key[None].float().transpose(2, 3)
    return _scores(query[None], keys, scaling, softcap, buffer)[0].softmax(-1)
