"""STS of every pattern of layers in every input form, against the causal model; resumable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.abstasks.sts import AbsTaskSTS
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bootstrap import correlations, interval
from ubmoe.config import BiSection, Config, Form, ScanSection, UserError
from ubmoe.encoder import whitening
from ubmoe.encoder.echo import pooled
from ubmoe.encoder.sentence_encoder import POOLING, as_encoder, lengths
from ubmoe.evaluate.benchmark import load_data, prompt_of
from ubmoe.interventions.patterns import Pattern, patterns
from ubmoe.interventions.rows import Rows
from ubmoe.interventions.walk import states
from ubmoe.models.digests import digest_of_rows, resume_key
from ubmoe.models.precision import autocast, uses_bfloat16

# Keys of bi that a scan sets itself or does not read.
CHOSEN = {"stages", "attention", "layers", "pooling", "whiten"}


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    task: AbsTaskSTS,
    directory: Path,
) -> dict[str, Any]:
    """The `scan` section of the result: every pattern in every form, form after form.

    An interrupted scan leaves what it computed in `directory`, where `resume=auto` finds it.
    """
    settings = config.scan
    forms = [in_form(config.bi, form) for form in settings.forms] or [config.bi]
    encoders = [as_encoder(model, tokenizer, bi) for bi in forms]
    text_config = model.config.get_text_config()
    asked = patterns(settings, text_config.num_hidden_layers, config.bi.keep_sink)
    rows, gold = pairs(task, settings)
    key = resume_key(model) | {
        "pairs": digest_of_rows(rows),
        "patterns": [(pattern.both, pattern.first_token) for pattern in asked],
        "bf16": uses_bfloat16(config.evaluation.bf16, model.device),
        "centre": settings.centre,
    }
    vectors = [2, text_config.hidden_size] if settings.centre else []
    shape = (len(asked), len(POOLING), *vectors, len(rows))
    scored: list[dict[str, Any]] = []
    for bi, encoder in zip(forms, encoders, strict=True):
        path = directory / f"scan.partial-{bi.form or 0}.npz"
        form_key = key | {"bi": bi.model_dump(exclude=CHOSEN)}
        kept = Rows(path, form_key, shape, np.float32 if vectors else np.float64)
        if config.resume == "auto":
            kept.load()
        with autocast(config.evaluation.bf16, model.device):
            _fill(kept, model, encoder, rows, asked, prompt_of(encoder, task.metadata), config)
        form = {"form": bi.form} if settings.forms else {}
        causal = cosines(kept.values[0]) if vectors else kept.values[0]
        drawn = [correlations(theirs, gold) for theirs in causal]
        scored += [
            {**form, **_described(pattern, settings), **_scores(values, causal, drawn, gold)}
            for pattern, values in zip(asked, kept.values, strict=True)
        ]
    depth = text_config.num_hidden_layers
    return {"task": task.metadata.name, "pairs": len(rows), "depth": depth, "patterns": scored}


def _described(pattern: Pattern, settings: ScanSection) -> dict[str, Any]:
    first = {"first_token": pattern.first_token} if settings.first_token else {}
    return {"layers": pattern.layers, "name": pattern.name, **first}


def in_form(bi: BiSection, form: Form) -> BiSection:
    """The same section in another form."""
    rest = bi.model_dump(exclude={"prompt", "pooling", "prompt_in_mean"})
    return BiSection.model_validate(rest | {"form": form})


def pairs(task: AbsTaskSTS, settings: ScanSection) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Sentence pairs, evenly spaced over a task's, and their gold scores. Raises UserError."""
    load_data(task, "scan.pairs")
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
    kept: Rows,
    model: PreTrainedModel,
    encoder: SentenceTransformer,
    rows: Sequence[tuple[str, str]],
    asked: Sequence[Pattern],
    prompt: str | None,
    config: Config,
) -> None:
    where = "scan.pairs: row"
    sizes = [lengths(encoder, column, where, prompt) for column in zip(*rows, strict=True)]
    most = encoder.max_seq_length or max(map(max, sizes))
    longest = np.minimum(np.max(sizes, axis=0), most).tolist()
    order = sorted(kept.missing(), key=lambda row: -longest[row])
    with kept.filling(longest, "scan") as put:
        while order:
            count = max(1, config.scan.batch_tokens // (2 * longest[order[0]]))
            batch, order = order[:count], order[count:]
            texts = [rows[row][side] for side in (0, 1) for row in batch]
            put(batch, _read(model, encoder, texts, asked, prompt, config))


def _read(
    model: PreTrainedModel,
    encoder: SentenceTransformer,
    texts: Sequence[str],
    asked: Sequence[Pattern],
    prompt: str | None,
    config: Config,
) -> np.ndarray:
    """(patterns, poolings, pairs) cosines; to centre, (patterns, poolings, 2, D, pairs) vectors.

    texts: the first of each pair, then the second.
    """
    features = encoder.preprocess(list(texts), prompt=prompt)
    features = batch_to_device(features, model.device)
    given: Any = encoder[1]
    pools = [
        Pooling(given.embedding_dimension, word, include_prompt=given.include_prompt)
        for word in POOLING.values()
    ]
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    features = pooled(features)
    by_place: dict[int, list[np.ndarray]] = {}
    for place, last in states(model, inputs, asked):
        with torch.no_grad():
            embedded = [
                pool({**features, "token_embeddings": last.float()})["sentence_embedding"]
                for pool in pools
            ]
        both = [torch.stack(vectors.chunk(2)).transpose(1, 2).cpu().numpy() for vectors in embedded]
        by_place[place] = both if config.scan.centre else [cosines(vectors) for vectors in both]
    return np.array([by_place[place] for place in range(len(asked))])


def cosines(vectors: np.ndarray) -> np.ndarray:
    """(..., 2, D, pairs) -> (..., pairs)."""
    first, second = (vectors[..., side, :, :].astype(np.float64) for side in (0, 1))
    norms = np.linalg.norm(first, axis=-2) * np.linalg.norm(second, axis=-2)
    return (first * second).sum(-2) / np.maximum(norms, 1e-12)


def centred(vectors: np.ndarray) -> np.ndarray:
    """(2, D, pairs) without the mean and the first principal component of all 2 x pairs."""
    columns = np.concatenate(vectors, axis=1).astype(np.float64)
    weight, bias, _ = whitening.fitted(columns.T, 1)
    return np.stack(np.split(weight @ columns + bias[:, None], 2, axis=1))


def _scores(
    values: np.ndarray, causal: np.ndarray, drawn: Sequence[np.ndarray], gold: np.ndarray
) -> dict[str, Any]:
    """By pooling: Spearman x 100, and its gain over the causal model's, with a 95 % interval.

    values: (poolings, pairs) cosines, or (poolings, 2, D, pairs) vectors, which are scored centred,
    too. causal: (poolings, pairs); drawn: its correlations in the draws of the bootstrap. Raises
    UserError for cosines that are not finite.
    """
    whole = values.ndim > 2
    mine = cosines(values) if whole else values
    if not np.isfinite(mine).all():
        raise UserError("scan: cosines that are not finite; expected another model.dtype")
    result: dict[str, Any] = {}
    for place, (pooling, ours, theirs) in enumerate(zip(POOLING, mine, causal, strict=True)):
        score, base = (_spearman(cosines_of_pairs, gold) for cosines_of_pairs in (ours, theirs))
        gains = correlations(ours, gold) - drawn[place]
        gain = {"gain": score - base, "interval": interval(100 * gains)}
        result[pooling] = {"score": score, **gain}
        if whole:
            result[pooling]["centred"] = _spearman(cosines(centred(values[place])), gold)
    return result


def _spearman(scores: np.ndarray, gold: np.ndarray) -> float:
    return 100 * float(spearmanr(scores, gold).statistic)
