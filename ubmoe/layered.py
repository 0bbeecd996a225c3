"""Masks of our own: some layers are bidirectional and the others causal; the first token is kept.

transformers has one switch for all layers and tokens, `config.is_causal`. Two keys in the config
say what it switches: `bidirectional_layers`, a list of layers, of which the rest stay causal; and
`keep_sink`, under which the first token of each text sees itself alone, as in a causal model, so
that its states, and the attention sink on them, are the causal ones. One attention function,
registered through the library's interfaces, asks each layer for its own mask and calls sdpa: no
model file is copied, and the keys are saved in config.json. Stock libraries do not know them.

Shapes: B texts, Q queries, K keys, H heads, d and e sizes of a head's keys and values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from ubmoe.config import Layers, UserError, shown

NAME = "layered_sdpa"
KEY = "bidirectional_layers"
SINK = "keep_sink"


def chosen(layers: Layers, depth: int, key: str = "bi.layers") -> list[int] | None:
    """Numbers of the layers that a key means, from 0; None: all. Raises UserError, naming it."""
    if layers == "all":
        return None
    if layers == "none":
        return []
    named: Sequence[int] = layers if isinstance(layers, list) else ()
    if isinstance(layers, dict):
        first, last = layers.get("from", 0), layers.get("to", depth - 1)
        named = range(first, last + 1, layers.get("every", 1))
    if not named or not 0 <= min(named) <= max(named) < depth:
        raise UserError(f"{key}: got {shown(layers)}; expected some of the layers 0 to {depth - 1}")
    numbers = sorted(set(named))
    return None if len(numbers) == depth else numbers


def partial_layers(config: Any) -> list[int] | None:
    """The bidirectional layers, where a config (or config.json) names some; else None."""
    return config.get(KEY) if isinstance(config, dict) else getattr(config, KEY, None)


def keeps_sink(config: Any) -> bool:
    """Whether a config (or config.json) keeps the first token causal where the rest is not."""
    keeps = config.get(SINK) if isinstance(config, dict) else getattr(config, SINK, None)
    return keeps is True


def is_ours(config: Any) -> bool:
    """Whether a config (or config.json), once bidirectional, needs this module's attention."""
    return partial_layers(config) is not None or keeps_sink(config)


def is_bidirectional_layer(module: nn.Module) -> bool:
    """Whether an attention layer does, as its config is now."""
    config: Any = module.config
    layers = partial_layers(config)
    return config.is_causal is False and (layers is None or module.layer_idx in layers)


def switch(model: PreTrainedModel, on: bool) -> None:
    """Put our attention function into a model's layers, or its own back. Raises UserError."""
    implementation = model.config._attn_implementation
    if on and implementation not in (NAME, "dependence"):  # which asks the layers itself
        known = model._supports_attention_backend and hasattr(model.base_model, "layers")
        if not (known and model._supports_sdpa):  # a soft cap, or sinks that are weights
            raise UserError(
                f"{type(model).__name__} has attention that no mask of ours is for; expected "
                "layers: all and keep_sink: false"
            )
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, flash_attention_mask)  # None, or (B, K)
        model.own_attention = implementation  # type: ignore[assignment]
        model.set_attn_implementation(NAME)
    elif not on and implementation == NAME:
        model.set_attn_implementation(getattr(model, "own_attention", "sdpa"))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **keys: Any,
) -> tuple[Tensor, None]:
    """(B, H, Q, d), (B, H', K, d), (B, H', K, e), a (B, K) padding mask -> (B, Q, H, e)."""
    causal = not is_bidirectional_layer(module)
    window = sliding_window or getattr(module, "sliding_window", None) or None
    mask = layer_mask(attention_mask, query.shape[2], key.shape[2], causal, window, query.device)
    output, _ = sdpa_attention_forward(module, query, key, value, mask, is_causal=causal, **keys)
    if not causal and keeps_sink(module.config):
        output = first_alone(output, value, attention_mask)
    return output, None


def first_alone(output: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
    """Attention in which the first real token of each text sees itself alone.

    (B, Q, H, e), (B, H', K, e), a (B, K) padding mask -> (B, Q, H, e). The softmax over one key is
    1, whatever the scores and the window, so that the row is that token's value. No dropout is on
    it: dropping the only key would drop the whole row, and the sink with it. Where the queries are
    a later part of a text over a cache, there is no such row.
    """
    queries, keys = output.shape[1], value.shape[2]
    if padding is None:
        first = torch.zeros(len(value), dtype=torch.long, device=value.device)
    else:
        first = padding.int().argmax(1)
    places = torch.arange(keys - queries, keys, device=value.device)
    first_values = value[torch.arange(len(value), device=value.device), :, first]  # (B, H', e)
    first_values = first_values.repeat_interleave(output.shape[2] // value.shape[1], 1)
    return torch.where((places == first[:, None])[..., None, None], first_values[:, None], output)


def layer_mask(
    padding: Tensor | None,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """The mask of a layer's queries: (B or 1, 1, Q or 1, K), or None where sdpa needs none."""
    left = padding is not None and not bool(padding[:, 0].all())
    limited = window is not None and window < keys
    if causal and not left and not limited and queries in (1, keys):
        return None  # no real token looks at padding on the right; sdpa's triangle starts at key 0
    mask = None
    if causal or limited:
        rows = torch.arange(keys - queries, keys, device=device)[:, None]
        mask = visible(rows, torch.arange(keys, device=device), causal, window)[None, None]
    if padding is not None and not bool(padding.all()):
        real = padding[:, None, None, :].bool()
        mask = real if mask is None else mask & real
        if causal and left:  # padding sees itself, so that no row is empty
            mask = mask | torch.eye(keys, dtype=torch.bool, device=device)[keys - queries :]
    return mask


def visible(rows: Tensor, columns: Tensor, causal: bool, window: int | None) -> Tensor:
    """(R, C) which columns a row may see; a window ends as transformers' masks end it."""
    if causal:
        return (columns <= rows) & (columns > rows - window if window else True)
    return (columns - rows).abs() <= (window or len(columns) + len(rows))


def named_layers(layers: Sequence[int]) -> str:
    """As a reader would say them: 3-29, or 2, 5, 8."""
    if not layers:
        return "none"
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and list(layers) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(map(str, layers))
