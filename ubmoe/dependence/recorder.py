"""Attention that is recorded: a model's own flow, and where attention would go, were it unmasked.

For every query row i of the unmasked, scaled scores s of one layer and head (UBMoE, ICML 2025,
section 3, as in its released `caculate_dp.py`, heiyonghua/ubmoe_llm 2f41795): main = exp(s_ii),
before = sum_{j<i} exp(s_ij), after = sum_{j>i} exp(s_ij), each over their sum. The T x T scores
never exist: one attention function, registered through transformers' AttentionInterface, walks over
blocks of rows, and sees each text without its padding, so that any decoder is measured and no model
code is copied.

Of the same sums come the share of the text's first token (`first`: before it for every row but its
own) and the triple with that key left out of every row (`without_first`): a language model sinks
attention that has nowhere to go there (Xiao et al., 2309.17453), and DP cannot be read without it.

On a GPU a batch is measured whole, in blocks as large as its free memory allows.

Shapes: B texts, T tokens, L layers, H heads, K key-value heads, R rows of a block, d and e sizes of
a head's keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from ubmoe.bidirectional import is_bidirectional, prove_attention
from ubmoe.config import UserError
from ubmoe.layered import looks_both_ways, partial_layers, visible

NAME = "dependence"
ROWS = 32  # of a block: its scores, H x 32 x T in fp32, should stay in the processor's cache
SCORE_BYTES = 8  # of a score in fp32, and of the copies that are made of those near the diagonal
SHARE = 4  # of an accelerator's free memory, that scores may take


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
        weights, first = _apart(scores)
        square = weights[..., low:high]  # (B, H, R, R), the block on the diagonal
        main = square.diagonal(dim1=2, dim2=3)
        before = weights[..., :low].sum(-1) + square.tril(-1).sum(-1)
        after = weights[..., high:].sum(-1) + square.triu(1).sum(-1)
        columns = _columns(torch.stack((main, before, after), dim=-1), first, low)
        if real is not None:
            columns = columns * real[:, None, low:high, None]
        blocks.append(columns.sum(2))
    total = _double(torch.stack(blocks)).sum(0)
    return total / (tokens if real is None else _double(real).sum(1)[:, None, None])


def _double(value: Tensor) -> Tensor:
    """In fp64, which Apple's devices lack."""
    return (value.cpu() if value.device.type == "mps" else value).double()


FARTHEST = 80.0  # e^80 is in float32's range, and e^-80 far below its precision


