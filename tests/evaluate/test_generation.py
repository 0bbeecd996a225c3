"""lm-eval scores what a hand computation gives, and never a model that reads the future."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import drawn, join, random_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import EvaluationSection, UserError, load_config
from ubmoe.data.chats import read_chats
from ubmoe.evaluate import generation
from ubmoe.models.source import ModelSource
from ubmoe.tiny import tasks as tiny_tasks

TASK = """
task: my_facts
custom_dataset: !function utils.load
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def model(tiny_path):
    return AutoModelForCausalLM.from_pretrained(tiny_path).eval()


def settings(**keys):
    return EvaluationSection(**{"generation": ["tiny"], "batch_size": 8} | keys)


@torch.no_grad()
def likelihood(model, tokenizer, prompt, choice):
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
    logs = model(ids).logits[0].log_softmax(-1)
    return sum(logs[place - 1, ids[0, place]].item() for place in range(len(start), ids.shape[1]))


def by_hand(model, tokenizer, rows, prompt):
    right = 0
    for row in rows:
        asked = prompt.replace("{{question}}", row["question"])
        scores = [likelihood(model, tokenizer, asked, choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["gold"]
    return 100 * right / len(rows)


def test_scores_are_those_of_a_hand_computation(tokenizer, capsys):
    model = random_model("qwen2", vocab_size=len(tokenizer))  # knows nothing, so it errs
    actual = generation.generation_scores(model, tokenizer, settings(limit=25))
    for task, rows, prompt in (
        ("tiny_facts", tiny_tasks.facts(), tiny_tasks.QUESTION),
        ("tiny_grammar", tiny_tasks.grammar(), "<|im_start|>"),
    ):
        expected = by_hand(model, tokenizer, rows[:25], prompt)
        assert actual["tasks"][task]["acc"] == pytest.approx(expected)
        assert 0 < expected < 100
    scores = [actual["tasks"][name]["acc"] for name in actual["metrics"]]
    assert actual["average"] == pytest.approx(sum(scores) / 2)
    assert actual["metrics"] == {"tiny_facts": "acc", "tiny_grammar": "acc"}
    assert capsys.readouterr().out == ""


def test_a_batch_of_8_scores_like_one_at_a_time(tiny_path, tokenizer):
    uni, bi = (AutoModelForCausalLM.from_pretrained(tiny_path) for _ in range(2))
    with torch.no_grad():
        for layer in bi.model.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
    mixture = drawn(join(uni, bi), scale=0.1)
    rows = tiny_tasks.grammar()[:12]  # of many lengths
    asked = [
        SimpleNamespace(args=("<|im_start|>", text)) for row in rows for text in row["choices"]
    ]
    actual = {
        size: [
            score
            for score, _ in HFLM(
                pretrained=mixture, tokenizer=tokenizer, batch_size=size
            ).loglikelihood(asked, disable_tqdm=True)
        ]
        for size in (1, 8)
    }
    assert actual[8] == pytest.approx(actual[1], abs=1e-4)
    by_hand = [likelihood(mixture, tokenizer, *item.args) for item in asked]
    assert actual[8] == pytest.approx(by_hand, abs=1e-3)


def test_the_embedded_model_knows_its_facts_and_its_grammar(model, tokenizer):
    actual = generation.generation_scores(model, tokenizer, settings())
    assert actual["tasks"]["tiny_facts"]["acc"] > 90 < actual["tasks"]["tiny_grammar"]["acc"]


def test_git_does_not_complain_outside_of_a_repository(
    model, tokenizer, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    generation.generation_scores(model, tokenizer, settings(limit=2))
    assert "fatal" not in capfd.readouterr().err


def test_nothing_is_said_of_how_we_call_lm_eval(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(generation, "WARNED", {})
    generation.generation_scores(model, tokenizer, settings(limit=2))
    assert not [item.getMessage() for item in caplog.records if item.name.startswith("lm_eval")]


def test_facts_have_four_answers_of_one_kind_and_one_right():
    from ubmoe.tiny import language

    right = {fact.question: fact.answer for fact in language.facts()}
    rows = tiny_tasks.facts()
    assert len(rows) == len(right)
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["gold"]] == right[row["question"]]
        assert len({choice.split()[0] for choice in row["choices"]}) == 1
    assert len({row["gold"] for row in rows}) == 4
    for row in tiny_tasks.grammar():
        a, b = row["choices"]
        assert a != b and sorted(a.split()) == sorted(b.split())


def test_a_task_yaml_is_a_task_and_a_score_that_is_no_number_an_error(model, tokenizer, tmp_path):
    rows = tiny_tasks.grammar()[:3]
    (tmp_path / "facts.yaml").write_text(TASK)
    (tmp_path / "utils.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        f"def load(**_): return DatasetDict(test=Dataset.from_list({rows}))\n"
        "def nan(doc, results): return {'acc': float('nan')}\n"
    )
    path = str(tmp_path / "facts.yaml")
    generation.check_tasks([path, "tiny"])
    actual = generation.generation_scores(model, tokenizer, settings(generation=[path]))
    assert actual["tasks"] == {"my_facts": {"acc": 100.0}} and actual["average"] == 100.0
    (tmp_path / "facts.yaml").write_text(TASK + "process_results: !function utils.nan\n")
    with pytest.raises(UserError, match="my_facts has no finite acc"):
        generation.generation_scores(model, tokenizer, settings(generation=[path]))


def test_no_task_means_no_score(model, tokenizer):
    actual = generation.generation_scores(model, tokenizer, settings(generation=[]))
    assert (actual["tasks"], actual["average"]) == ({}, None)


@pytest.mark.slow
def test_what_is_no_task_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"winogrand: no lm-eval task; did you mean .*winogrande"):
        generation.check_tasks(["winogrand"])
    with pytest.raises(UserError, match=r"none.yaml: no lm-eval task YAML with a task: name"):
        generation.check_tasks([str(tmp_path / "none.yaml")])
    (tmp_path / "list.yaml").write_text("- task: x")
    with pytest.raises(UserError, match=r"list.yaml: no lm-eval task YAML"):
        generation.check_tasks([str(tmp_path / "list.yaml")])
    generation.check_tasks(["mmlu", "winogrande", "truthfulqa_mc2"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("multiple_choice", "many_choice"), "no lm-eval task"),
        (("test_split: test", "test_split: none"), "no lm-eval task"),
        (("doc_to_choice", "doc_too_choice"), "no lm-eval task"),
    ],
)
def test_a_broken_task_yaml_is_refused_before_anything_is_scored(tmp_path, change, expected):
    (tmp_path / "utils.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def load(**_):\n"
        "    rows = [{'choices': ['a', 'b'], 'gold': 0}]\n"
        "    return DatasetDict({'test': Dataset.from_list(rows)})\n"
    )
    path = tmp_path / "task.yaml"
    path.write_text(TASK)
    generation.check_tasks([str(path)])
    path.write_text(TASK.replace(*change))
    with pytest.raises(UserError, match=expected):
        generation.check_tasks([str(path)])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("task: one", "task: one", r"b.yaml and .*a.yaml are both called one; expected a task: of"),
        ("task: one", "task: tiny_facts", "tiny and .*b.yaml are both called tiny_facts"),
        ("task: one", "task: winogrande", "b.yaml is called winogrande, as a task of lm-eval"),
        ("task: one", "group: g\ntask: [one, two]", "b.yaml is a group; name its tasks"),
    ],
)
def test_two_things_of_one_name_are_never_averaged(tmp_path, first, second, expected):
    names = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    for name, text in zip(names, (first, second), strict=True):
        Path(name).write_text(text)
    with pytest.raises(UserError, match=expected):
        generation.check_tasks([*names, "tiny"])


