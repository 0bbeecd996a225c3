"""Probe one model after the other on the same words, and say which differences are noise."""

import dataclasses
import hashlib
import json
import logging
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm
from transformers import PreTrainedModel

from ubmoe.config import Config, ProbedModel, ProbingSection, UserError
from ubmoe.models.loading import load_model, load_tokenizer, saved_attention
from ubmoe.moe.model import set_route
from ubmoe.probing import probes
from ubmoe.probing.tasks import Task, text, tokens
from ubmoe.probing.word_vectors import Sentences, Word, word_vectors
from ubmoe.recording import replace
from ubmoe.training.trainer import digest

log = logging.getLogger(__name__)
SAMPLED = 1000  # word vectors of the anisotropy, as in the paper
CONTROLS = ("random labels", "no context")
WHOLE = 200  # sentences all of whose words are compared
BINARY, NUMBERS = "balanced_accuracy", "spearman"  # what models are compared by


def labelled(config: Config) -> dict[str, ProbedModel]:
    """The models by their labels. Raises UserError for two of one label."""
    found: dict[str, ProbedModel] = {}
    own = {key: getattr(config.model, key) for key in ("name", "revision", "adapter")}
    both = [
        ProbedModel(label="Uni", attention="causal", **own),
        ProbedModel(label="Bi, untrained", attention="bidirectional", **own),
    ]
    for model in config.probing.models or both:
        words = (Path(model.name).name, model.attention, model.route)
        label = model.label or ", ".join(word for word in words if word)
        if label in found:
            raise UserError(f"probing.models: two are called {label!r}; give each a label")
        found[label] = model
    return found


def described(tasks: Sequence[Task]) -> dict[str, Any]:
    """What the record says of each task: items, words, and what could not be placed."""
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
    model: PreTrainedModel,
    tasks: Sequence[Task],
    folder: Path,
) -> dict[str, Any]:
    """Everything that is measured of one model.

    Its vectors stay in `folder` for another run, and its report for a run that goes on.
    """
    settings = config.probing
    tokenizer = load_tokenizer(_section(config, which))
    count = model.config.get_text_config().num_hidden_layers + 1
    layers = _layers(settings, count)
    path = folder / re.sub(r"\W+", "-", label).strip("-").lower()
    attention = _attention(config, which)
    key = f"{digest(sorted(model.state_dict().items()))} {attention} {which.route}"
    done = path.with_suffix(".report.json")
    mark = _mark(key, label, tasks, settings)
    if config.resume == "auto" and done.exists():
        kept = json.loads(done.read_text())
        if kept["mark"] == mark:
            log.info("%s: probed already", label)
            return kept["report"]
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
        **{"words": len(words), "cut_away": lost, "depth": count - 1},
        "rows": _all_rows(tasks, vectors, index, layers, settings, label),
        "anisotropy": anisotropy(model, tokenizer, tasks, path, count, settings, keys),
    }
    replace(done, lambda file: file.write_text(json.dumps({"mark": mark, "report": report})))
    return report


def _mark(key: str, label: str, tasks: Sequence[Task], settings: ProbingSection) -> str:
    """What a report depends on: the model as it reads, the items, and the settings."""
    items = [(task.name, task.words, task.targets.tolist(), task.groups) for task in tasks]
    said = settings.model_dump(exclude={"models", "jobs", "batch_tokens"})
    return hashlib.sha256(repr((key, label, items, said)).encode()).hexdigest()


def _attention(config: Config, which: ProbedModel) -> str:
    return which.attention or saved_attention(_section(config, which))


def _section(config: Config, which: ProbedModel) -> Any:
    changes = {"name": which.name, "revision": which.revision, "adapter": which.adapter}
    return config.model.model_copy(update=changes)


def loaded(config: Config, which: ProbedModel) -> PreTrainedModel:
    """The model under its mask and its route. Raises UserError."""
    bidirectional = _attention(config, which) == "bidirectional"
    model = load_model(_section(config, which), bidirectional)
    if which.route is not None:
        set_route(model, which.route)
    return model


def _layers(settings: ProbingSection, count: int) -> list[int]:
    """Layers as they are asked for, from the last one on. Raises UserError for one that is not.

    Negative numbers count from the end, so that models of other depths can be compared by them.
    """
    wanted = list(range(-1, -count - 1, -1)) if settings.layers is None else settings.layers
    if wrong := [layer for layer in wanted if not -count <= layer < count]:
        raise UserError(f"probing.layers: {wrong[0]}; expected -{count} to {count - 1}")
    return wanted


def alone(word: Word) -> Word:
    """The word without its sentence."""
    return Word(text(word), 0, word.end - word.start)


def _words(tasks: Sequence[Task], controls: bool) -> list[Word]:
    found = [word for task in tasks for words in task.words for word in words]
    return found + ([alone(word) for word in found] if controls else [])


# --- probes ---------------------------------------------------------------------------------------


def _all_rows(
    tasks: Sequence[Task],
    vectors: np.ndarray,
    index: dict[Word, int],
    layers: list[int],
    settings: ProbingSection,
    label: str,
) -> list[dict[str, Any]]:
    """The rows of all tasks, which are probed side by side."""
    controls = ("none", *CONTROLS) if settings.controls else ("none",)
    work = [
        delayed(_rows)(task, _numbers(task, index, control), control, vectors, layers, settings)
        for task in tasks
        for control in controls
    ]
    found = Parallel(n_jobs=settings.jobs or -1, return_as="generator")(work)
    bar = tqdm(found, total=len(work), desc=f"probes of {label}", unit="task", disable=None)
    return [row for rows in bar for row in rows]


