"""Next token prediction where it counts: the head is applied to the positions that predict.

A fifth of the tokens masked, or a short answer after a long prompt: the logits of the other
positions would be computed, kept for the backward pass, and thrown away.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ubmoe.data.padding import IGNORE_INDEX


def predictions(
    model: nn.Module, head: nn.Module, inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(M, V) logits and the M labelled tokens, each predicted from the position before it.

    The logits are float32 at least.

    model: a causal LM, wrapped or not, and `head` its output embeddings; labels: (B, T),
    IGNORE_INDEX where nothing is to be predicted. A label of the first token has nothing before it,
    and is passed over. Softcaps and scales of a family's logits are kept: forward calls the head.
    """
    labels = labels[:, 1:]
    places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # once: a GPU is waited for
    hook = head.register_forward_pre_hook(lambda _, states: states[0][places][None])
    try:
        output: Any = model(**inputs, use_cache=False)
    finally:
        hook.remove()
    logits = output.logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[places]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; without a token to predict it is 0, not 0 / 0."""
    return cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
