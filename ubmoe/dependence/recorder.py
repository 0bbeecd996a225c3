"""Attention that is recorded: a model's own flow, and where attention would go, were it unmasked.

One attention function, registered through transformers' AttentionInterface, sees every layer's
queries and keys, so that any decoder is measured and no model code is copied. The T x T scores
never exist: flash kernels sum them (kernels.py); scores that no kernel computes, as those under a
soft cap, go by blocks of rows (shares.py). A batch is measured whole, in as many operations
whatever its length, and nothing waits for the device inside a forward.

Shapes: B texts, T tokens, L layers, H heads, K key-value heads, d and e sizes of a head's keys and
values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ubmoe.bidirectional import is_bidirectional, prove_attention
from ubmoe.config import UserError
from ubmoe.dependence.flow import Rule, batch_flow
from ubmoe.dependence.kernels import Texts, computed_here, parts_of
from ubmoe.dependence.shares import ROWS, row_shares, unmasked_attention
from ubmoe.layered import first_alone, is_bidirectional_layer, is_ours, keeps_sink

NAME = "dependence"
SCORE_BYTES = 8  # of a score in fp32, and of the copies that are made of those near the diagonal
SHARE = 4  # of an accelerator's free memory, that scores may take


class Recorder:
    """The attention function: computes the flow, keeps every text's, layer's and head's shares."""

    def __init__(self, keep_maps: bool = False, memory: int | None = None) -> None:
        self.shares: list[Tensor] = []  # one (B, H, 7) an attention layer, in order of the calls
        self.memory = memory  # bytes that scores may take; None: blocks for a processor's cache
        self.texts: Texts | None = None  # of the batch, where it is known to stand on the left
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
        config = getattr(module, "config", None)
        if is_causal is None:  # some families do not pass it on; their masks follow the config
            is_causal = getattr(config, "is_causal", getattr(module, "is_causal", True))
        if sliding_window is None:  # nor this one, though their masks know it
            sliding_window = getattr(module, "sliding_window", None) or None
        if is_ours(config):
            is_causal = not is_bidirectional_layer(module)
        rule = Rule(scaling, is_causal, sliding_window, softcap, s_aux)
        with torch.autocast(query.device.type, enabled=False):  # sums are float32
            if self.texts is not None:
                output, shares = self._batch(query, key, value, rule, self.texts)
            else:
                output, shares = self._anywhere(query, key, value, rule, attention_mask)
        self.shares.append(shares)
        output = output.transpose(1, 2).contiguous()
        if not is_causal and keeps_sink(config):
            output = first_alone(output, value, attention_mask)
        return output, None

    def _batch(
        self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, texts: Texts
    ) -> tuple[Tensor, Tensor]:
        """The flow (B, H, T, e) and the shares (B, H, 7) of texts that stand on the left."""
        # autocast leaves queries and keys float32, and casts them for attention as here
        q, k = query.to(value.dtype), key.to(value.dtype)
        plain = rule.plain(k, value)
        if self.keep_maps:
            self.maps.append(unmasked_attention(query[0], key[0], rule.scaling, rule.softcap))
        if rule.softcap is None and computed_here(q):
            parts = parts_of(q, k, value if plain else None, rule.scaling, texts, not rule.causal)
            shares = parts.shares(texts)
            if plain:
                return parts.flow(value).to(value.dtype), shares
        else:
            rows = self._rows(query)
            shares = row_shares(query, key, rule.scaling, rule.softcap, texts.real, rows)
        return batch_flow(q, k, value, rule, texts.real, masks=self.memory is not None), shares

    def _rows(self, query: Tensor) -> int:
        """The number of rows in a block of scores."""
        texts, heads, tokens, _ = query.shape
        return max(ROWS, (self.memory or 0) // (texts * heads * tokens * SCORE_BYTES))

    def _anywhere(
        self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same of texts that stand where a (B, T) mask says, one after the other."""
        texts, heads, tokens, _ = query.shape
        output = value.new_zeros(texts, heads, tokens, value.shape[-1])
        mask = torch.ones(texts, tokens, device=query.device) if mask is None else mask
        shares = []
        for text, row in enumerate(mask):
            real = row.bool()
            q, k, v = (states[text : text + 1, :, real] for states in (query, key, value))
            only = Texts(torch.ones(1, q.shape[2], dtype=torch.long, device=query.device))
            output[text : text + 1, :, real], share = self._batch(q, k, v, rule, only)
            shares.append(share)
        return output, torch.cat(shares)


Attention = Callable[..., tuple[Tensor, None]]
_ACTIVE: list[Attention] = []  # the innermost last; the interface itself must hold none


def _active(module: nn.Module, *tensors: Any, **keys: Any) -> tuple[Tensor, None]:
    """Registered with the interface: calls the function of the block around the forward."""
    return _ACTIVE[-1](module, *tensors, **keys)


def _padding(*_: object, attention_mask: Tensor | None = None, **__: object) -> Tensor | None:
    """The (B, T) mask as it is: transformers' own of this kind looks whether it holds padding."""
    return attention_mask


@contextmanager
def observed(model: PreTrainedModel, keep_maps: bool = False) -> Iterator[Recorder]:
    """Run `model` with a Recorder as its attention; its own implementation is back afterwards.

    Raises UserError as `attending_by` does.
    """
    recorder = Recorder(keep_maps, _spare(model.device))
    with attending_by(recorder, model, "its dependence cannot be measured"):
        recorder.shares.clear()
        recorder.maps.clear()
        yield recorder


@contextmanager
def attending_by(
    function: Attention, model: PreTrainedModel, else_: str, windows: bool = True
) -> Iterator[None]:
    """Run `model` with a function as its attention, which is given the (B, T) padding mask.

    windows: whether the function computes windows that hide something.

    Raises UserError, which ends with `else_`, for a class that does not go through transformers'
    attention interface.
    """
    family = type(model).__name__
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise UserError(f"{family} does not use transformers' attention interface; {else_}")
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        raise UserError(f"{family} attends in chunks; {else_}")
    implementation = model.config._attn_implementation
    AttentionInterface.register(NAME, _active)
    # Without one of ours padding would be ignored in silence.
    AttentionMaskInterface.register(NAME, _padding)
    _ACTIVE.append(function)
    try:
        model.set_attn_implementation(NAME)
        # What was proved of the model's own attention must hold of what replaces it.
        prove_attention(model, bidirectional=is_bidirectional(model.config), windows=windows)
        yield
    finally:
        _ACTIVE.remove(function)
        model.set_attn_implementation(implementation)


def _spare(device: torch.device) -> int | None:
    """Bytes for scores and masks of a GPU, which wants few large operations; None: a processor."""
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
    to_the_left = attention_mask.argsort(dim=1, descending=True, stable=True)
    ids, mask = (rows.gather(1, to_the_left) for rows in (input_ids, attention_mask))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    recorder.texts = Texts(mask)
    try:
        model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
    finally:
        recorder.texts = None
    if len(recorder.shares) != attention_layers(model):
        calls = f"{len(recorder.shares)} times in {attention_layers(model)} layers"
        raise UserError(
            f"{type(model).__name__} called the dependence recorder {calls}; it cannot be measured"
        )
    shares = torch.stack(recorder.shares, dim=1).cpu()
    refuse_overflow(shares, model)
    return shares


def refuse_overflow(shares: Tensor, model: PreTrainedModel) -> None:
    """Raises UserError for shares that are not finite."""
    if not shares.isfinite().all():
        raise UserError(
            f"{type(model).__name__} overflows in {model.dtype}; expected model.dtype float32 or "
            "bfloat16"
        )


MAP_TOKENS = 20  # of a text whose attention map is drawn


def mean_attention(model: PreTrainedModel, input_ids: list[int]) -> Tensor:
    """(T, T) unmasked attention of the first tokens of a text, the mean over layers and heads."""
    input_ids = input_ids[:MAP_TOKENS]
    ids = torch.tensor([input_ids], device=model.device)
    with observed(model, keep_maps=True) as recorder:
        dependence_of(model, recorder, ids, torch.ones_like(ids))
    return torch.stack(recorder.maps).mean((0, 1)).cpu()
