"""NT-Xent and SimCSE's loss over a batch that is sorted by length into mini-batches.

The softmax over cosines, gathering and GradCache are sentence-transformers'. The padding is the
waste: mini-batches of like lengths leave the loss and its gradient as they are. Shapes: N anchors
of a batch, D numbers of a vector.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from ubmoe.config import MINI_BATCH, UserError
from ubmoe.training.sharding import is_sharded, max_over_processes

STARTS = 8  # forwards that could be started while one of the whole budget runs
CARD = 2**33  # bytes of a GPU, that `auto` allows MINI_BATCH tokens
DIRECTIONS: dict[str, Any] = {
    "simcse": ("query_to_doc",),
    "nt_xent": ("query_to_doc", "query_to_query"),
}


class ContrastiveLoss(nn.Module):
    """Cross-entropy of each anchor's cosine with its positive, over temperature.

    form: `simcse`, against all positives (and hard negatives) of the batch; or `nt_xent`, each of
    the 2N views against all others, the mean of both directions.
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
        self.sharded = is_sharded(model)
        self.last: list[Tensor] = []  # the anchors and positives of the last batch

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        """Columns of token features -> the scalar loss."""
        mini_batches = self.mini_batches(list(sentence_features))
        return self.loss_from_mini_batches(
            [self.model(features)["sentence_embedding"] for features in mini_batches]
        )

    def mini_batches(self, columns: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """The batch, sorted by length, as mini-batches within the budget of padded tokens."""
        merged, self.order = by_length(columns)
        self.columns = len(columns)
        places = spans(merged["attention_mask"]).tolist()  # once: a GPU is waited for
        ranges = least_padding([length for length, _, _ in places], self.mini_batch_tokens)
        if self.sharded:
            ranges = split(ranges, max_over_processes(len(ranges), merged["attention_mask"].device))
        return [cropped(merged, places, low, high) for low, high in ranges]

    def loss_from_mini_batches(self, vectors: list[Tensor]) -> Tensor:
        """The mini-batches' vectors -> the scalar loss."""
        return self.loss_from_vectors(in_columns(torch.cat(vectors), self.order, self.columns))

    def loss_from_vectors(self, columns: list[Tensor]) -> Tensor:
        """[(N, D) anchors, positives, ...] -> the scalar loss."""
        if self.views_must_differ and same_up_to_rounding(columns[0], columns[1]):
            raise UserError(
                "the two views of every sentence are identical: dropout has no effect on this "
                "model; raise bi.stages.N.dropout above 0"
            )
        self.views_must_differ = False  # it holds for the whole run once it holds for a batch
        self.last = [column.detach() for column in columns[:2]]
        loss = self.criterion.compute_loss_from_embeddings(columns, None)
        if self.form == "nt_xent":
            swapped = self.criterion.compute_loss_from_embeddings(columns[::-1], None)
            loss = (loss + swapped) / 2
        return loss

    def metrics(self) -> dict[str, float]:
        """Alignment, uniformity and mean cosines of the last batch; {} before the first."""
        return geometry(*self.last) if self.last else {}


class CachedContrastiveLoss(CachedLossMixin, ContrastiveLoss):
    """The same loss by GradCache: one mini-batch's activations at a time, one more forward."""

    mini_batch_size = 1 << 30  # each of our mini-batches goes to the library as a column of its own

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Any = None) -> Tensor:
        return self.forward_cached(self.mini_batches(list(sentence_features)), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self.loss_from_mini_batches([vectors for [vectors] in reps])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def mini_batch(tokens: int | Literal["auto"], device: torch.device) -> int:
    """The budget that `mini_batch_tokens` means. By a card's size, not by what of it is free: a
    resumed run draws its dropout in the same mini-batches.
    """
    if tokens != "auto":
        return tokens
    if device.type != "cuda":
        return MINI_BATCH
    return MINI_BATCH * max(1, torch.cuda.get_device_properties(device).total_memory // CARD)


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

    Of all such splits the one with the fewest padded tokens, a forward counting as budget / STARTS
    more.
    """
    count, sizes, overhead = len(lengths), np.array(lengths), budget // STARTS
    cost, begin = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for high in range(1, count + 1):
        longest = sizes[high - 1]
        low = min(max(0, high - budget // longest), high - 1)
        costs = cost[low:high] + np.arange(high - low, 0, -1) * longest + overhead
        begin[high] = low + costs.argmin()
        cost[high] = costs.min()
    ranges = [(int(begin[count]), count)]
    while ranges[-1][0]:
        high = ranges[-1][0]
        ranges.append((int(begin[high]), high))
    return ranges[::-1]


def split(ranges: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The ranges as `count` ones at least, the widest halved first: a model in parts is gathered by
    all processes at once, so all have to run as many forwards.
    """
    while len(ranges) < count:
        low, high = widest = max(ranges, key=lambda span: span[1] - span[0])
        place, middle = ranges.index(widest), (low + high) // 2
        ranges = [*ranges[:place], (low, middle), (middle, high), *ranges[place + 1 :]]
    return ranges


def spans(mask: Tensor) -> Tensor:
    """(M, T), padded left or right -> (M, 3): length, first real column, and the one behind."""
    lengths, first = mask.sum(1), mask.argmax(1)
    return torch.stack((lengths, first, first + lengths), 1)


def cropped(
    features: dict[str, Any], places: list[list[int]], low: int, high: int
) -> dict[str, Any]:
    """Rows low to high without the columns that are padding in all of them, by their `spans`."""
    begins, ends = ([place[end] for place in places[low:high]] for end in (1, 2))
    span = slice(min(begins), max(ends))
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
    """Alignment and uniformity (Wang and Isola, 2020) and mean cosines of (N, D) anchors and
    positives.
    """
    a, b = normalize(anchors.float(), dim=-1), normalize(positives.float(), dim=-1)
    cosines, others = a @ b.T, len(a) * (len(a) - 1)
    apart = (-4 * (1 - a @ a.T)).fill_diagonal_(float("-inf"))
    metrics = {
        "alignment": (a - b).square().sum(-1).mean(),
        "uniformity": apart.flatten().logsumexp(0) - math.log(others),
        "positive_cosine": cosines.diagonal().mean(),
        "negative_cosine": (cosines.sum() - cosines.trace()) / others,
    }
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
