"""Measure the attention dependence of a model on texts, resumable, on any number of processes."""

import logging
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from ubmoe.config import DependenceSection, UserError
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.dependence import COLUMNS
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.dependence.sums import Totals, summary
from ubmoe.models.digests import digest_of_rows, resume_key
from ubmoe.models.precision import autocast, uses_bfloat16
from ubmoe.unfinished import Unfinished

log = logging.getLogger(__name__)


def measure(
    model: PreTrainedModel,
    texts: list[list[int]],
    settings: DependenceSection,
    directory: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """The `dependence` section of the result, in percent.

    texts: token ids, already cut. Under torchrun every process measures its share of the batches
    and all return the same numbers. A run that is interrupted leaves its sums in `directory`, where
    `resume` finds them; without a directory nothing is left.
    """
    state = PartialState()
    _check_vocabulary(model, texts)
    batches = batches_by_length(texts, settings.batch_tokens)[
        state.process_index :: state.num_processes
    ]
    key = {} if directory is None else _key(model, texts, settings)
    name = f"dependence.partial-{state.process_index}-of-{state.num_processes}.npz"
    unfinished = Unfinished(directory and directory / name, key)
    totals, done = _loaded(unfinished) if resume else (Totals(), 0)
    everything = sum(len(texts[text]) for batch in batches for text in batch)
    bar = tqdm(
        total=everything,
        unit="token",
        unit_scale=True,
        desc="dependence",
        disable=not state.is_main_process,
    )
    whole = partial(_save_whole, unfinished, totals, batches)
    with observed(model) as recorder, bar, unfinished.kept_on_interrupt(whole):
        for number, batch in enumerate(batches):
            if number >= done:
                inputs = padded_with_mask([texts[text] for text in batch])
                ids, mask = (value.to(model.device) for value in inputs.values())
                with autocast(settings.bf16, model.device):
                    shares = dependence_of(model, recorder, ids, mask).numpy()  # (B, L, H, 7)
                for text, text_shares in zip(batch, shares, strict=True):
                    totals.add(text, len(texts[text]), text_shares)
                if unfinished.is_due():
                    _save(unfinished, totals, number + 1)
            bar.update(sum(len(texts[text]) for text in batch))
    gathered = Totals()
    for part in gather_object([totals]):
        gathered.merge(part)
    return summary(gathered, settings.buckets)


def _save(unfinished: Unfinished, totals: Totals, done: int) -> None:
    texts = np.array([(text, *columns) for text, columns in totals.texts.items()])
    unfinished.save(done=done, texts=texts, shares=totals.shares)


def _save_whole(unfinished: Unfinished, totals: Totals, batches: list[list[int]]) -> None:
    """Nothing where a batch was only half added."""
    ends = accumulate(len(batch) for batch in batches)
    done = next((n for n, end in enumerate(ends, 1) if end == len(totals.texts)), None)
    if done is not None:
        _save(unfinished, totals, done)


def _loaded(unfinished: Unfinished) -> tuple[Totals, int]:
    """The sums and the number of batches done; none where nothing of the same run is left."""
    kept = unfinished.load("done", "texts", "shares")
    if kept is None:
        return Totals(), 0
    done, rows, shares = kept
    log.info("resuming after %d texts", len(rows))
    texts = {int(text): (int(tokens), *columns) for text, tokens, *columns in rows.tolist()}
    return Totals(shares, texts), int(done)


def _check_vocabulary(model: PreTrainedModel, texts: list[list[int]]) -> None:
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = max(map(max, texts))
    if largest >= rows:
        raise UserError(
            f"{model.name_or_path}: its tokenizer gives id {largest}, the model has {rows} "
            "embeddings; they do not belong together"
        )


def _key(
    model: PreTrainedModel, texts: list[list[int]], settings: DependenceSection
) -> dict[str, Any]:
    """All that the sums depend on: the texts and the weights by digest, wherever they lie."""
    return resume_key(model) | {
        "data": digest_of_rows(texts),
        "flow": settings.flow,
        "batch_tokens": settings.batch_tokens,
        "bf16": uses_bfloat16(settings.bf16, model.device),
        "columns": list(COLUMNS),
    }
