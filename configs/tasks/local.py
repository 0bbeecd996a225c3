"""Rows of local benchmark files for the task YAMLs beside this file, which lm-eval calls."""

from pathlib import Path

from datasets import Dataset, DatasetDict

from ubmoe.data.rows import read_rows


def rows(folder, file, **_):
    """Objects of a .jsonl file: query, choices and gold, or what a task's template names."""
    return _test(_fields(Path(folder) / file))


def truthfulqa(folder, file, **_):
    """Questions with all their answers and labels, 1 for a true one."""
    return _test(
        [
            {
                "question": each["question"],
                "answers": list(each["mc2_targets"]),
                "labels": list(each["mc2_targets"].values()),
            }
            for each in _fields(Path(folder) / file)
        ]
    )


def mmlu(folder, file, **_):
    """Questions of every <subject>_test.csv in a folder, with their subject."""
    found = []
    for path in sorted((Path(folder) / file).glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv").replace("_", " ")
        found += [each | {"subject": subject} for each in _fields(path)]
    return _test(found)


def probability_of_true(doc, results):
    """TruthfulQA's mc2: the share of probability that true answers get."""
    import numpy as np

    weights = np.exp(np.array([likelihood for likelihood, _ in results]))
    shares = weights / weights.sum()
    return {"acc": float(shares[np.array(doc["labels"]) == 1].sum())}


def _fields(path):
    return [row.fields for row in read_rows(str(path))]


def _test(found):
    return DatasetDict({"test": Dataset.from_list(found)})
