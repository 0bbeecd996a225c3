"""Rows of local benchmark files for the task YAMLs beside this file, which lm-eval calls."""

import csv
import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def rows(folder, file, **_):
    """Objects of a .jsonl file: query, choices and gold, or what a task's template names."""
    text = (Path(folder) / file).read_text(encoding="utf-8")
    return _test([json.loads(line) for line in text.split("\n") if line.strip()])


def truthfulqa(folder, file, **_):
    """Questions with all their answers and labels, 1 for a true one."""
    found = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    return _test(
        [
            {
                "question": each["question"],
                "answers": list(each["mc2_targets"]),
                "labels": list(each["mc2_targets"].values()),
            }
            for each in found
        ]
    )


def mmlu(folder, file, **_):
    """Questions of every <subject>_test.csv in a folder, with their subject."""
    found = []
    for path in sorted((Path(folder) / file).glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv").replace("_", " ")
        with path.open(encoding="utf-8", newline="") as lines:
            found += [each | {"subject": subject} for each in csv.DictReader(lines)]
    return _test(found)


def probability_of_true(doc, results):
    """TruthfulQA's mc2: the share of probability that true answers get."""
    import numpy as np

    weights = np.exp(np.array([likelihood for likelihood, _ in results]))
    shares = weights / weights.sum()
    return {"acc": float(shares[np.array(doc["labels"]) == 1].sum())}


def _test(found):
    return DatasetDict({"test": Dataset.from_list(found)})
