"""A probe finds what was planted, nothing in shuffled labels, and errors that know of words."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from ubmoe.probing import probes
from ubmoe.probing.anisotropy import mean_cosine
from ubmoe.probing.items import Task
from ubmoe.probing.word_vectors import Word


def task(targets, groups=None, pair=False, test=None):
    count = len(targets)
    word = Word("a", 0, 1)
    groups = groups or [f"w{number % 60}" for number in range(count)]
    return Task("t", [(word, word) if pair else (word,)] * count, targets, groups, test=test)


@pytest.fixture
def planted():
    """(features, labels by a direction of them, numbers that are linear in them)."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(900, 12))
    direction = rng.normal(size=(12, 2))
    numbers = features @ direction
    return features, (numbers[:, 0] > 0).astype(float), numbers + 0.1 * rng.normal(size=(900, 2))


@pytest.mark.parametrize("kind", ["linear", "ridge", "mlp"])
@pytest.mark.slow
def test_a_planted_feature_is_found_and_shuffled_labels_are_not(planted, kind):
    features, labels, numbers = planted
    for how in ("random", "lemma"):
        assert probes.scores(kind, task(labels), features, how, 1)["balanced_accuracy"] > 0.9
        actual = probes.scores(kind, task(labels), features, how, 1, shuffled=True)
        error = actual["balanced_accuracy_stderr"]
        assert abs(actual["balanced_accuracy"] - 0.5) < 3 * error < 0.25
    for target in (numbers, numbers[:, :1]):
        assert probes.scores(kind, task(target), features, "random", 1)["r2"] > 0.95
    shuffled = probes.scores(kind, task(numbers), features, "random", 1, shuffled=True)
    assert abs(shuffled["spearman"]) < 3 * shuffled["spearman_stderr"]


def test_a_ridge_predicts_where_there_are_as_many_features_as_items():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(125, 100))  # 100 of them to fit
    target = features[:, :5].sum(1, keepdims=True) + 0.5 * rng.normal(size=(125, 1))
    actual = {
        kind: probes.scores(kind, task(target), features, "random", 1)["r2"]
        for kind in ("linear", "ridge")
    }
    assert actual["linear"] < 0 < 0.4 < actual["ridge"]
    # the penalty by hand: the one whose fit misses least what it has not seen
    test = probes.split(task(target), "random", 1)
    own, said = features[~test], target[~test, 0]
    own = (own - own.mean(0)) / own.std(0)
    missed = []
    for penalty in probes.PENALTIES:
        errors = []
        for left in range(len(said)):
            seen = np.arange(len(said)) != left
            centre, level = own[seen].mean(0), said[seen].mean()
            inner = own[seen] - centre
            weights = np.linalg.solve(
                inner.T @ inner + penalty * np.eye(100), inner.T @ (said[seen] - level)
            )
            errors.append((own[left] - centre) @ weights + level - said[left])
        missed.append(np.mean(np.square(errors)))
    ridge = probes.fitted("ridge", task(target), features[~test], said, 1)[-1]
    assert ridge.alpha_ == probes.PENALTIES[int(np.argmin(missed))]


def test_metrics_are_those_of_paper_and_pencil():
    targets, said = np.array([1, 1, 1, 0.0]), np.array([1, 1, 0, 0.0])
    actual = probes.binary_metrics(targets, said)
    assert actual == {"accuracy": 0.75, "balanced_accuracy": pytest.approx((2 / 3 + 1) / 2)}
    drawn = np.random.default_rng(0).integers(0, 3, (2, 50))
    theirs = balanced_accuracy_score(*drawn)
    assert probes.binary_metrics(*drawn)["balanced_accuracy"] == pytest.approx(theirs)
    targets, said = np.array([[1.0], [2], [3]]), np.array([[1.0], [3], [2]])
    actual = probes.number_metrics(targets, said)
    assert actual["mse"] == pytest.approx(2 / 3) and actual["r2"] == pytest.approx(1 - 2 / 2)
    assert actual["pearson"] == pytest.approx(0.5) == actual["spearman"]
    assert probes.number_metrics(targets, np.ones((3, 1)))["pearson"] == 0.0


def test_errors_are_those_of_whole_words():
    """Each word is wholly right or wholly wrong: the words are what counts, not the items."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7
    groups = np.repeat(np.arange(40), 25)
    targets = rng.integers(2, size=1000).astype(float)
    said = np.where(np.repeat(right, 25), targets, 1 - targets)
    errors = probes.standard_errors(probes.binary_metrics, targets, said, groups)
    share = right.mean()
    assert errors["accuracy"] == pytest.approx((share * (1 - share) / 40) ** 0.5, rel=0.2)
    apart = probes.standard_errors(probes.binary_metrics, targets, said, np.arange(1000))
    assert apart["accuracy"] < errors["accuracy"] / 3


def test_no_word_is_on_both_sides_of_a_lemma_split():
    labels = np.arange(300) % 2
    item = task(labels)
    test = probes.split(item, "lemma", 3)
    groups = np.array(item.groups)
    assert not set(groups[test]) & set(groups[~test]) and 0.1 < test.mean() < 0.3
    assert probes.split(item, "random", 3).sum() == 60
    shipped = task(labels, test=labels.astype(bool))
    assert probes.splits(shipped) == ("shipped",) and probes.splits(item) == ("random", "lemma")
    assert (probes.split(shipped, "shipped", 3) == labels).all()


def test_pairs_are_combined_as_in_the_paper():
    vectors = np.array([[[1.0, 2], [3, -1]], [[0, 1], [0, 5]]])
    assert probes.combined(vectors, "difference").tolist() == [[2, 3], [0, 4]]
    assert probes.combined(vectors, "concatenation").tolist() == [[1, 2, 3, -1], [0, 1, 0, 5]]
    assert probes.combined(vectors, "cosine")[:, 0].tolist() == pytest.approx([1 / 50**0.5, 1])


def test_mean_cosine_is_that_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 5)) + 1
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[a] @ unit[b] for a in range(7) for b in range(7) if a != b]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs))


def test_mlps_have_the_sizes_of_the_paper():
    labels = task(np.arange(10) % 2)
    assert probes.sizes(labels, 64) == ((20, 10), 16) and probes.sizes(labels, 1) == ((5, 2), 8)
    one, many = (task(np.zeros((10, columns))) for columns in (1, 11))
    assert probes.sizes(one, 64) == ((40, 20), 8) and probes.sizes(many, 64) == ((40, 20), 16)


def test_a_split_without_both_classes_gives_nothing():
    labels = np.zeros(100)
    labels[:3] = 1
    shipped = task(labels, test=np.arange(100) > 50)
    assert probes.scores("linear", shipped, np.ones((100, 2)), "shipped", 0) == {}
