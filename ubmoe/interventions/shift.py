"""Perplexity of a model and of its tuned encoder, each with the other's share of the first token.

Tuning lets heads change what they give to the text's first token, an attention sink. Here that
share alone changes hands, head by head: the weights stay. Three controls stand beside it. The same
shifts are given to other heads, each to its neighbour in the layer: any disturbance of that size
may cost something. Each head's output is scaled as the exchange scales what the other tokens give,
and its first token's share stays: less may be as good as a sink. And one temperature is given to
the encoder's logits: what that saves is no more than confidence, of which the model may lack some,
too.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from transformers import PreTrainedModel

from ubmoe.config import Config, UserError
from ubmoe.data.chats import Chat, collate
from ubmoe.data.rows import spaced
from ubmoe.dependence.recorder import attending_by, attention_layers, refuse_overflow
from ubmoe.evaluate.generation import perplexity
from ubmoe.interventions.changes import changes
from ubmoe.interventions.shifted import SEEN, Shifts
from ubmoe.models.precision import Setting, autocast

ELSEWHERE = " elsewhere"  # after an exchange's name: the same shifts on other heads
SCALED = " scaled"  # after an exchange's name: no shift, and each head's output scaled
COLDEST, HOTTEST = 0.25, 4.0  # of the temperatures that are tried


def shift(base: Any, encoder: Any, chats: Sequence[Chat], config: Config) -> dict[str, Any]:
    """The `shift` section of the result.

    `in`: the base model with the encoder's first-token shares, head by head; `back`: the encoder
    with the base model's. Shares and the temperature are matched over `shift.matched` of the chats.
    """
    bf16, matched = config.evaluation.bf16, spaced(chats, config.shift.matched)
    readings, wanted, exchanges = {}, {}, {}
    for name, model in (("model", base), ("encoder", encoder)):
        with shifting(model) as attention:
            wanted[name] = shares(model, attention, matched, bf16)
            readings[name] = read(model, attention, chats, bf16)
    for name, model, mine, theirs in (
        ("in", base, "model", "encoder"),
        ("back", encoder, "encoder", "model"),
    ):
        with shifting(model) as attention:
            attention.wanted = wanted[theirs][0].to(model.device)
            exchanged = shares(model, attention, matched, bf16)
            attention.wanted = None
            exchanges[name] = _match_quality(attention, exchanged, wanted[mine], wanted[theirs])
            readings[name] = read(model, attention, chats, bf16)
            for layer, by_head in attention.by_layer.items():
                attention.by_layer[layer] = by_head.roll(1)
            readings[name + ELSEWHERE] = read(model, attention, chats, bf16)
            attention.by_layer = {}
            scales = scales_of(wanted[mine][0], wanted[theirs][0]).to(model.device)
            attention.scales = dict(enumerate(scales))
            readings[name + SCALED] = read(model, attention, chats, bf16)
            exchanges[name]["scales"] = scales.tolist()
    temperature = best_temperature(encoder, matched, bf16)
    with shifting(encoder) as attention, tempered(encoder, temperature):
        readings["temperature"] = read(encoder, attention, chats, bf16)
    counts = {"chats": len(chats), "tokens": sum(readings["model"]["answers"]["tokens"])}
    measured = {"readings": readings, "changes": changes(readings), "exchanges": exchanges}
    return counts | {"matched": len(matched), "temperature": temperature} | measured


def scales_of(mine: Tensor, theirs: Tensor) -> Tensor:
    """What another share of the first token leaves to all others, over what they had: (L, H).

    mine, theirs: mean shares of the first token, (L, H), before and after. The rest of a row keeps
    its proportions, so that an exchange scales what the rest gives by this, in the mean.
    """
    return (1 - theirs) / (1 - mine).clamp(min=1e-6)


def best_temperature(model: PreTrainedModel, chats: Sequence[Chat], bf16: Setting) -> float:
    """The one temperature of the logits at which the chats' answers lose least."""

    def lost(log_temperature: float) -> float:
        with tempered(model, math.exp(log_temperature)):
            return math.log(perplexity(model, chats, bf16)["perplexity"])

    bounds = (math.log(COLDEST), math.log(HOTTEST))
    found = minimize_scalar(lost, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return math.exp(found.x)


@contextmanager
def tempered(model: PreTrainedModel, temperature: float) -> Iterator[None]:
    """Divide the logits of `model` by a temperature."""
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: logits / temperature)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def shifting(model: PreTrainedModel) -> Iterator[Shifts]:
    """Run `model` with shifts of the first key's score as its attention, at first none.

    Its own attention is back afterwards. Raises UserError as `attending_by` does, and for a model
    of which not every layer attends.
    """
    if attention_layers(model) != model.config.get_text_config().num_hidden_layers:
        raise UserError(
            f"{type(model).__name__}: expected attention in every layer; its first key cannot be "
            "shifted"
        )
    attention = Shifts()
    with attending_by(attention, model, "its first key cannot be shifted", windows=False):
        yield attention


def read(
    model: PreTrainedModel, attention: Shifts, chats: Sequence[Chat], bf16: Setting
) -> dict[str, Any]:
    """The perplexity of the answers, and SEEN over these chats and all heads, in percent."""
    attention.seen.clear()
    answers = perplexity(model, chats, bf16)
    means = (100 * mean_seen(model, attention)).mean((0, 1)).tolist()
    return answers | dict(zip(SEEN, means, strict=True))


def mean_seen(model: PreTrainedModel, attention: Shifts) -> Tensor:
    """(L, H, 4) SEEN over all texts that were read."""
    depth, seen = attention_layers(model), attention.seen
    batches = [torch.stack(seen[start : start + depth], 1) for start in range(0, len(seen), depth)]
    return torch.cat(batches).mean(0)


def shares(
    model: PreTrainedModel, attention: Shifts, chats: Sequence[Chat], bf16: Setting
) -> tuple[Tensor, Tensor]:
    """The first key's used shares: (L, H) over chats, and of every row (L, H, rows)."""
    inputs = {name: value.to(model.device) for name, value in collate(list(chats)).items()}
    del inputs["labels"]
    attention.seen.clear()
    attention.rows = []
    with torch.no_grad(), autocast(bf16, model.device):
        model.base_model(**inputs, use_cache=False)
    rows, attention.rows = torch.stack(attention.rows), None
    by_head = mean_seen(model, attention)[..., 0]
    refuse_overflow(by_head, model)
    return by_head, rows


Shares = tuple[Tensor, Tensor]


def _match_quality(
    attention: Shifts, exchanged: Shares, mine: Shares, theirs: Shares
) -> dict[str, Any]:
    """How well an exchange did, over the chats that shares were matched on, in percent.

    `gap`: the largest distance of a head's share to what it should be. `by_row`: of the distance
    between the two models' shares row by row, the part that is left: a constant for all rows
    matches their mean alone. `shifts`: (L, H).
    """
    before, left = ((side[1] - theirs[1]).abs().mean().item() for side in (mine, exchanged))
    return {
        "gap": 100 * (exchanged[0] - theirs[0]).abs().max().item(),
        "by_row": 100 * left / before if before else 0.0,
        "shifts": [attention.by_layer[layer].tolist() for layer in sorted(attention.by_layer)],
    }
