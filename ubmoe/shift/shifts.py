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
from transformers import PreTrainedModel

from ubmoe.bootstrap import interval, means
from ubmoe.config import Config
from ubmoe.data.chats import Chat, collate
from ubmoe.data.rows import spaced
from ubmoe.dependence.recorder import attending_by, attention_layers
from ubmoe.evaluate.generation import perplexity
from ubmoe.models.precision import Setting, autocast
from ubmoe.shift.attention import Shifts

READINGS = ("model", "encoder", "in", "back")  # the last two are the same with the other's shares


def shift(base: Any, encoder: Any, chats: Sequence[Chat], config: Config) -> dict[str, Any]:
    """The `shift` section of the result.

    `in`: the model, in every head of which the first token gets what it gets in the encoder;
    `back`: the other way round. Shares are matched over `shift.matched` of the chats.
    """
    bf16, matched = config.evaluation.bf16, spaced(chats, config.shift.matched)
    readings, shifts = {}, {}
    with shifting(base) as own:
        bases = shares(base, own, matched, bf16)[..., 0]
        readings["model"] = read(base, own, chats, bf16)
    with shifting(encoder) as own:
        encoders = shares(encoder, own, matched, bf16)[..., 0]
        readings["encoder"] = read(encoder, own, chats, bf16)
    for name, model, wanted in (("in", base, encoders), ("back", encoder, bases)):
        with shifting(model) as own:
            match(model, own, wanted, matched, bf16)
            readings[name] = read(model, own, chats, bf16)
            shifts[name] = [own.by_layer[layer].tolist() for layer in range(len(wanted))]
    counts = {"chats": len(chats), "tokens": sum(readings["model"]["answers"]["tokens"])}
    counts["matched"] = len(matched)
    return counts | {"readings": readings, "changes": changes(readings), "shifts": shifts}


@contextmanager
def shifting(model: PreTrainedModel) -> Iterator[Shifts]:
    """Run `model` with shifts of the first key's score as its attention, at first none.

    Its own attention is back afterwards. Raises UserError as `attending_by` does.
    """
    shifts = Shifts()
    with attending_by(shifts, model, "its first key cannot be shifted"):
        yield shifts


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
    depth = attention_layers(model)
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
