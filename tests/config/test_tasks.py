"""configs/tasks/ ask local files exactly as lm-eval's own tasks ask the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from builders import ROOT, random_model
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from ubmoe.config import EvaluationSection, UserError
from ubmoe.evaluate.generation import check_tasks, generation_scores, task_of

OWN = Path(lm_eval.__file__).parent / "tasks"
LOCAL = ROOT / "configs" / "tasks"
NAMES = sorted(path.stem for path in LOCAL.glob("*.yaml"))
QUERY, CHOICES = "What falls?", ["rain", "a wall that is old", "mountains"]
ARC = {
    "question": QUERY,
    "choices": {"text": CHOICES, "label": ["A", "B", "C"]},
    "answerKey": "B",
}
# task -> lm-eval's own YAML, the rows as its data set has them, and as the local file has them
ROWS = {
    "piqa": (
        "piqa/piqa.yaml",
        {"goal": QUERY, "sol1": "open it", "sol2": "close it", "label": 1},
        {"query": f"Question: {QUERY}", "choices": ["open it", "close it"], "gold": 1},
    ),
    "arc_easy": ("arc/arc_easy.yaml", ARC, {"query": QUERY, "choices": CHOICES, "gold": 1}),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        ARC,
        {"query": QUERY, "choices": CHOICES, "gold": 1},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {"sentence": "Ann saw Eve so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {
            "context_options": ["Ann saw Eve so Ann", "Ann saw Eve so Eve"],
            "continuation": "waved.",
            "gold": 0,
        },
    ),
    "truthfulqa_mc2": (
        "truthfulqa/truthfulqa_mc2.yaml",
        {"question": QUERY, "mc2_targets": {"choices": CHOICES, "labels": [1, 1, 0]}},
        {"question": QUERY, "mc2_targets": dict(zip(CHOICES, [1, 1, 0], strict=True))},
    ),
    "mmlu": (
        "mmlu/default/mmlu_anatomy.yaml",
        {"question": QUERY, "choices": [*CHOICES, "no"], "answer": 2},
        "question,choice0,choice1,choice2,choice3,answer\n"
        f"{QUERY},{CHOICES[0]},{CHOICES[1]},{CHOICES[2]},no,2\n",
    ),
}
FILES = {"piqa": "piqa.jsonl", "winogrande": "winogrande.jsonl"}
FILES |= {"arc_easy": "arc_easy_test.jsonl", "arc_challenge": "arc_challenge_test.jsonl"}
FILES |= {"truthfulqa_mc2": "truthfulqa_mc.json", "mmlu": "mmlu_test/anatomy_test.csv"}


@pytest.fixture
def folder(tmp_path):
    """Two rows of every benchmark."""
    for name, (_, _, row) in ROWS.items():
        path = tmp_path / FILES[name]
        path.parent.mkdir(exist_ok=True)
        if name == "mmlu":
            path.write_text(row + row.split("\n")[1] + "\n")
        elif name == "truthfulqa_mc2":
            path.write_text(json.dumps([row, row]))
        else:
            path.write_text(f"{json.dumps(row)}\n" * 2)
    return tmp_path


def asked(task):
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def own_task(name):
    file, row, _ = ROWS[name]
    keys = load_yaml(OWN / file)
    splits = {split: Dataset.from_list([row, row]) for split in ("validation", "test", "dev")}
    keys |= {"custom_dataset": lambda **_: DatasetDict(splits), "num_fewshot": 0}
    for unused in ("tag", "task_alias", "training_split", "fewshot_split", "fewshot_config"):
        keys.pop(unused, None)
    return ConfigurableTask(config=keys)


def test_every_task_is_compared():
    assert sorted(ROWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_are_asked_in_the_same_words(name, folder):
    local = ConfigurableTask(config=task_of(LOCAL / f"{name}.yaml", str(folder)))
    own = own_task(name)
    actual, expected = asked(local), asked(own)
    assert actual == expected and len(actual) >= 4
    docs = [next(iter(task.test_docs() or task.validation_docs())) for task in (local, own)]
    count = len(actual) // 2
    for seed in range(20):  # the same likelihoods give the same metrics
        draw = np.random.default_rng(seed).normal(-3, 2, count)
        results = [(float(value), False) for value in draw]
        scores = [
            task.process_results(doc, results) for task, doc in zip((local, own), docs, strict=True)
        ]
        for metric in local.config.metric_list:
            named = metric["metric"]
            assert scores[0][named] == pytest.approx(scores[1][named])


@pytest.mark.parametrize("name", NAMES)
def test_stock_lm_eval_reads_them_without_our_programs(name, folder, tmp_path, monkeypatch):
    path = str(LOCAL / f"{name}.yaml")
    expected = asked(own_task(name))
    [named] = get_task_dict(
        [path], TaskManager(include_defaults=False, metadata={"data": str(folder)})
    ).values()
    assert asked(named) == expected
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    [actual] = get_task_dict([path], TaskManager(include_defaults=False)).values()
    assert asked(actual) == expected


UNINSTALLED = """
import importlib.util, sys
from pathlib import Path
sys.path = [each for each in sys.path if not Path(each, "ubmoe").is_dir()]
sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
assert importlib.util.find_spec("ubmoe") is None
from lm_eval.tasks import TaskManager, get_task_dict
given = TaskManager(include_defaults=False, metadata={"data": sys.argv[2]})
[task] = get_task_dict([sys.argv[1]], given).values()
print(len(list(task.test_docs())))
"""


@pytest.mark.slow
def test_stock_lm_eval_reads_them_beside_a_checkout_that_is_not_installed(folder):
    command = [sys.executable, "-P", "-c", UNINSTALLED, str(LOCAL / "piqa.yaml"), str(folder)]
    environment = {name: item for name, item in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


def test_a_task_needs_its_folder(tmp_path):
    path = str(LOCAL / "piqa.yaml")
    with pytest.raises(UserError, match="evaluation.data: .*piqa.yaml reads local files; name"):
        check_tasks([path])
    with pytest.raises(UserError, match="none is no folder"):
        check_tasks([path], f"{tmp_path}/none")
    with pytest.raises(UserError, match="piqa.jsonl: cannot be read"):
        check_tasks([path], str(tmp_path))


def test_a_bad_row_of_a_benchmark_is_named(folder):
    (folder / "piqa.jsonl").write_text(json.dumps(ROWS["piqa"][2]) + '\n{"query": "\\ud83d"}\n')
    with pytest.raises(UserError, match="piqa.jsonl:2: not valid Unicode"):
        check_tasks([str(LOCAL / "piqa.yaml")], str(folder))


def test_they_are_scored_like_any_other(tiny_path, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("qwen2", vocab_size=len(tokenizer))
    names = [str(LOCAL / f"{name}.yaml") for name in ("piqa", "truthfulqa_mc2")]
    settings = EvaluationSection(generation=names, data=str(folder), bf16=False)
    actual = generation_scores(model, tokenizer, settings)
    assert set(actual["tasks"]) == {"piqa_local", "truthfulqa_mc2_local"}
    assert 0 < actual["tasks"]["truthfulqa_mc2_local"]["acc"] < 100
