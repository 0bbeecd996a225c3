"""Probes on word vectors: linear models, ridges and small MLPs, on standardised features.

Accuracy and balanced accuracy, or MSE, R2, Pearson and Spearman (means over the targets), with
standard errors by a bootstrap over the words that the items are about, since items of a word are
alike.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    RidgeClassifierCV,
    RidgeCV,
)
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ubmoe.bootstrap import draws
from ubmoe.probing.items import Task

SHARE = 0.2  # of a random split that is tested on
RESAMPLES = 200
PENALTIES = tuple(10.0**power for power in range(-2, 7))
COMBINATIONS = ("difference", "cosine", "concatenation")


def combined(vectors: np.ndarray, how: str) -> np.ndarray:
    """(N, 2, D) vectors of pairs -> |u - v|, cos(u, v), or [u; v]."""
    first, second = vectors[:, 0], vectors[:, 1]
    if how == "difference":
        return np.abs(first - second)
    if how == "concatenation":
        return np.concatenate((first, second), 1)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return ((first * second).sum(1) / np.maximum(norms, 1e-12))[:, None]


def split(task: Task, how: str, seed: int) -> np.ndarray:
    """(N,) True for the items to test on.

    shipped: the files' own; random: a fifth of the items; lemma: a fifth of the words, so that none
    is on both sides.
    """
    if how == "shipped":
        assert task.test is not None
        return task.test
    keys: Any = {"n_splits": 1, "test_size": SHARE, "random_state": seed}
    if how == "random":
        [(_, chosen)] = ShuffleSplit(**keys).split(task.groups)
    else:
        [(_, chosen)] = GroupShuffleSplit(**keys).split(task.groups, groups=task.groups)
    test = np.zeros(len(task.groups), dtype=bool)
    test[chosen] = True
    return test


def splits(task: Task) -> tuple[str, ...]:
    return ("random", "lemma") if task.test is None else ("shipped",)


def sizes(task: Task, features: int) -> tuple[tuple[int, int], int]:
    """Hidden units of the paper's MLPs, and their batches (its table of probes)."""
    if task.binary:
        return ((5, 2), 8) if features == 1 else ((20, 10), 16)
    return (40, 20), 8 if task.targets.shape[1] == 1 else 16


def fitted(kind: str, task: Task, features: np.ndarray, targets: np.ndarray, seed: int) -> Pipeline:
    """A probe on (N, D) features: `linear`, `ridge`, or `mlp` with the paper's sizes and batches.

    The paper's linear regression has no penalty: where N is near D it fits its items exactly, and
    predicts nothing (Hastie et al., arXiv 1903.08560). `ridge` has the one of `PENALTIES` that
    predicts the items best, each left out once.

    The paper names no optimiser and no epochs, and its rates of 1e-5 to 2e-3 mean nothing without
    them: Adam at 1e-3, until a tenth of the items that is kept out of training gains nothing.
    """
    if kind == "linear":
        model = LogisticRegression(max_iter=1000) if task.binary else LinearRegression()
    elif kind == "ridge":
        model = (RidgeClassifierCV if task.binary else RidgeCV)(PENALTIES)
    else:
        hidden, batch = sizes(task, features.shape[1])
        model = (MLPClassifier if task.binary else MLPRegressor)(
            hidden_layer_sizes=hidden,
            batch_size=batch,
            max_iter=200,
            early_stopping=True,
            random_state=seed,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sklearn, where an optimiser was stopped
        return make_pipeline(StandardScaler(), model).fit(features, targets)


def scores(
    kind: str, task: Task, features: np.ndarray, how: str, seed: int, shuffled: bool = False
) -> dict[str, float]:
    """The metrics of one probe, `<metric>_stderr` beside each. shuffled: the random-label control.

    {} where a class is missing on one side of the split.
    """
    test = split(task, how, seed)
    targets = task.targets
    if shuffled:
        targets = targets[np.random.default_rng(seed).permutation(len(targets))]
    if task.binary and any(len(np.unique(targets[side])) < 2 for side in (test, ~test)):
        return {}
    fitted_on = targets if task.binary or targets.shape[1] > 1 else targets[:, 0]
    probe = fitted(kind, task, features[~test], fitted_on[~test], seed)
    predictions = probe.predict(features[test]).reshape(targets[test].shape)
    groups = np.array(task.groups)[test]
    measure = binary_metrics if task.binary else number_metrics
    metrics = measure(targets[test], predictions)
    errors = standard_errors(measure, targets[test], predictions, groups)
    return metrics | {f"{name}_stderr": error for name, error in errors.items()}


def binary_metrics(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Accuracy, and its mean over the classes; scikit-learn's would take most of a bootstrap."""
    right = targets == predictions
    by_class = [right[targets == label].mean() for label in np.unique(targets)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(by_class))}


def number_metrics(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Means over the K of (N, K) numbers."""
    columns = list(zip(targets.T, predictions.T, strict=True))
    return {
        "mse": float(((targets - predictions) ** 2).mean()),
        "r2": float(r2_score(targets, predictions)),
        "pearson": float(np.mean([_correlation(pearsonr, *pair) for pair in columns])),
        "spearman": float(np.mean([_correlation(spearmanr, *pair) for pair in columns])),
    }


def _correlation(of: Callable, first: np.ndarray, second: np.ndarray) -> float:
    """0 where one side is constant: it predicts nothing."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(of(first, second)[0])


def standard_errors(
    measure: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    targets: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray,
) -> dict[str, float]:
    """The standard error of every metric, by a bootstrap over groups, each taken whole."""
    names, owner = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(owner == number) for number in range(len(names))]

    def measured(counts: np.ndarray) -> list[float]:
        rows = np.concatenate([members[group] for group in np.arange(len(names)).repeat(counts)])
        return list(measure(targets[rows], predictions[rows]).values())

    metrics = measure(targets, predictions)
    if len(names) < 2:  # there is nothing to draw from
        return dict.fromkeys(metrics, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a resample with one class alone
        every = (counts for some in draws(len(names), RESAMPLES) for counts in some)
        drawn = np.array([measured(counts) for counts in every])  # (RESAMPLES, metrics)
    return {
        name: float(np.nanstd(values, ddof=1))
        for name, values in zip(metrics, drawn.T, strict=True)
    }