def test_a_tag_is_refused():
    with pytest.raises(UserError, match="glue is a tag of several tasks; name the tasks"):
        generation.check_tasks(["glue"])


def test_a_bidirectional_model_is_refused(tokenizer):
    model = random_model("qwen2", vocab_size=len(tokenizer))
    model.config.is_causal = False
    chats = read_chats("tiny", tokenizer, 100, 5).chats
    with pytest.raises(UserError, match="its likelihoods would read the future"):
        generation.generation_scores(model, tokenizer, settings())
    with pytest.raises(UserError, match="its likelihoods would read the future"):
        generation.perplexity(model, chats)


def test_perplexity_is_that_of_each_answer_token_alone(model, tokenizer, monkeypatch):
    chats = read_chats("tiny", tokenizer, 200, 12).chats
    losses: list[list[float]] = []
    for chat in chats:
        losses.append([])
        with torch.no_grad():
            logs = model(torch.tensor([chat.ids])).logits[0].log_softmax(-1)
        for place in range(1, len(chat.ids)):
            if chat.answer[place]:
                losses[-1].append(-logs[place - 1, chat.ids[place]].item())
    expected = math.exp(sum(map(sum, losses)) / sum(map(len, losses)))
    for budget in (1, 500, 10**6):
        monkeypatch.setattr(generation, "BATCH_TOKENS", budget)
        actual = generation.perplexity(model, chats)
        assert actual["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert actual["answers"]["losses"] == pytest.approx(list(map(sum, losses)), abs=1e-3)
        assert actual["answers"]["tokens"] == list(map(len, losses))


def test_logits_of_a_forward_are_bounded_whatever_the_vocabulary(model, tokenizer, monkeypatch):
    """With room for the logits of forty tokens no forward has more, but for a longer text's."""
    chats = read_chats("tiny", tokenizer, 200, 12).chats
    vocabulary, sizes = model.get_output_embeddings().weight.shape[0], []
    monkeypatch.setattr(generation, "LOGITS", 40 * vocabulary)
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    generation.perplexity(model, chats)
    hook.remove()
    assert sum(rows for rows, _ in sizes) == len(chats)
    assert all(rows == 1 or rows * width <= 40 for rows, width in sizes)


def test_the_interval_of_a_perplexity_is_a_slow_bootstraps(model, tokenizer):
    chats = read_chats("tiny", tokenizer, 200, 12).chats
    actual = generation.perplexity(model, chats)
    lost, tokens = (np.array(actual["answers"][name]) for name in ("losses", "tokens"))
    rng, slow = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = rng.integers(0, len(chats), len(chats))
        slow.append(math.exp(lost[drawn].sum() / tokens[drawn].sum()))
    expected = np.percentile(slow, [2.5, 97.5])
    assert actual["perplexity_interval"] == pytest.approx(expected, rel=0.02)


def test_further_chats_are_recorded_each_by_its_name(tiny_path, tmp_path, model, tokenizer):
    rows = [
        [
            {"role": "user", "content": "Where does Anna live?"},
            {"role": "assistant", "content": said},
        ]
        for said in ("in the town", "far away", "here", "there")
    ]
    lines = [json.dumps({"messages": row}) for row in rows]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    (tmp_path / "last.jsonl").write_text(lines[3])
    named = f"[{tmp_path}/long.jsonl, {tmp_path}/last.jsonl]"
    keys = [f"model.name={tiny_path}", "ubmoe.max_rows=40", "ubmoe.held_out=2"]
    config = load_config(
        None, [*keys, "evaluation.generation=[]", f"evaluation.perplexity={named}"]
    )
    source = ModelSource.of(config.model)
    actual = generation.language_model_scores(config, source)["further"]
    chats = read_chats(f"{tmp_path}/long.jsonl", tokenizer, 512).chats
    assert list(actual) == ["long", "last"]
    for name, own in (("long", chats[::2]), ("last", chats[3:])):  # evenly spaced: 0 and 2
        expected = generation.perplexity(model, own)
        assert actual[name]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    twice = f"evaluation.perplexity=[{tmp_path}/long.jsonl, other/long.jsonl]"
    with pytest.raises(UserError, match="evaluation.perplexity: two are called long"):
        generation.language_model_scores(load_config(None, [*keys, twice]), source)


def test_each_question_is_recorded_and_the_error_is_over_them(model, tokenizer):
    actual = generation.generation_scores(model, tokenizer, settings(generation=["tiny"], limit=9))
    for name, metric in actual["metrics"].items():
        values = actual["questions"][name]
        assert len(values) == 9 and set(values) <= {0.0, 1.0}
        assert 100 * np.mean(values) == pytest.approx(actual["tasks"][name][metric])
        assert actual["stderr"][name] == pytest.approx(100 * np.std(values, ddof=1) / 3)


def test_no_question_is_recorded_of_a_group_and_the_first_filter_of_a_task():
    samples = [
        {"doc_id": 1, "filter": "one", "acc": 0.0},
        {"doc_id": 0, "filter": "one", "acc": 1.0},
        {"doc_id": 1, "filter": "other", "acc": 1.0},
        {"doc_id": 0, "filter": "other", "acc": 0.0},
    ]
    actual = {"samples": {"task": samples, "corpus": [{"doc_id": 0, "bleu": ("a", "b")}]}}
    assert generation._by_question(actual, "task", "acc") == [1.0, 0.0]
    assert generation._by_question(actual, "corpus", "bleu") == []
    assert generation._by_question(actual, "group", "acc") == []


def test_shares_become_percent_and_nothing_else_does():
    raw = {"acc,none": 0.25, "acc_stderr,none": 0.1, "bleu_acc,none": 0.5, "bleu_max,none": 0.9}
    raw |= {"word_perplexity,none": 0.5, "ter,none": 1.0, "f1,none": 0.5, "alias": "x"}
    raw |= {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75}
    expected = {"acc": 25.0, "bleu_acc": 50.0, "bleu_max": 0.9, "word_perplexity": 0.5}
    expected |= {"ter": 1.0, "f1": 50.0, "exact_match": 50.0}
    assert generation.percent("some", raw) == expected
    squad = {"exact,none": 0.8, "f1,none": 0.9, "HasAns_f1,none": 85.0}
    assert generation.percent("squadv2", squad) == {"exact": 0.8, "f1": 0.9, "HasAns_f1": 85.0}