def _numbers(task: Task, index: dict[Word, int], control: str) -> np.ndarray:
    """(N, words) rows of the vectors."""
    return np.array(
        [
            [index[alone(word) if control == "no context" else word] for word in words]
            for words in task.words
        ]
    )


def _rows(
    task: Task,
    numbers: np.ndarray,
    control: str,
    vectors: np.ndarray,
    layers: list[int],
    settings: ProbingSection,
) -> list[dict[str, Any]]:
    """A row for each position, layer, probe, split and combination of a task or its control."""
    rows = []
    # the controls are of the first position alone
    positions = settings.positions if control == "none" else settings.positions[:1]
    for at, position in enumerate(positions):
        for place, layer in enumerate(layers):
            said = {"task": task.name, "control": control, "position": position, "layer": layer}
            taken = vectors[numbers, at, place]  # (N, words, D)
            rows += [said | row for row in _probed(task, taken, control, settings)]
    return rows


def _probed(
    task: Task, vectors: np.ndarray, control: str, settings: ProbingSection
) -> list[dict[str, Any]]:
    """(N, words, D) vectors; items whose word was cut away are left out.

    Raises UserError where nothing is left.
    """
    there = ~np.isnan(vectors).any((1, 2))
    if not there.any():
        raise UserError(
            f"probing.max_tokens: {settings.max_tokens} cuts every word of {task.name} away; "
            "expected more"
        )
    kept = task if there.all() else _kept(task, there)
    rows = []
    for how in probes.COMBINATIONS if task.paired else ("word",):
        features = probes.combined(vectors[there], how) if task.paired else vectors[there][:, 0]
        for kind in settings.probes:
            for split in probes.splits(task):
                # without anything drawn, one seed is as good as many
                fixed = kind == "linear" and split == "shipped" and control != "random labels"
                found = [
                    probes.scores(kind, kept, features, split, seed, control == "random labels")
                    for seed in settings.seeds[: 1 if fixed else None]
                ]
                if all(found):
                    rows.append({"features": how, "probe": kind, "split": split} | _mean(found))
    return rows


def _kept(task: Task, there: np.ndarray) -> Task:
    rows = np.flatnonzero(there)
    return dataclasses.replace(
        task,
        words=[task.words[row] for row in rows],
        targets=task.targets[rows],
        groups=[task.groups[row] for row in rows],
        test=None if task.test is None else task.test[rows],
    )


def _mean(seeds: list[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds, and `<metric>_seeds`, their standard deviation."""
    found = {name: statistics.mean(each[name] for each in seeds) for name in seeds[0]}
    metrics = [name for name in seeds[0] if not name.endswith("_stderr")]
    if len(seeds) > 1:
        found |= {
            f"{name}_seeds": statistics.stdev(each[name] for each in seeds) for name in metrics
        }
    return found


KEYS = ("task", "control", "position", "layer", "features", "probe", "split")


def differences(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each model differs from the first, row by row, and whether that is inside noise.

    Noise: twice the standard error of the difference, as if the two were independent.
    """
    first, *others = reports
    base = {tuple(row[key] for key in KEYS): row for row in first["rows"]}
    found = []
    for report in others:
        for row in report["rows"]:
            own = base.get(tuple(row[key] for key in KEYS))
            if row["control"] != "none" or own is None:
                continue
            metric = BINARY if BINARY in row else NUMBERS
            errors = (row[f"{metric}_stderr"], own[f"{metric}_stderr"])
            by = row[metric] - own[metric]
            said = {key: row[key] for key in KEYS if key != "control"}
            found.append(
                {"label": report["label"], "against": first["label"], **said, "metric": metric}
                | {"difference": by, "noise": 2 * math.hypot(*errors)}
                | {"inside_noise": abs(by) <= 2 * math.hypot(*errors)}
            )
    return found


# --- anisotropy -----------------------------------------------------------------------------------


def anisotropy(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    path: Path,
    count: int,
    settings: ProbingSection,
    keys: dict[str, Any],
) -> dict[str, list[float | None]]:
    """By layer: mean cosine of sampled word vectors, and of the words inside a sentence.

    None where there are no two words to compare.
    """
    pool = [word for task in tasks if task.paired for words in task.words for word in words]
    pool = pool or [word for task in tasks for words in task.words for word in words]
    rng = np.random.default_rng(0)
    pool = list(dict.fromkeys(pool))
    sampled = [pool[row] for row in rng.permutation(len(pool))[:SAMPLED]]
    whole = [tokens(sentence) for sentence in dict.fromkeys(word.sentence for word in sampled)]
    whole = [words for words in whole if len(words) > 1][:WHOLE]
    words = [*sampled, *(word for sentence in whole for word in sentence)]
    sentences = Sentences(words, tokenizer, settings.max_tokens)
    file = path.with_name(f"{path.name}-layers.npy")
    vectors = word_vectors(model, sentences, file, list(range(count)), **keys, positions=["same"])
    vectors = vectors[:, 0]
    ends = np.cumsum([len(sampled), *(len(sentence) for sentence in whole)])
    inside = list(zip(ends[:-1], ends[1:], strict=True))
    return {
        name: [
            _mean_known([_cosine(vectors[a:b, layer]) for a, b in spans]) for layer in range(count)
        ]
        for name, spans in {"between": [(0, len(sampled))], "within": inside}.items()
    }


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _cosine(vectors: np.ndarray) -> float | None:
    there = vectors[~np.isnan(vectors).any(1)]
    return probes.mean_cosine(there) if len(there) > 1 else None
