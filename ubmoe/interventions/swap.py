"""Perplexity of a model with one layer of its tuned encoder, and of the encoder with one of its.

Embeddings, last norm and head are the model's throughout, so that what differs are layers alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ubmoe.bootstrap import interval, means
from ubmoe.config import Config
from ubmoe.data.chats import Chat, collate
from ubmoe.data.padding import IGNORE_INDEX, batches_by_length
from ubmoe.interventions.rows import Rows
from ubmoe.interventions.walk import (
    Choice,
    final_norm,
    layer_calls,
    layers_of,
    logits_of,
    run_layer,
    walk,
)
from ubmoe.models.digests import digest_of_rows, resume_key
from ubmoe.models.precision import autocast, uses_bfloat16


def choices(depth: int) -> list[Choice]:
    """Whether each layer is the encoder's: none, all, each one put in, each put back."""
    alone = [tuple(layer == number for layer in range(depth)) for number in range(depth)]
    back = [tuple(not tuned for tuned in choice) for choice in alone]
    return [(False,) * depth, (True,) * depth, *alone, *back]


def swap(
    base: Any, encoder: Any, chats: Sequence[Chat], config: Config, directory: Path
) -> dict[str, Any]:
    """The `swap` section of the result.

    An interrupted run leaves its sums in `directory`, where `resume=auto` finds them.
    """
    asked = choices(len(layers_of(base)))
    key = {
        "base": resume_key(base),
        "encoder": resume_key(encoder),
        "chats": digest_of_rows((chat.ids, chat.answer) for chat in chats),
        "bf16": uses_bfloat16(config.evaluation.bf16, base.device),
    }
    kept = Rows(directory / "swap.partial-0.npz", key, (len(asked), len(chats)))
    if config.resume == "auto":
        kept.load()
    rows, lengths = kept.missing(), [len(chat.ids) for chat in chats]
    ids = [chats[row].ids for row in rows]
    with kept.filling(lengths, "swap") as put, autocast(config.evaluation.bf16, base.device):
        for batch in batches_by_length(ids, config.swap.batch_tokens) if rows else ():
            batch_rows = [rows[place] for place in batch]
            put(batch_rows, losses(base, encoder, [chats[row] for row in batch_rows], asked))
    counts = np.array([sum(chat.answer[1:]) for chat in chats])  # nothing predicts a first token
    return summary(kept.values, counts)


@torch.no_grad()
def losses(base: Any, encoder: Any, chats: Sequence[Chat], asked: Sequence[Choice]) -> np.ndarray:
    """(choices, chats) summed negative log-likelihood of each chat's answers."""
    inputs = {name: value.to(base.device) for name, value in collate(list(chats)).items()}
    labels = inputs.pop("labels")[:, 1:]
    rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    first, calls = layer_calls(base, inputs)
    norm, of_base, of_encoder = final_norm(base), layers_of(base), layers_of(encoder)

    def layer(number: int, tuned: bool, before: Tensor) -> Tensor:
        layers = of_encoder if tuned else of_base
        return run_layer(layers[number], before, calls[number])

    sums = np.zeros((len(asked), len(chats)))
    for equal, last in walk(first, layer, asked, range(len(asked))):
        logits = logits_of(base, norm(last)[rows, places]).float()
        token_losses = cross_entropy(logits, labels[rows, places], reduction="none")
        summed = torch.zeros(len(chats), device=base.device).index_add_(0, rows, token_losses)
        sums[equal] = summed.cpu().numpy()
    return sums


def summary(lost: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Perplexities, and by layer what a swap changes, in nats a token with a 95 % interval.

    lost: (choices, chats). `in`: the encoder's layer in the model, over the model; `back`: the
    model's layer in the encoder, over the encoder; `whole`: the encoder over the model. `by_answer`
    counts every chat's mean once, whatever its tokens. The bootstrap draws chats.
    """
    depth = (len(lost) - 2) // 2
    by_token, by_answer = (lost, counts), (lost / counts, np.ones_like(counts))
    drawn = [
        (means(*counted), counted[0].sum(1) / counted[1].sum()) for counted in (by_token, by_answer)
    ]

    def moved(place: int, whole: int) -> dict[str, Any]:
        tokens, answers = (
            {
                "change": float(exact[place] - exact[whole]),
                "interval": interval(draws[:, place] - draws[:, whole]),
            }
            for draws, exact in drawn
        )
        return tokens | {"by_answer": answers}

    layers = [
        {"layer": number, "in": moved(2 + number, 0), "back": moved(2 + depth + number, 1)}
        for number in range(depth)
    ]
    ends = dict(zip(("base", "encoder"), np.exp(drawn[0][1][:2]).tolist(), strict=True))
    made = {"chats": len(counts), "tokens": int(counts.sum()), "perplexity": ends}
    return made | {"whole": moved(1, 0), "layers": layers}
