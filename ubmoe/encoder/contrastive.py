"""Contrastive stages: SimCSE on sentences (two dropout views) and supervised (anchor, positive).

Trainer and sampler are sentence-transformers'. Ours: which modules train, the views, and the loss.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ubmoe.config import StageSection, UserError
from ubmoe.data.chats import Chat
from ubmoe.data.pairs import Pairs, read_pairs
from ubmoe.data.tokens import sentences_of
from ubmoe.encoder.contrastive_loss import CachedContrastiveLoss, ContrastiveLoss, mini_batch
from ubmoe.encoder.language_loss import LanguageLoss
from ubmoe.encoder.sentence_encoder import lengths, own_prompt
from ubmoe.models.digests import digest_of_rows, digest_of_tokenizer, resume_key
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.modules import announce, tuning
from ubmoe.training.trainer import GuardedTrainer, run_trainer

log = logging.getLogger(__name__)
Scoring = Callable[[SentenceTransformer, PreTrainedModel, StageSection], TrainerCallback]


def read_dataset(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int]:
    """Columns anchor, positive and the negatives, and how many rows are below `positive_from`.

    SimCSE's positive is the anchor itself: the views differ by dropout alone. Raises UserError for
    rows that cannot train.
    """
    columns, below = _columns(stage, tokenizer)
    if stage.loss == "nt_xent" and len(columns) > 2:
        raise UserError("bi.stages.N.loss: nt_xent knows no hard negatives; expected simcse")
    if len(set(columns["anchor"])) < 2:
        count = len(columns["anchor"])
        raise UserError(f"{stage.dataset}: {count} rows; expected two different texts at least")
    return Dataset.from_dict(columns), below


def _columns(stage: StageSection, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    if stage.objective == "supervised":
        return read_pairs(stage.dataset, tokenizer, stage.max_rows, stage.positive_from)
    texts = list(dict.fromkeys(sentences_of(stage.dataset, tokenizer, stage.max_rows)))
    return Pairs({"anchor": texts, "positive": texts}, 0)


@contextmanager
def attention_dropout(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Switch attention dropout on in every layer; the model's own is back afterwards.

    `config.attention_dropout` changed after loading does nothing: the layers hold copies.
    Raises UserError for a model whose attention has no dropout to set.
    """
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "attention_dropout")
    ]
    before = [layer.attention_dropout for layer in layers]
    if share and not layers:
        raise UserError(f"{type(model).__name__} has no attention dropout, so no two views")
    for layer in layers:
        layer.attention_dropout = share
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.attention_dropout = value


class ContrastiveTrainer(GuardedTrainer, SentenceTransformerTrainer):
    """Logs the geometry of the last batch beside the loss, and the language-model loss if any."""

    def __init__(self, *arguments: Any, language: LanguageLoss | None, weight: float, **keys: Any):
        super().__init__(*arguments, **keys)
        self.language, self.weight = language, weight
        self.lm_loss = torch.zeros(())

    def compute_loss(self, *arguments: Any, **keys: Any) -> Any:
        loss: Any = super().compute_loss(*arguments, **keys)
        if self.language is None:
            return loss
        with self.accelerator.autocast(), attention_dropout(self.language.model, 0.0):
            lm_loss = self.language(self.state.global_step)
        self.lm_loss = lm_loss.detach()
        return loss + self.weight * lm_loss

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        loss: Any = self.loss
        more = loss.metrics() if "loss" in logs else {}
        if more and self.language is not None:
            more["lm_loss"] = self.lm_loss.item()
        super().log(logs | more, *arguments)


def train_stage(
    encoder: SentenceTransformer,
    model: PreTrainedModel,
    stage: StageSection,
    data: Dataset,
    stage_run: StageRun,
    language: Sequence[Chat] = (),
    below: int = 0,
    scoring: Scoring | None = None,
) -> dict[str, Any]:
    """Train the stage's modules of `model`, the encoder's inner model with its head, in place.

    language: chats of the language-model loss of `lm_weight`. below: rows left out, for the
    record. scoring: makes the callback that scores the encoder at chosen steps. Returns the
    stage's report: counts by module, negatives, truncated share, log.
    """
    encoder.max_seq_length, length = stage.max_tokens, encoder.max_seq_length
    views = stage.objective == "simcse"
    beside = None
    if language:
        if PartialState().num_processes > 1:
            raise UserError("bi.stages.N.lm_weight: is for one process; expected 0 under torchrun")
        beside = LanguageLoss(model, list(language), stage.lm_batch_size, stage_run.seed)
    kind = CachedContrastiveLoss if stage.cached else ContrastiveLoss
    key = resume_key(model) | {
        "data": digest_of_rows(chain(data.iter(1000), ((c.ids, c.answer) for c in language))),
        "tokenizer": digest_of_tokenizer(encoder.tokenizer),
    }
    with tuning(model, stage, stage_run) as counts:
        tokens = mini_batch(stage.mini_batch_tokens, model.device)
        loss = kind(encoder, stage.loss, stage.temperature, tokens, views)
        report = {
            "trainable": counts,
            "rows": len(data),
            "max_tokens": stage.max_tokens,
            "truncated_percent": truncated(encoder, data),
            "negatives_per_anchor": negatives(stage, data.column_names),
        }
        if stage.positive_from is not None:
            report["rows_below_positive_from"] = below
        if language:
            report |= {"lm_rows": len(language), "lm_truncated": sum(c.cut for c in language)}
        announce(stage, model, report)
        with attention_dropout(model, stage.dropout if views else 0.0):
            history = run_trainer(
                partial(
                    ContrastiveTrainer,
                    encoder,
                    loss=loss,
                    language=beside,
                    weight=stage.lm_weight,
                    callbacks=[scoring(encoder, model, stage)] if scoring else None,
                ),
                stage,
                stage_run,
                data,
                model.device,
                key=key,
                kind=SentenceTransformerTrainingArguments,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                prompts=own_prompt(encoder),
            )
    encoder.max_seq_length = length
    return report | {"log": history}


def truncated(encoder: SentenceTransformer, data: Dataset) -> float:
    """Share of the texts of at most 1000 rows that the stage's limit cuts, in percent."""
    texts = [text for column in data.column_names for text in data[column][:1000]]
    limit = encoder.max_seq_length or math.inf
    return 100 * statistics.fmean(length > limit for length in lengths(encoder, texts))


def negatives(stage: StageSection, columns: list[str]) -> int:
    """The negatives of each anchor, those of all processes."""
    rows = stage.per_device_train_batch_size * PartialState().num_processes
    if stage.loss == "nt_xent":
        return 2 * rows - 2
    return rows * (len(columns) - 1) - 1
