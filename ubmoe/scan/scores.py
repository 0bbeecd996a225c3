"""STS of every pattern, with its difference to the causal model and an interval, resumable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.abstasks.sts import AbsTaskSTS
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ubmoe.bootstrap import gains, interval
from ubmoe.config import Config, ScanSection, UserError
from ubmoe.encoder.sentence_encoder import POOLING, as_encoder, lengths, own_prompt
from ubmoe.models.digests import digest_of_rows, mark_of
from ubmoe.models.loading import load_tokenizer
from ubmoe.models.precision import autocast, uses_bfloat16
from ubmoe.scan.kept import Kept
from ubmoe.scan.patterns import Pattern, patterns
from ubmoe.scan.walk import states


def scan(model: PreTrainedModel, config: Config, task: AbsTaskSTS, directory: Path) -> Any:
    """The `scan` section of the result.

    An interrupted scan leaves its cosines in `directory`, where `resume=auto` finds them.
    """
    settings = config.scan
    encoder = as_encoder(model, load_tokenizer(config.model), config.bi)
    depth = model.config.get_text_config().num_hidden_layers
    asked = patterns(settings, depth)
    rows, gold = pairs(task, settings)
    mark = mark_of(model) | {
        "pairs": digest_of_rows(rows),
        "bi": config.bi.model_dump(exclude={"stages", "attention", "layers", "pooling"}),
        "patterns": [pattern.both for pattern in asked],
        "bf16": uses_bfloat16(config.evaluation.bf16, model.device),
    }
    kept = Kept(directory / "scan.partial-0.npz", mark, (len(asked), len(POOLING), len(rows)))
    if config.resume == "auto":
        kept.load()
    with autocast(config.evaluation.bf16, model.device):
        _fill(kept, model, encoder, rows, asked, config)
    found = [
        {"layers": pattern.layers, "name": pattern.name, **_scores(own, kept.values[0], gold)}
        for pattern, own in zip(asked, kept.values, strict=True)
    ]
    return {"task": task.metadata.name, "pairs": len(rows), "depth": depth, "patterns": found}


def pairs(task: AbsTaskSTS, settings: ScanSection) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Sentence pairs, evenly spaced over a task's, and their gold scores. Raises UserError."""
    task.load_data()
    data: Any = task.dataset
    [subset] = task.hf_subsets
    [split] = task.eval_splits
    rows = data.get(subset, data)[split]
    if settings.max_pairs is not None and settings.max_pairs < len(rows):
        rows = rows.select(np.linspace(0, len(rows) - 1, settings.max_pairs).astype(int))
    first, second, score = task.column_names[0], task.column_names[1], rows["score"]
    gold = np.array(score, dtype=float)
    if np.ptp(gold) == 0:
        raise UserError(f"scan.pairs: {task.metadata.name}: all scores are {gold[0]:g}")
    return list(zip(rows[first], rows[second], strict=True)), gold


def _fill(
    kept: Kept,
    model: PreTrainedModel,
    encoder: SentenceTransformer,
    rows: Sequence[tuple[str, str]],
    asked: Sequence[Pattern],
    config: Config,
) -> None:
    sizes = [lengths(encoder, column, "scan.pairs: row") for column in zip(*rows, strict=True)]
    most = encoder.max_seq_length or max(map(max, sizes))
    longest = np.minimum(np.max(sizes, axis=0), most).tolist()
    order = sorted(kept.missing(), key=lambda row: -longest[row])
    with kept.filling(longest, "scan") as filling:
        while order:
            count = max(1, config.scan.batch_tokens // (2 * longest[order[0]]))
            batch, order = order[:count], order[count:]
            texts = [rows[row][side] for side in (0, 1) for row in batch]
            filling.put(batch, _cosines(model, encoder, texts, asked, config.bi.keep_sink))


def _cosines(
    model: PreTrainedModel,
    encoder: SentenceTransformer,
    texts: Sequence[str],
    asked: Sequence[Pattern],
    keep_sink: bool,
) -> np.ndarray:
    """(patterns, poolings, pairs): texts holds the first of each pair, then the second."""
    features = encoder.preprocess(list(texts), prompt=own_prompt(encoder))
    features = {
        key: value.to(model.device) if isinstance(value, Tensor) else value
        for key, value in features.items()
    }
    given: Any = encoder[1]
    pools = [
        Pooling(given.embedding_dimension, word, include_prompt=given.include_prompt)
        for word in POOLING.values()
    ]
    found = np.empty((len(asked), len(pools), len(texts) // 2))
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    for place, last in states(model, inputs, asked, keep_sink):
        for column, pool in enumerate(pools):
            with torch.no_grad():
                pooled = pool({**features, "token_embeddings": last.float()})
            first, second = pooled["sentence_embedding"].chunk(2)
            found[place, column] = cosine_similarity(first, second).cpu().numpy()
    return found


def _scores(own: np.ndarray, causal: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """By pooling: Spearman x 100, and what it is above the causal model's, with a 95 % interval.

    own, causal: (poolings, pairs). Raises UserError for cosines that are not finite.
    """
    if not np.isfinite(own).all():
        raise UserError("scan: cosines that are not finite; expected another model.dtype")
    found: dict[str, Any] = {}
    for pooling, mine, theirs in zip(POOLING, own, causal, strict=True):
        score, base = (float(spearmanr(each, gold).statistic) for each in (mine, theirs))
        gain = {"gain": 100 * (score - base), "interval": interval(100 * gains(mine, theirs, gold))}
        found[pooling] = {"score": 100 * score, **gain}
    return found
