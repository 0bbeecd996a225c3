"""All patterns in one walk down the layers: what two patterns begin with is computed once.

The patterns are a tree, in which each layer parts those that look both ways there from those that
do not. SmolLM2's 69 patterns are 1,200 runs of a layer in this tree, and 2,070 one by one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ubmoe import layered
from ubmoe.bidirectional import is_bidirectional, set_attention
from ubmoe.scan.patterns import Pattern


@torch.no_grad()
def states(
    model: PreTrainedModel, inputs: dict[str, Tensor], patterns: Sequence[Pattern]
) -> Iterator[tuple[int, Tensor]]:
    """(place of a pattern, (B, T, D) last states) of every pattern, none of them kept.

    model: a causal language model. Each equals the states of a model with that `bi.layers`.
    """
    with _layered(model) as config:
        first, calls = _calls(model, inputs)
        inner: Any = model.base_model

        def walk(depth: int, each: Tensor, places: list[int]) -> Iterator[tuple[int, Tensor]]:
            if depth == len(inner.layers):
                yield from ((place, inner.norm(each)) for place in places)
                return
            for both in (False, True):
                own = [place for place in places if patterns[place].both[depth] is both]
                if own:
                    setattr(config, layered.KEY, [depth] if both else [])
                    arguments, keys = calls[depth]
                    output = inner.layers[depth](each, *arguments, **keys)
                    after = output[0] if isinstance(output, tuple) else output
                    yield from walk(depth + 1, after, own)

        yield from walk(0, first, list(range(len(patterns))))


@contextmanager
def _layered(model: PreTrainedModel) -> Iterator[Any]:
    """The model with our attention, which asks its config before each layer; yields that config."""
    config = model.config.get_text_config()
    key, both = layered.partial_layers(config), is_bidirectional(model.config)
    setattr(config, layered.KEY, [])
    set_attention(model, bidirectional=True)
    try:
        yield config
    finally:
        setattr(config, layered.KEY, key)
        if key is None:
            delattr(config, layered.KEY)
        set_attention(model, both)


def _calls(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the model itself gives to its first layer, and beside the states to each of them."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(layer: Any, arguments: tuple[Any, ...], keys: dict[str, Any]) -> None:
        given.append((arguments, keys))

    inner: Any = model.base_model
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in inner.layers]
    try:
        inner(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return given[0][0][0], [(arguments[1:], keys) for arguments, keys in given]