def _apart(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of (B, H, R, T) scores, in place with 0 for the first key, and (B, H, R) of it.

    Relative to the largest of the others, which a sink's score would make vanish.
    """
    first = scores[..., 0].clone()
    scores[..., 0] = float("-inf")
    top = scores.amax(-1)
    top = torch.where(top.isinf(), first, top)  # a text of one token
    weights = scores.sub_(top[..., None]).exp_()
    return weights, (first - top).clamp_max(FARTHEST).exp()


def _columns(rest: Tensor, first: Tensor, low: int) -> Tensor:
    """Of rows from `low` on: (B, H, R, 3) sums without the first key, (B, H, R) its own ->
    (B, H, R, 7).
    """
    at_first = torch.zeros_like(rest)
    at_first[..., 1] = first  # it comes before every row
    if low == 0:  # but its own
        at_first[:, :, 0] = at_first[:, :, 0].roll(-1, dims=-1)
    whole = rest + at_first
    total, left = whole.sum(-1, keepdim=True), rest.sum(-1, keepdim=True)
    without = rest / left.clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.cat((whole / total, first[..., None] / total, without), dim=-1)


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


@dataclass(frozen=True)
class Rule:
    """What a layer's own attention is, beside its queries, keys and values."""

    scaling: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    sink: Tensor | None = None  # (H,), a score that takes weight and gives no value

    def visible(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(R, C) which columns a row may see."""
        return visible(rows, columns, self.causal, self.window)


def flow(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """A text's own attention, never T x T: (H, T, d), (K, T, d), (K, T, e) -> (H, T, e)."""
    tokens = query.shape[1]
    windowed = rule.window is not None and rule.window < tokens
    # Unequal head sizes make sdpa fall back to its materialising kernel.
    if windowed or rule.softcap or rule.sink is not None or key.shape[-1] != value.shape[-1]:
        blocks = [_flow_rows(query, key, value, low, rule) for low in range(0, tokens, ROWS)]
        return torch.cat(blocks, dim=1).to(value.dtype)
    repeats = query.shape[0] // key.shape[0]
    key, value = (each.repeat_interleave(repeats, 0)[None] for each in (key, value))
    causal = rule.causal and tokens > 1
    return scaled_dot_product_attention(
        query[None], key, value, is_causal=causal, scale=rule.scaling
    )[0]


def batch_flow(query: Tensor, key: Tensor, value: Tensor, rule: Rule, real: Tensor) -> Tensor:
    """`flow` of texts padded on the right: (B, H, T, d), (B, K, T, d), (B, K, T, e), (B, T) ->
    (B, H, T, e).
    """
    tokens, texts = query.shape[2], []
    if rule.softcap or rule.sink is not None or key.shape[-1] != value.shape[-1]:
        for number, row in enumerate(real):  # padding is behind what a causal row sees
            end = tokens if rule.causal else int(row.sum())
            q, k, v = (each[number, :, :end] for each in (query, key, value))
            texts.append(pad(flow(q, k, v, rule), (0, 0, 0, tokens - end)))
        return torch.stack(texts)
    mask = None if rule.causal else real[:, None, None]
    if rule.window is not None and rule.window < tokens:
        places = torch.arange(tokens, device=query.device)
        seen = rule.visible(places[:, None], places)
        mask = seen if mask is None else mask & seen
        # a row of padding behind the window of the last token sees itself alone
        mask = mask | torch.eye(tokens, dtype=torch.bool, device=query.device)
    causal = rule.causal and mask is None and tokens > 1
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=rule.scaling, enable_gqa=True
    )


def _flow_rows(query: Tensor, key: Tensor, value: Tensor, low: int, rule: Rule) -> Tensor:
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
    visible = rule.visible(rows, torch.arange(left, right, device=query.device))
    scores = scores.view(heads, high - low, -1).masked_fill(~visible, float("-inf"))
    if rule.sink is not None:
        sinks = rule.sink.float().view(heads, 1, 1).expand(-1, high - low, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : right - left]  # (H, R, C)
    mixed = weights.reshape(groups, -1, right - left) @ value[:, left:right].float()
    return mixed.view(heads, high - low, -1)


def unmasked_attention(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """The map that the shares come from, for a short text: (H, T, d), (K, T, d) -> (H, T, T)."""
    heads, tokens, _ = query.shape
    buffer = torch.empty(heads * tokens * tokens, device=query.device)
    keys = key[None].float().transpose(2, 3)
    return _scores(query[None], keys, scaling, softcap, buffer)[0].softmax(-1)


class Recorder:
    """The attention function: computes the flow, keeps every text's, layer's and head's shares."""

    def __init__(self, keep_maps: bool = False, memory: int | None = None) -> None:
        self.shares: list[Tensor] = []  # one (B, H, 7) an attention layer, in order of the calls
        self.memory = memory  # bytes that scores may take; None: blocks for a processor's cache
        self.padding: Tensor | None = None  # (B, T), False where a batch is padded on the right
        self.maps: list[Tensor] = []  # one (H, T, T) per layer and text, where asked
        self.keep_maps = keep_maps

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """(B, H, T, d), (B, K, T, d), (B, K, T, e), a (B, T) padding mask -> (B, T, H, e)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if is_causal is None:  # some families do not pass it on; their masks follow the config
            config = getattr(module, "config", None)
            is_causal = getattr(config, "is_causal", getattr(module, "is_causal", True))
        if sliding_window is None:  # nor this one, though their masks know it
            sliding_window = getattr(module, "sliding_window", None) or None
        if getattr(module, "config", None) is not None and partial_layers(module.config):
            is_causal = not looks_both_ways(module)
        rule = Rule(scaling, is_causal, sliding_window, softcap, s_aux)
        if self.memory is not None and self.padding is not None and not self.keep_maps:
            return self._whole_batch(query, key, value, rule), None
        output = value.new_zeros(*query.shape[:3], value.shape[-1])
        shares = []
        for text, real in enumerate(_spans(attention_mask, len(query), query.shape[2])):
            q, k, v = query[text, :, real], key[text, :, real], value[text, :, real]
            with torch.autocast(query.device.type, enabled=False):  # sums are float32
                # autocast leaves queries and keys float32, and casts them for attention as here
                output[text, :, real] = flow(q.to(v.dtype), k.to(v.dtype), v, rule)
                shares.append(row_shares(q[None], k[None], scaling, softcap)[0])
                if self.keep_maps:
                    self.maps.append(unmasked_attention(q, k, scaling, softcap))
        self.shares.append(torch.stack(shares))
        return output.transpose(1, 2).contiguous(), None

    def _whole_batch(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """As for text after text, in a few large operations, none of which waits for another."""
        texts, heads, tokens, _ = query.shape
        real = self.padding
        assert real is not None and self.memory is not None
        rows = max(ROWS, self.memory // (texts * heads * tokens * SCORE_BYTES))
        with torch.autocast(query.device.type, enabled=False):
            output = batch_flow(query.to(value.dtype), key.to(value.dtype), value, rule, real)
            self.shares.append(row_shares(query, key, rule.scaling, rule.softcap, real, rows))
        return output.transpose(1, 2).contiguous()


def _spans(mask: Tensor | None, texts: int, tokens: int) -> list[slice]:
    """Where each text's real tokens stand."""
    if mask is None:
        return [slice(0, tokens)] * texts
    places = [row.nonzero().flatten() for row in mask]
    return [slice(int(place[0]), int(place[-1]) + 1) for place in places]


_ACTIVE: list[Recorder] = []  # the innermost last; the interface itself must hold none


def _recorded(module: nn.Module, *tensors: Any, **keys: Any) -> tuple[Tensor, None]:
    """What the interface calls: the recorder of the block around the forward."""
    return _ACTIVE[-1](module, *tensors, **keys)


@contextmanager
def observed(model: PreTrainedModel, keep_maps: bool = False) -> Iterator[Recorder]:
    """Run `model` with a Recorder as its attention; its own implementation is back afterwards.

    Raises UserError for a class that does not go through transformers' attention interface.
    """
    family = type(model).__name__
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise UserError(
            f"{family} does not use transformers' attention interface; its dependence cannot be "
            "measured"
        )
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        raise UserError(f"{family} attends in chunks, which the recorder does not follow")
    own = model.config._attn_implementation
    recorder = Recorder(keep_maps, _spare(model.device))
    AttentionInterface.register(NAME, _recorded)
    # This mask is None or (B, T); without one of ours padding would be ignored in silence.
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    _ACTIVE.append(recorder)
    model.set_attn_implementation(NAME)
    try:
        # What was proved of the model's own attention must hold of what replaces it.
        prove_attention(model, bidirectional=is_bidirectional(model.config))
        recorder.shares.clear()
        recorder.maps.clear()
        yield recorder
    finally:
        model.set_attn_implementation(own)
        _ACTIVE.remove(recorder)


def _spare(device: torch.device) -> int | None:
    """Bytes for scores: of a GPU, which wants few large operations; None: of a processor."""
    return torch.cuda.mem_get_info(device)[0] // SHARE if device.type == "cuda" else None


def attention_layers(model: PreTrainedModel) -> int:
    """Layers that must call the recorder once each in a forward."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return sum(kind in ("full_attention", "sliding_attention") for kind in types)


@torch.no_grad()
def dependence_of(
    model: PreTrainedModel, recorder: Recorder, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Shares of each text, layer and head: (B, T) ids, (B, T) mask -> (B, L, H, 7) in fp64."""
    recorder.shares.clear()
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    on_the_right = bool(attention_mask[:, 0].all())
    recorder.padding = attention_mask.bool() if on_the_right else None
    model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    )
    recorder.padding = None
    if len(recorder.shares) != attention_layers(model):
        calls = f"{len(recorder.shares)} times in {attention_layers(model)} layers"
        raise UserError(
            f"{type(model).__name__} called the dependence recorder {calls}; it cannot be measured"
        )
    shares = torch.stack(recorder.shares, dim=1).cpu()
    if not shares.isfinite().all():
        raise UserError(
            f"{type(model).__name__} overflows in {model.dtype}; expected model.dtype float32 or "
            "bfloat16"
        )
    return shares


MAP_TOKENS = 20  # of a text whose attention map is drawn


def mean_attention(model: PreTrainedModel, input_ids: list[int]) -> Tensor:
    """(T, T) unmasked attention of the first tokens of a text, the mean over layers and heads."""
    input_ids = input_ids[:MAP_TOKENS]
    ids = torch.tensor([input_ids], device=model.device)
    with observed(model, keep_maps=True) as recorder:
        dependence_of(model, recorder, ids, torch.ones_like(ids))
    return torch.stack(recorder.maps).mean((0, 1)).cpu()
