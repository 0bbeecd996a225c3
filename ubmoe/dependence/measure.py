"""Measure the attention dependence of a model on texts, resumable, on any number of processes."""

import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from ubmoe.config import DependenceSection, UserError
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.dependence import COLUMNS
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.dependence.sums import Partial, Totals, summary
from ubmoe.models.digests import digest_of_rows, mark_of
from ubmoe.models.precision import autocast, uses_bfloat16

SAVE_EVERY = 30.0  # seconds between two partial states


def measure(
    model: PreTrainedModel,
    texts: list[list[int]],
    settings: DependenceSection,
    directory: Path,
    resume: bool = False,
) -> dict[str, Any]:
    """The `dependence` section of the result, in percent.

    texts: token ids, already cut. Under torchrun every process measures its share of the batches
    and all return the same numbers. A run that is interrupted leaves its sums in `directory`, where
    `resume` finds them.
    """
    state = PartialState()
    _check_vocabulary(model, texts)
    batches = batches_by_length(texts, settings.batch_tokens)[
        state.process_index :: state.num_processes
    ]
    partial = Partial(directory, state, _mark(model, texts, settings))
    totals, done = partial.load() if resume else (Totals(), 0)
    everything = sum(len(texts[text]) for batch in batches for text in batch)
    bar = tqdm(
        total=everything,
        unit="token",
        unit_scale=True,
        desc="dependence",
        disable=not state.is_main_process,
    )
    with observed(model) as recorder, bar, partial.kept_on_interrupt(totals, batches):
        for number, batch in enumerate(batches):
            if number >= done:
                inputs = padded_with_mask([texts[text] for text in batch])
                ids, mask = (value.to(model.device) for value in inputs.values())
                with autocast(settings.bf16, model.device):
                    shares = dependence_of(model, recorder, ids, mask).numpy()  # (B, L, H, 7)
                for text, each in zip(batch, shares, strict=True):
                    totals.add(text, len(texts[text]), each)
                if time.monotonic() - partial.saved > SAVE_EVERY:
                    partial.save(totals, number + 1)
            bar.update(sum(len(texts[text]) for text in batch))
    gathered = Totals()
    for part in gather_object([totals]):
        gathered.merge(part)
    return summary(gathered, settings.buckets)


def _check_vocabulary(model: PreTrainedModel, texts: list[list[int]]) -> None:
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = max(map(max, texts))
    if largest >= rows:
        raise UserError(
            f"{model.name_or_path}: its tokenizer gives id {largest}, the model has {rows} "
            "embeddings; they do not belong together"
        )


def _mark(
    model: PreTrainedModel, texts: list[list[int]], settings: DependenceSection
) -> dict[str, Any]:
    """All that the sums depend on: the texts and the weights by digest, wherever they lie."""
    return mark_of(model) | {
        "data": digest_of_rows(texts),
        "flow": settings.flow,
        "batch_tokens": settings.batch_tokens,
        "bf16": uses_bfloat16(settings.bf16, model.device),
        "columns": list(COLUMNS),
    }
