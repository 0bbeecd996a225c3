"""Contrastive stages: SimCSE on sentences (two dropout views) and supervised (anchor, positive).

Trainer, sampler, gathering and the softmax over cosines are sentence-transformers'. Ours: which
modules train, the views, the batch sorted by length into mini-batches (the padding is the waste;
the loss is the same), and NT-Xent. Shapes: N anchors of a batch, D numbers of a vector.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ubmoe.config import StageSection, UserError
from ubmoe.data.rows import SENTENCE, cell, training_rows
from ubmoe.encoder.sentence_encoder import own_prompt
from ubmoe.training.trainer import (
    Careful,
    StopOnBadLoss,
    Work,
    announce,
    arguments,
    begin,
    fit,
    tuning,
)

log = logging.getLogger(__name__)
COLUMNS = {  # of a supervised data set, by what they are often called
    "anchor": ("anchor", "query", "sent0", "sentence1"),
    "positive": ("positive", "pos", "sent1", "sentence2"),
    "negative": ("negative", "neg", "hard_neg"),
}


# --- data ----------------------------------------------------------------------------------------


def read_dataset(stage: StageSection) -> Dataset:
    """Columns anchor, positive and perhaps negative. Raises UserError for rows that cannot train.

    SimCSE's positive is the anchor itself: the views differ by dropout alone.
    """
    rows = training_rows(stage.dataset, stage.max_rows)
    if stage.objective == "simcse":
        texts = list(dict.fromkeys(cell(row, SENTENCE) for row in rows))
        columns = {"anchor": texts, "positive": texts}
    else:
        present = {
            name: aliases
            for name, aliases in COLUMNS.items()
            if name != "negative" or (rows and any(alias in rows[0].fields for alias in aliases))
        }
        columns = {name: [cell(row, aliases) for row in rows] for name, aliases in present.items()}
    if stage.loss == "nt_xent" and "negative" in columns:
        raise UserError("bi.stages.N.loss: nt_xent knows no hard negatives; expected simcse")
    if len(set(columns["anchor"])) < 2:
        raise UserError(f"{stage.dataset}: {len(rows)} rows; expected two different texts at least")
    return Dataset.from_dict(columns)


OVERHEAD = 256  # tokens that take as long as starting one more forward
DIRECTIONS: dict[str, Any] = {
    "simcse": ("query_to_doc",),
    "nt_xent": ("query_to_doc", "query_to_query"),
}


# --- loss ----------------------------------------------------------------------------------------


class ContrastiveLoss(nn.Module):
    """Cross-entropy of each anchor's cosine with its positive, over temperature.

    form: `simcse`, against all positives (and hard negatives) of the batch; or `nt_xent`, each of
    the 2N views against all others, the mean of both directions. `metrics` holds the last batch's
    alignment and uniformity (Wang and Isola, 2020) and mean positive and negative cosine.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        form: str,
        temperature: float,
        mini_batch_tokens: int,
        views_must_differ: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.form, self.mini_batch_tokens = form, mini_batch_tokens
        criterion: Any = MultipleNegativesRankingLoss(
            model,
            1 / temperature,
            directions=DIRECTIONS[form],
            gather_across_devices=PartialState().num_processes > 1,
        )
        criterion.model = None  # it is given vectors, and must not hold the model twice
        self.criterion = criterion
        self.views_must_differ = views_must_differ
        self.metrics: dict[str, float] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Columns of token features -> the scalar loss."""
        pieces = self.pieces(list(sentence_features))
        return self.of_pieces([self.model(piece)["sentence_embedding"] for piece in pieces])

    def pieces(self, columns: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """The batch, sorted by length, as mini-batches within the budget of padded tokens."""
        merged, self.order = by_length(columns)
        self.columns = len(columns)
        lengths = merged["attention_mask"].sum(1).tolist()
        ranges = least_padding(lengths, self.mini_batch_tokens)
        return [cropped(merged, low, high) for low, high in ranges]

    def of_pieces(self, vectors: list[Tensor]) -> Tensor:
        """The mini-batches' vectors -> the scalar loss."""
        return self.of_vectors(in_columns(torch.cat(vectors), self.order, self.columns))

    def of_vectors(self, columns: list[Tensor]) -> Tensor:
        """[(N, D) anchors, positives, ...] -> the scalar loss."""
        if self.views_must_differ and same_up_to_rounding(columns[0], columns[1]):
            raise UserError(
                "the two views of every sentence are identical: dropout has no effect on this "
                "model; raise bi.stages.N.dropout above 0"
            )
        self.views_must_differ = False  # it holds for the whole run once it holds for a batch
        self.metrics = geometry(columns[0].detach(), columns[1].detach())
        loss = self.criterion.compute_loss_from_embeddings(columns, None)
        if self.form == "nt_xent":
            swapped = self.criterion.compute_loss_from_embeddings(columns[::-1], None)
            loss = (loss + swapped) / 2
        return loss


