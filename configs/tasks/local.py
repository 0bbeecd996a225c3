"""Rows of local benchmark files for the task YAMLs beside this file, which lm-eval calls.

{data} in a YAML's folder is ubmoe's `evaluation.data`; of lm-eval without ubmoe's programs it is
data, or what `lm_eval --metadata '{"data": "folder"}'` names.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, DatasetDict

if find_spec("ubmoe") is None:  # stock lm_eval beside a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from ubmoe.data.rows import read_rows  # noqa: E402


def rows(folder, file, data="data", **_):
    """Objects of a .jsonl file: query, choices and gold, or what a task's template names."""
    return _test(_fields(_path(folder, file, data)))


def truthfulqa(folder, file, data="data", **_):
    """Questions with all their answers and labels, 1 for a true one."""
    return _test(
        [
            {
                "question": each["question"],
                "answers": list(each["mc2_targets"]),
                "labels": list(each["mc2_targets"].values()),
            }
            for each in _fields(_path(folder, file, data))
        ]
    )


def mmlu(folder, file, data="data", **_):
    """Questions of every <subject>_test.csv in a folder, with their subject."""
    found = []
    for path in sorted(_path(folder, file, data).glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv").replace("_", " ")
        found += [each | {"subject": subject} for each in _fields(path)]
    return _test(found)


def probability_of_true(doc, results):
    """TruthfulQA's mc2: the share of probability that true answers get."""
    import numpy as np

    weights = np.exp(np.array([likelihood for likelihood, _ in results]))
    shares = weights / weights.sum()
    return {"acc": float(shares[np.array(doc["labels"]) == 1].sum())}


def _path(folder, file, data):
    return Path(folder.replace("{data}", data)) / file


def _fields(path):
    return [row.fields for row in read_rows(str(path))]


def _test(found):
    return DatasetDict({"test": Dataset.from_list(found)})
