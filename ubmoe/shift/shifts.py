"""Perplexity of a model and of its tuned encoder, each with the other's share of the first token.

Tuning makes heads let go of the text's first token, an attention sink, and that raises DP-after.
Here the shares alone change hands, head by head: the weights stay.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ubmoe.bidirectional import prove_attention
from ubmoe.bootstrap import interval, means
from ubmoe.config import Config, UserError
from ubmoe.data.chats import Chat, collate
from ubmoe.data.rows import spaced
from ubmoe.evaluate.generation import perplexity
from ubmoe.models.precision import Setting, autocast
from ubmoe.shift.attention import Shifts

NAME = "shifted"
READINGS = ("model", "encoder", "in", "back")  # the last two are the same with the other's shares


def shift(base: Any, encoder: Any, chats: Sequence[Chat], config: Config) -> dict[str, Any]:
    """The `shift` section of the result.

    `in`: the model, in every head of which the first token gets what it gets in the encoder;
    `back`: the other way round. Shares are matched over `shift.matched` of the chats.
    """
    bf16, matched = config.evaluation.bf16, spaced(chats, config.shift.matched)
    readings, shifts = {}, {}
    with shifting(base) as on_base, shifting(encoder) as on_encoder:
        both = (base, on_base), (encoder, on_encoder)
        wanted = [shares(*each, matched, bf16)[..., 0] for each in both]
        for name, own in zip(READINGS[:2], both, strict=True):
            readings[name] = read(*own, chats, bf16)
        for name, own, theirs in zip(READINGS[2:], both, reversed(wanted), strict=True):
            match(*own, theirs, matched, bf16)
            readings[name] = read(*own, chats, bf16)
            shifts[name] = [own[1].by_layer[layer].tolist() for layer in range(len(theirs))]
    counts = {"chats": len(chats), "tokens": sum(readings["model"]["answers"]["tokens"])}
    counts["matched"] = len(matched)
    return counts | {"readings": readings, "changes": changes(readings), "shifts": shifts}


@contextmanager
def shifting(model: PreTrainedModel) -> Iterator[Shifts]:
    """Run `model` with shifts of the first key's score as its attention, at first none.

    Its own attention is back afterwards. Raises UserError for a model that does not read causally,
    or does not go through transformers' attention interface.
    """
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise UserError(
            f"model.name: {type(model).__name__} does not use transformers' attention interface; "
            "its first key cannot be shifted"
        )
    own, shifts, name = model.config._attn_implementation, Shifts(), f"{NAME}_{id(model)}"
    AttentionInterface.register(name, shifts)
    AttentionMaskInterface.register(name, _padding)
    model.set_attn_implementation(name)
    try:
        prove_attention(model, bidirectional=False)
        yield shifts
    finally:
        model.set_attn_implementation(own)


def _padding(*_: object, attention_mask: Tensor | None = None, **__: object) -> Tensor | None:
    """The (B, T) mask as it is, without which padding would be ignored in silence."""
    return attention_mask


def read(
    model: PreTrainedModel, shifts: Shifts, chats: Sequence[Chat], bf16: Setting
) -> dict[str, Any]:
    """What `told` says of the answers, and of these chats `first` and `after`, in percent."""
    shifts.seen.clear()
    told = perplexity(model, chats, bf16)
    first, after = (100 * mean_shares(model, shifts)).mean((0, 1)).tolist()
    return told | {"first": first, "after": after}


def mean_shares(model: PreTrainedModel, shifts: Shifts) -> Tensor:
    """(L, H, 2) over all texts that were read."""
    depth = model.config.get_text_config().num_hidden_layers
    batches = [shifts.seen[start : start + depth] for start in range(0, len(shifts.seen), depth)]
    return torch.cat([torch.stack(each, 1) for each in batches]).mean(0)


def shares(model: PreTrainedModel, shifts: Shifts, chats: Sequence[Chat], bf16: Setting) -> Tensor:
    """(L, H, 2) the shares of the first key and of later keys, a mean over chats."""
    inputs = {name: value.to(model.device) for name, value in collate(list(chats)).items()}
    shifts.seen.clear()
    with torch.no_grad(), autocast(bf16, model.device):
        model.base_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        )
    return mean_shares(model, shifts)


def match(
    model: PreTrainedModel, shifts: Shifts, wanted: Tensor, chats: Sequence[Chat], bf16: Setting
) -> None:
    """Find the shifts that give the first key the shares `wanted`, (L, H), over these chats."""
    shifts.wanted = wanted.to(model.device)
    shares(model, shifts, chats, bf16)
    shifts.wanted = None


def changes(readings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """In nats a token with a 95 % interval, by the bootstrap over chats.

    `whole`: the encoder over the model; `in`: the model with the encoder's shares, over the model;
    `back`: the encoder with the model's, over the encoder. `of_whole`: the part of the whole that
    `in` loses, and that `back` saves. `by_answer` counts every chat's mean once.
    """
    lost = np.array([readings[name]["answers"]["losses"] for name in READINGS])
    tokens = np.array(readings["model"]["answers"]["tokens"])
    told = _changes(lost, tokens)
    for name, cells in _changes(lost / tokens, np.ones_like(tokens)).items():
        told[name]["by_answer"] = cells
    return told


def _changes(lost: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """lost: (4, chats)."""
    moved = np.stack([lost[1] - lost[0], lost[2] - lost[0], lost[3] - lost[1]])
    exact, drawn = moved.sum(1) / tokens.sum(), means(moved, tokens)
    found: dict[str, dict[str, Any]] = {}
    whole = exact[0], drawn[:, 0]
    for place, name in enumerate(("whole", "in", "back")):
        sign = -1 if name == "back" else 1
        found[name] = {"change": float(exact[place]), "interval": interval(drawn[:, place])}
        if place:
            found[name]["of_whole"] = _part(sign * exact[place], sign * drawn[:, place], whole)
    return found


def _part(own: float, drawn: np.ndarray, whole: tuple[float, np.ndarray]) -> dict[str, Any] | None:
    """None where nothing is lost."""
    if not whole[0]:
        return None
    return {"part": float(own / whole[0]), "interval": interval(drawn / whole[1])}
