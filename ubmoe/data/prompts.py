"""A prompt and its answer as tokens, and batches in which the prompts are read first."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ubmoe.data.padding import IGNORE_INDEX, padded


@dataclass(frozen=True)
class Example:
    """A prompt of P >= 1 tokens and its answer, end token included."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def batch(examples: list[Example]) -> dict[str, Tensor]:
    """Prompts without their last tokens, padded left; then these and the answers, padded right.

    (B, P) `prompt_ids` and `prompt_mask`, (B, A) `answer_ids` and `answer_mask`, and `labels`: the
    answers' tokens.
    """
    prompts = [example.prompt[:-1] for example in examples]
    answers = [[example.prompt[-1], *example.answer] for example in examples]
    labels = [[IGNORE_INDEX, *example.answer] for example in examples]
    return {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(row) for row in prompts], left=True),
        "answer_ids": padded(answers),
        "answer_mask": padded([[1] * len(row) for row in answers]),
        "labels": padded(labels, IGNORE_INDEX),
    }


def prompt_inputs(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """A decoder's inputs for (B, P) prompts, padded left, whose cache is wanted."""
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions(mask),
        "use_cache": True,
    }


def answer_inputs(
    cache: Any, prompt_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor
) -> dict[str, Any]:
    """A decoder's inputs for answers over the prompts' cache."""
    mask = torch.cat((prompt_mask, answer_mask), 1)
    return {
        "input_ids": answer_ids,
        "attention_mask": mask,
        "position_ids": positions(mask)[:, -answer_ids.shape[1] :],
        "past_key_values": cache,
    }


def positions(mask: Tensor) -> Tensor:
    """Positions of the real tokens, counted from 0 whatever the padding."""
    return (mask.cumsum(1) - 1).clamp_min(0)
