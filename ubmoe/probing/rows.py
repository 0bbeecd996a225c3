"""Every probe of a model's word vectors: a row a task, control, position, layer and split."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from tqdm import tqdm

from ubmoe.config import ProbingSection, UserError
from ubmoe.probing import probes
from ubmoe.probing.items import Task, text
from ubmoe.probing.word_vectors import Word

CONTROLS = ("random labels", "no context")


def alone(word: Word) -> Word:
    """The word without its sentence."""
    return Word(text(word), 0, word.end - word.start)


def all_rows(
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
    jobs = min(settings.jobs, len(work)) if settings.jobs else -1  # each is a process
    results = Parallel(n_jobs=jobs, return_as="generator")(work)
    bar = tqdm(results, total=len(work), desc=f"probes of {label}", unit="task", disable=None)
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
            metadata = {"task": task.name, "control": control, "position": position, "layer": layer}
            taken = vectors[numbers, at, place]  # (N, words, D)
            rows += [metadata | row for row in probed(task, taken, control, settings)]
    return rows


def probed(
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
                fixed = kind != "mlp" and split == "shipped" and control != "random labels"
                every = [
                    probes.scores(kind, kept, features, split, seed, control == "random labels")
                    for seed in settings.seeds[: 1 if fixed else None]
                ]
                if all(every):
                    rows.append({"features": how, "probe": kind, "split": split} | _mean(every))
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
    means = {name: statistics.mean(seed[name] for seed in seeds) for name in seeds[0]}
    metrics = [name for name in seeds[0] if not name.endswith("_stderr")]
    if len(seeds) > 1:
        means |= {
            f"{name}_seeds": statistics.stdev(seed[name] for seed in seeds) for name in metrics
        }
    return means