class CachedContrastiveLoss(CachedLossMixin, ContrastiveLoss):
    """The same loss by GradCache: one mini-batch's activations at a time, one more forward."""

    mini_batch_size = 1 << 30  # each of our mini-batches goes to the library as a column of its own

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        return self.forward_cached(self.pieces(list(sentence_features)), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self.of_pieces([vectors for [vectors] in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def by_length(columns: list[dict[str, Tensor]]) -> tuple[dict[str, Any], Tensor]:
    """All columns as one batch of M rows, the shortest first, and the (M,) order that sorts it."""
    merged = merge_feature_batches(columns)
    if merged is None:
        raise ValueError("the columns of a batch have different features")
    order = merged["attention_mask"].sum(1).argsort(stable=True)
    sort = {key: value[order] for key, value in merged.items() if _is_by_row(key, value)}
    return {**merged, **sort}, order


def _is_by_row(key: str, value: Any) -> bool:
    """The prompt's length is one number for the whole batch."""
    return isinstance(value, Tensor) and key != "prompt_length"


def least_padding(lengths: list[int], budget: int) -> list[tuple[int, int]]:
    """Row ranges of ascending lengths, each of at most `budget` padded tokens (or one row).

    Of all such splits the one with the fewest padded tokens, a forward counting as OVERHEAD more.
    """
    count, sizes = len(lengths), np.array(lengths)
    cost, begin = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for high in range(1, count + 1):
        longest = sizes[high - 1]
        low = min(max(0, high - budget // longest), high - 1)
        found = cost[low:high] + np.arange(high - low, 0, -1) * longest + OVERHEAD
        begin[high] = low + found.argmin()
        cost[high] = found.min()
    ranges = [(int(begin[count]), count)]
    while ranges[-1][0]:
        high = ranges[-1][0]
        ranges.append((int(begin[high]), high))
    return ranges[::-1]


def cropped(features: dict[str, Any], low: int, high: int) -> dict[str, Any]:
    """Rows low to high without the columns that are padding in all of them, left or right."""
    real = features["attention_mask"][low:high].any(0).nonzero().flatten()
    span = slice(int(real[0]), int(real[-1]) + 1)
    return {
        key: value[low:high, span] if _is_by_row(key, value) else value
        for key, value in features.items()
    }


def in_columns(vectors: Tensor, order: Tensor, columns: int) -> list[Tensor]:
    """Sorted vectors (M, D) back into their columns, (N, D) each."""
    restored = torch.empty_like(vectors).index_copy(0, order.to(vectors.device), vectors)
    return list(restored.chunk(columns))


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two (N, D) differ by no more than another mini-batch's shape or thread can make."""
    full = a.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type)
    return bool((a - b).abs().max() <= (1e-4 if full else 2e-2) * a.abs().max())


def geometry(anchors: Tensor, positives: Tensor) -> dict[str, float]:
    """Alignment, uniformity and mean cosines of (N, D) anchors and positives."""
    a, b = normalize(anchors.float(), dim=-1), normalize(positives.float(), dim=-1)
    cosines = a @ b.T
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return {
        "alignment": (a - b).square().sum(-1).mean().item(),
        "uniformity": (-4 * (1 - a @ a.T))[others].exp().mean().log().item(),
        "positive_cosine": cosines.diagonal().mean().item(),
        "negative_cosine": cosines[others].mean().item(),
    }


# --- training ------------------------------------------------------------------------------------


@contextmanager
def attention_dropout(model: PreTrainedModel, share: float) -> Iterator[None]:
    """Switch attention dropout on in every layer; the model's own is back afterwards.

    `config.attention_dropout` changed after loading does nothing: the layers hold copies.
    Raises UserError for a model whose attention has no dropout to set.
    """
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "attention_dropout")]
    own = [layer.attention_dropout for layer in layers]
    if share and not layers:
        raise UserError(f"{type(model).__name__} has no attention dropout, so no two views")
    for layer in layers:
        layer.attention_dropout = share
    try:
        yield
    finally:
        for layer, value in zip(layers, own, strict=True):
            layer.attention_dropout = value


class _Trainer(Careful, SentenceTransformerTrainer):
    """Logs the geometry of the last batch beside the loss."""

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        loss: Any = self.loss
        super().log(logs | (loss.metrics if "loss" in logs else {}), *arguments)


def train_stage(
    encoder: SentenceTransformer,
    model: PreTrainedModel,
    stage: StageSection,
    data: Dataset,
    work: Work,
) -> dict[str, Any]:
    """Train the stage's modules of `model`, the encoder's inner model with its head, in place.

    Returns what the record says of the stage: counts by module, negatives, truncated share, log.
    """
    encoder.max_seq_length, length = stage.max_tokens, encoder.max_seq_length
    views = stage.objective == "simcse"
    kind = CachedContrastiveLoss if stage.cached else ContrastiveLoss
    with tuning(model, stage, work) as counts:
        loss = kind(encoder, stage.loss, stage.temperature, stage.mini_batch_tokens, views)
        settings = SentenceTransformerTrainingArguments(
            **arguments(stage, work, model.device),
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            prompts=own_prompt(encoder),
        )
        trainer = _Trainer(encoder, settings, data, loss=loss, callbacks=[StopOnBadLoss()])
        report = {
            "trainable": counts,
            "rows": len(data),
            "truncated_percent": truncated(encoder, data),
            "negatives_per_anchor": negatives(stage, settings.world_size, data.column_names),
        }
        announce(stage, model, report)
        checkpoint = begin(stage, work, model=model.name_or_path, rows=len(data))
        # The trainer prints its log; stdout is for the path of the result.
        with attention_dropout(model, stage.dropout if views else 0.0), redirect_stdout(sys.stderr):
            history = fit(trainer, checkpoint)
    encoder.max_seq_length = length
    return report | {"log": history}


def truncated(encoder: SentenceTransformer, data: Dataset, most: int = 1000) -> float:
    """Share of (at most `most`) anchors that are longer than the stage's limit, in percent."""
    texts = data["anchor"][:most]
    limit = encoder.max_seq_length or 10**6
    encoder.max_seq_length = 10**6
    features = encoder.preprocess(list(texts), prompt=own_prompt(encoder))
    lengths = features["attention_mask"].sum(1)
    encoder.max_seq_length = limit
    return float((lengths > limit).float().mean() * 100)


def negatives(stage: StageSection, processes: int, columns: list[str]) -> int:
    """How many texts each anchor is told from."""
    rows = stage.per_device_train_batch_size * processes
    if stage.loss == "nt_xent":
        return 2 * rows - 2
    return rows * (len(columns) - 1) - 1
