"""All patterns in one walk down the layers: their common first layers are computed once.

A pattern chooses one of two ways for each layer: bidirectional or causal attention, or the layer of
one model or of another. The patterns form a tree that branches at each layer. SmolLM2's 69 patterns
of masks are 1,200 runs of a layer in this tree, and 2,070 one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ubmoe import layered
from ubmoe.bidirectional import masked
from ubmoe.config import UserError
from ubmoe.interventions.patterns import Pattern

NORMS = ("norm", "final_layernorm", "final_layer_norm")
Choice = tuple[bool, ...]  # a way for each layer
Layer = Callable[[int, bool, Tensor], Tensor]  # (number, way, states before) -> states after


def walk(
    before: Tensor, layer: Layer, choices: Sequence[Choice], places: Sequence[int], depth: int = 0
) -> Iterator[tuple[list[int], Tensor]]:
    """(places of equal choices, states after all layers), none of them kept."""
    if depth == len(choices[places[0]]):
        yield list(places), before
        return
    for way in (False, True):
        this_way = [place for place in places if choices[place][depth] is way]
        if this_way:
            yield from walk(layer(depth, way, before), layer, choices, this_way, depth + 1)


@torch.no_grad()
def states(
    model: PreTrainedModel, inputs: dict[str, Tensor], patterns: Sequence[Pattern]
) -> Iterator[tuple[int, Tensor]]:
    """(place of a pattern, (B, T, D) last states) of every pattern of masks.

    model: a causal language model. Each equals the states of a model with that `bi.layers`, and
    where the first token is kept with `bi.keep_sink`.
    """
    for reading in dict.fromkeys(pattern.first_token for pattern in patterns):
        places = [place for place, pattern in enumerate(patterns) if pattern.first_token == reading]
        seen = without_first(inputs) if reading == "removed" else inputs
        choices = [pattern.both for pattern in patterns]
        yield from _states_of_reading(model, seen, choices, places, reading == "kept")


def without_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first real token of each text is masked as padding is, its position kept.

    No other token sees its key ("Look Both Ways and No Sink", ACL 2025 long 1113).
    """
    mask = inputs["attention_mask"].clone()
    mask.scatter_(1, mask.argmax(1, keepdim=True), 0)
    return inputs | {"attention_mask": mask}


def _states_of_reading(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    choices: Sequence[Choice],
    places: Sequence[int],
    keep_sink: bool,
) -> Iterator[tuple[int, Tensor]]:
    """`states` at the places whose patterns read the first token alike."""
    config = model.config.get_text_config()
    keys = {layered.KEY: [], layered.SINK: keep_sink or layered.keeps_sink(config)}
    with masked(model, bidirectional=True, keys=keys):
        first, calls = layer_calls(model, inputs)
        layers, norm = layers_of(model), final_norm(model)

        def layer(number: int, both: bool, before: Tensor) -> Tensor:
            setattr(config, layered.KEY, [number] if both else [])
            return run_layer(layers[number], before, calls[number])

        for alike, last in walk(first, layer, choices, places):
            yield from ((place, norm(last)) for place in alike)


def layers_of(model: PreTrainedModel) -> Any:
    """The layers of a decoder. Raises UserError for a family that keeps them elsewhere."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise UserError(f"{type(model).__name__}: expected a family whose base model has layers")
    return layers


def final_norm(model: PreTrainedModel) -> Any:
    """The norm after a decoder's last layer. Raises UserError for a family that calls it otherwise.

    norm: Llama, Mistral, Qwen, Gemma; final_layernorm: Phi; final_layer_norm: GPT-NeoX.
    """
    for name in NORMS:
        if (norm := getattr(model.base_model, name, None)) is not None:
            return norm
    raise UserError(
        f"{type(model).__name__}: no final norm after its layers; expected one called "
        f"{' or '.join(NORMS)}"
    )


Call = tuple[tuple[Any, ...], dict[str, Any]]


def layer_calls(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Call]]:
    """The states before the first layer, and each layer's further arguments, in a plain forward."""
    calls: list[Call] = []

    def look(layer: Any, arguments: tuple[Any, ...], keys: dict[str, Any]) -> None:
        calls.append((arguments, keys))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers_of(model)]
    try:
        model.base_model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0][0][0], [(arguments[1:], keys) for arguments, keys in calls]


def logits_of(model: PreTrainedModel, normed: Tensor) -> Tensor:
    """(M, D) states behind the final norm -> (M, V) logits, by the model's own forward.

    Families bend or scale logits behind the head (Gemma 2, Cohere, Granite), or states before it.
    """
    inner: Any = model.base_model
    output = BaseModelOutputWithPast(last_hidden_state=normed[None])  # type: ignore[arg-type]
    inner.forward = lambda *_, **__: output
    try:
        places = torch.zeros(1, len(normed), dtype=torch.long, device=normed.device)
        logits: Tensor = model(input_ids=places, use_cache=False).logits[0]
    finally:
        del inner.forward  # that of its class is back
    return logits


def run_layer(layer: Any, before: Tensor, call: Call) -> Tensor:
    """The states after a layer."""
    arguments, keys = call
    output = layer(before, *arguments, **keys)
    return output[0] if isinstance(output, tuple) else output
