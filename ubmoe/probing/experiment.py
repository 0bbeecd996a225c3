"""Probe one model after the other on the same words, and say which differences are noise."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ubmoe import owned
from ubmoe.config import Config, ProbedModel, ProbingSection, UserError
from ubmoe.models.digests import digest_of_rows, digest_of_tokenizer, resume_key
from ubmoe.models.loading import load_model
from ubmoe.models.lora import last_attention
from ubmoe.models.source import ModelSource, bounded, context_length
from ubmoe.moe.routes import set_route
from ubmoe.probing.anisotropy import anisotropy
from ubmoe.probing.items import Task
from ubmoe.probing.rows import all_rows, alone
from ubmoe.probing.word_vectors import Sentences, Word, word_vectors
from ubmoe.unfinished import Unfinished

log = logging.getLogger(__name__)
BINARY, NUMBERS = "balanced_accuracy", "spearman"  # what models are compared by


def models_by_label(config: Config) -> dict[str, ProbedModel]:
    """The models by their labels. Raises UserError for two of one label."""
    models: dict[str, ProbedModel] = {}
    settings = {key: getattr(config.model, key) for key in ("name", "revision", "adapter")}
    both = [
        ProbedModel(label="Uni", attention="causal", **settings),
        ProbedModel(label="Bi, untrained", attention="bidirectional", **settings),
    ]
    for model in config.probing.models or both:
        words = (Path(model.name).name, model.attention, model.route)
        label = model.label or ", ".join(word for word in words if word)
        if label in models:
            raise UserError(f"probing.models: two are called {label!r}; give each a label")
        models[label] = model
    return models


def described(tasks: Sequence[Task]) -> dict[str, Any]:
    """The record's counts for each task: items, words, and words that could not be placed."""
    return {
        task.name: {
            "items": len(task.words),
            "words": len(set(task.groups)),
            "unplaced": task.unplaced,
        }
        for task in tasks
    }


def probe(
    config: Config,
    label: str,
    which: ProbedModel,
    source: ModelSource,
    model: PreTrainedModel,
    tasks: Sequence[Task],
    folder: Path,
) -> dict[str, Any]:
    """Everything that is measured of one model.

    Its vectors stay in `folder` for another run, and its report for a run that goes on.
    """
    context = context_length(model.config)
    settings = bounded(config.probing, context, "probing") if context else config.probing
    tokenizer = source.tokenizer
    count = model.config.get_text_config().num_hidden_layers + 1
    layers = _layers(settings, count)
    path = folder / file_name(label)
    owned.claim(folder, f"{path.name}*", f".{path.name}*")
    attention = _attention(source, which)
    read_by = [digest_of_tokenizer(tokenizer), attention, which.route]
    key = digest_of_rows([resume_key(model), *read_by])
    done = Unfinished(path.with_suffix(".report.npz"), _key(key, label, tasks, settings))
    if config.resume == "auto" and (kept := done.load("report")):
        log.info("%s: probed already", label)
        return json.loads(str(kept[0])) | {"model": which.name}
    log.info("%s: %d of %d layers of %s", label, len(layers), count - 1, which.name)

    words = list(dict.fromkeys(word for word in _words(tasks, settings.controls)))
    sentences = Sentences(words, tokenizer, settings.max_tokens)
    keys: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "key": key}
    absolute = [layer % count for layer in layers]
    positions = settings.positions
    vectors = word_vectors(
        model, sentences, path.with_suffix(".npy"), absolute, **keys, positions=positions
    )
    index = {word: number for number, word in enumerate(words)}
    lost = sum(place is None for place in sentences.places)
    report = {
        **{"label": label, "model": which.name, "attention": attention, "route": which.route},
        **{
            "words": len(words),
            "max_tokens": settings.max_tokens,
            "cut_away": lost,
            "depth": count - 1,
        },
        "rows": all_rows(tasks, vectors, index, layers, settings, label),
        "anisotropy": anisotropy(model, tokenizer, tasks, path, count, settings, keys),
    }
    done.save(report=json.dumps(report))
    return report


def file_name(label: str) -> str:
    """The name of a label's files: no path, and distinct from every other label's."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:60]}-{digest}"


def _key(model: str, label: str, tasks: Sequence[Task], settings: ProbingSection) -> dict[str, Any]:
    """All that a report depends on: the model as it reads, the items, and the settings."""
    items = [(task.name, task.words, task.targets.tolist(), task.groups) for task in tasks]
    metadata = settings.model_dump(exclude={"models", "data", "jobs", "batch_tokens"})
    return {"model": model, "label": label, "items": digest_of_rows(items), "settings": metadata}


def _attention(source: ModelSource, which: ProbedModel) -> str:
    return which.attention or last_attention(source.section.adapters) or source.attention


def source_of(config: Config, which: ProbedModel) -> ModelSource:
    """Where one of the models is read from. Raises UserError."""
    changes = {"name": which.name, "revision": which.revision, "adapter": which.adapter}
    return ModelSource.of(config.model.model_copy(update=changes))


def loaded(source: ModelSource, which: ProbedModel) -> PreTrainedModel:
    """The model under its mask and its route. Raises UserError."""
    model = load_model(source, _attention(source, which) == "bidirectional")
    if which.route is not None:
        set_route(model, which.route)
    return model


def _layers(settings: ProbingSection, count: int) -> list[int]:
    """Layers as they are asked for, from the last one on. Raises UserError for one that is not.

    Negative numbers count from the end, so that models of other depths can be compared by them.
    """
    layers = list(range(-1, -count - 1, -1)) if settings.layers is None else settings.layers
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise UserError(f"probing.layers: {wrong[0]}; expected -{count} to {count - 1}")
    return layers


def _words(tasks: Sequence[Task], controls: bool) -> list[Word]:
    placed = [word for task in tasks for words in task.words for word in words]
    return placed + ([alone(word) for word in placed] if controls else [])


KEYS = ("task", "control", "position", "layer", "features", "probe", "split")


def differences(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each model differs from the first, row by row, and whether that is inside noise.

    Noise: twice the standard error of the difference, as if the two were independent.
    """
    first, *others = reports
    base = {tuple(row[key] for key in KEYS): row for row in first["rows"]}
    rows = []
    for report in others:
        for row in report["rows"]:
            base_row = base.get(tuple(row[key] for key in KEYS))
            if row["control"] != "none" or base_row is None:
                continue
            metric = BINARY if BINARY in row else NUMBERS
            errors = (row[f"{metric}_stderr"], base_row[f"{metric}_stderr"])
            by = row[metric] - base_row[metric]
            metadata = {key: row[key] for key in KEYS if key != "control"}
            rows.append(
                {"label": report["label"], "against": first["label"], **metadata, "metric": metric}
                | {"difference": by, "noise": 2 * math.hypot(*errors)}
                | {"inside_noise": abs(by) <= 2 * math.hypot(*errors)}
            )
    return rows
