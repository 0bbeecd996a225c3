"""Norms of the hidden states by layer, under each mask: whether the attention sink is formed.

A decoder's first token sees itself alone, and early layers make its state many times as large as
the others': the massive activation that the sink stands on. Under the bidirectional mask it sees
all tokens, and is not formed; where the sink is kept, it is.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ubmoe import layered
from ubmoe.bidirectional import masked, prove_attention
from ubmoe.config import UserError
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.models.precision import autocast

log = logging.getLogger(__name__)
TEXTS, TOKENS = 20, 128  # of those that are measured: so many, cut there
AT_ONCE = 1024  # tokens of a forward, which keeps the states of all layers
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {},
    "sink kept": {layered.SINK: True},
}


def norms(
    model: PreTrainedModel, texts: list[list[int]], bf16: Any
) -> dict[str, dict[str, list[float | None]]]:
    """By mask, the mean norm of the state by layer: of the first tokens, and of the others.

    0: the embeddings; n: after n layers. The last layer's is left out: the library gives it behind
    the final norm. A mask that the model cannot have is left out, and the log says why.
    """
    places = np.linspace(0, len(texts) - 1, min(TEXTS, len(texts))).astype(int)
    some = [texts[place][:TOKENS] for place in places]
    by_mask = {}
    for name, keys in MASKS.items():
        bidirectional = name != "causal"
        try:
            with masked(model, bidirectional, keys):
                prove_attention(model, bidirectional)
                with autocast(bf16, model.device):
                    by_mask[name] = _by_layer(model, some)
        except UserError as error:
            log.info("no norms of states, %s: %s", name, error)
    return by_mask


@torch.no_grad()
def _by_layer(model: PreTrainedModel, texts: list[list[int]]) -> dict[str, list[float | None]]:
    sums: dict[str, Any] = {"first": 0, "others": 0}
    for batch in batches_by_length(texts, AT_ONCE):
        inputs = padded_with_mask([texts[text] for text in batch])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        output = model.base_model(**inputs, use_cache=False, output_hidden_states=True)
        sizes = torch.stack([state.float().norm(dim=-1) for state in output.hidden_states[:-1]])
        first = torch.zeros_like(inputs["attention_mask"])
        first[:, 0] = 1
        others = inputs["attention_mask"] - first
        for name, chosen in (("first", first), ("others", others)):
            sums[name] += (sizes * chosen).sum((1, 2)).double().cpu()
    counts = {"first": len(texts), "others": sum(len(text) - 1 for text in texts)}
    return {name: _means(total, counts[name]) for name, total in sums.items()}


def _means(total: Tensor, count: int) -> list[float | None]:
    return [value / count if count else None for value in total.tolist()]
