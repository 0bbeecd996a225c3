"""Dependence over texts: buckets, errors, the uniform share, truncation, sharding, resuming."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import ROOT, metaspace_tokenizer, random_model, run
from transformers import AutoTokenizer

from ubmoe import unfinished
from ubmoe.config import DependenceSection, UserError
from ubmoe.data.padding import batches_by_length
from ubmoe.data.rows import Text
from ubmoe.dependence import COLUMNS, SHARES, measure, sums
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.dependence.sums import bucket_of
from ubmoe.dependence.texts import cut, tokenize

EDGES = [0, 4, 16, 32, 64]
SETTINGS = DependenceSection(buckets=EDGES, batch_tokens=80)


def texts(count=30, seed=0):
    """Random token lists of 1 to 49 tokens; the last bucket stays empty."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 97, generator.integers(1, 33)).tolist() for _ in range(count)] + [
        list(range(4)),
        list(range(5)),
        list(range(70)),
    ]


def one_at_a_time(model, ids):
    """(texts, L, H, 3) with no batch and no sum of ours."""
    with observed(model) as recorder:
        item = [
            dependence_of(
                model, recorder, torch.tensor([text]), torch.ones(1, len(text), dtype=int)
            )
            for text in ids
        ]
    return torch.cat(item).numpy() * 100


def test_every_number_is_the_mean_over_texts_one_at_a_time(tmp_path):
    model, ids = random_model("qwen2"), texts()
    section = measure.measure(model, ids, SETTINGS, tmp_path)
    item = one_at_a_time(model, ids)
    lengths = np.array([len(text) for text in ids])
    for number, name in enumerate(SHARES):
        assert section["overall"][name] == pytest.approx(item[..., number].mean(), abs=1e-4)
        by_text = item[..., number].mean((1, 2))
        assert section["stderr"][name] == pytest.approx(
            by_text.std(ddof=1) / len(ids) ** 0.5, abs=1e-4
        )
        for bucket in section["buckets"][:3]:
            low, high = bucket["range"]
            members = (lengths > low) & (lengths <= high)
            assert bucket["texts"] == members.sum() > 1
            assert bucket[name] == pytest.approx(by_text[members].mean(), abs=1e-4)
        for layer, row in enumerate(section["layers"]):
            assert row[name] == pytest.approx(item[:, layer, :, number].mean(), abs=1e-4)
            heads = [head[name] for head in row["heads"]]
            np.testing.assert_allclose(heads, item[:, layer, :, number].mean(0), atol=1e-4)
    nothing = dict.fromkeys((*SHARES, "first")) | {"without_first": dict.fromkeys(SHARES)}
    assert section["buckets"][3] | {"uniform": 0} == {
        "range": [32, 64],
        "texts": 0,
        **nothing,
        "stderr": nothing,
        "uniform": 0,
    }
    assert (section["texts"], section["outside_buckets"]) == (33, 1)
    assert section["tokens"] == lengths.sum()
    json.dumps(section, allow_nan=False)


def test_every_text_is_recorded_by_itself(tmp_path):
    model, ids = random_model("qwen2"), texts()
    actual = measure.measure(model, ids, SETTINGS, tmp_path)["by_text"]
    assert actual.pop("tokens") == [len(text) for text in ids]
    item = one_at_a_time(model, ids).mean((1, 2))
    assert list(actual) == list(COLUMNS)
    for number, values in enumerate(actual.values()):
        np.testing.assert_allclose(values, item[:, number], atol=1e-3)


def test_the_sink_stands_beside_every_triple(tmp_path):
    model, ids = random_model("qwen2"), texts()
    section = measure.measure(model, ids, SETTINGS, tmp_path)
    item = one_at_a_time(model, ids)
    assert list(section["overall"]) == list(SHARES)
    by_text = item.mean((1, 2))
    assert section["first"] == pytest.approx(by_text[:, 3].mean(), abs=1e-4)
    error = by_text[:, 3].std(ddof=1) / len(ids) ** 0.5
    assert section["stderr"]["first"] == pytest.approx(error, abs=1e-4)
    for number, share in enumerate(SHARES, 4):
        actual = section["without_first"][share]
        assert actual == pytest.approx(by_text[:, number].mean(), abs=1e-4)
        layer = section["layers"][1]
        assert layer["without_first"][share] == pytest.approx(
            item[:, 1, :, number].mean(), abs=1e-4
        )
        head = layer["heads"][2]["without_first"][share]
        assert head == pytest.approx(item[:, 1, 2, number].mean(), abs=1e-4)
        assert section["buckets"][0]["without_first"][share] is not None


def test_uniform_attention_without_its_first_key_is_counted_by_hand():
    """Three tokens: rows (0, 0, 1), (1/2, 0, 1/2), (1/2, 1/2, 0) as main, before, after."""
    even = sums.uniform([(3.0,), (1.0,)])
    assert even["first"] == pytest.approx((1 / 3 + 1) / 2 * 100)
    assert even["without_first"] == pytest.approx(
        {"main": 100 / 3 / 2, "before": 100 / 6 / 2, "after": 100 / 2 / 2}
    )


def test_the_uniform_share_is_that_of_attention_without_preference(tmp_path):
    ids = texts()
    section = measure.measure(random_model("qwen2"), ids, SETTINGS, tmp_path)
    expected = np.mean([[1 / len(t), (len(t) - 1) / 2 / len(t)] for t in ids], 0) * 100
    actual = section["uniform"]
    assert [actual["main"], actual["before"], actual["after"]] == pytest.approx(
        [*expected, expected[1]]
    )
    assert section["buckets"][0]["uniform"]["main"] > section["buckets"][2]["uniform"]["main"]


def test_a_text_belongs_to_the_bucket_that_its_length_closes():
    assert [bucket_of(length, EDGES) for length in (1, 4, 5, 16, 64, 65)] == [
        0,
        0,
        1,
        1,
        3,
        -1,
    ]


def test_batches_hold_every_text_once_within_the_budget():
    ids = texts()
    batches = batches_by_length(ids, 80)
    assert sorted(text for batch in batches for text in batch) == list(range(len(ids)))
    for batch in batches:
        assert len(batch) == 1 or max(len(ids[text]) for text in batch) * len(batch) <= 80
    assert len(ids[batches[0][0]]) == 70  # the longest first
    assert [len(batch) for batch in batches_by_length(ids, 1)] == [1] * len(ids)


def test_longer_texts_are_cut_at_the_limit_or_the_context_and_counted():
    model = random_model("qwen2", max_position_embeddings=20)
    assert cut(model, [[1] * 10, [1] * 11, [1] * 30], 10) == ([[1] * 10] * 3, 2)
    assert cut(model, [[1] * 10, [1] * 30], 99) == ([[1] * 10, [1] * 20], 1)


def test_chats_go_through_the_tokenizers_own_template(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    [ids] = tokenize(tokenizer, [Text("a:1", messages)])
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
    )
    [ids] = tokenize(
        tokenizer,
        [Text("a:1", messages)],
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}",
    )
    assert tokenizer.decode(ids) == "[Who?][Me.]"
    [ids] = tokenize(tokenizer, [Text("a:1", "Plain <text>")])
    assert tokenizer.decode(ids) == "Plain <text>"


def test_chats_of_a_tokenizer_without_a_template_are_texts():
    tokenizer = metaspace_tokenizer()
    turns = [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "c"}]
    [ids] = tokenize(tokenizer, [Text("a:1", turns)])
    assert ids == tokenizer("Question: a b?\n\nAnswer: c</s>")["input_ids"]
    [named] = tokenize(
        tokenizer, [Text("a:1", turns)], "{{ messages[0].content + messages[1].content }}"
    )
    assert named == tokenizer("a b?c", add_special_tokens=False)["input_ids"]


def test_templates_that_cannot_be_used(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    chats = [Text("a.jsonl:7", [{"role": "user", "content": "Who?"}])]
    for template, reason in (
        ("{{ raise_exception('no system') }}", "a.jsonl:7: the chat template fails"),
        ("{% if %}", "a.jsonl:7: the chat template fails"),
        ("", "name|cannot be read"),
        (str(tmp_path / "none.jinja"), "dependence.chat_template: .* cannot be read"),
        ("{{ 1 / 0 }}", "a.jsonl:7: the chat template fails"),
        ("{# nothing #}", "a.jsonl:7: the chat template leaves out the content of turn 1"),
    ):
        with pytest.raises(UserError, match=reason):
            tokenize(tokenizer, chats, template)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "rag": "no"}
    assert tokenizer.decode(tokenize(tokenizer, chats)[0]) == "Who?"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="gives id 97, the model has 97 embeddings"):
        measure.measure(random_model("qwen2"), [[1, 97]], SETTINGS, tmp_path)


class StopError(Exception):
    pass


def failing_in_the_fourth_batch(monkeypatch, error):
    """Makes `measure` fail once; returns the list that counts its batches from now on."""
    real, calls = measure.dependence_of, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return real(*arguments)

    monkeypatch.setattr(measure, "dependence_of", counted)
    return calls


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    model, ids = random_model("qwen2"), texts()
    whole = measure.measure(model, ids, SETTINGS, tmp_path / "none")
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    calls = failing_in_the_fourth_batch(monkeypatch, StopError)
    with pytest.raises(StopError):
        measure.measure(model, ids, SETTINGS, tmp_path)
    [left] = tmp_path.glob("*.npz")
    assert measure.measure(model, ids, SETTINGS, tmp_path, resume=True) == whole
    batches = len(batches_by_length(ids, SETTINGS.batch_tokens))
    assert len(calls) == 4 + batches - 3  # three batches were not measured again
    left.write_bytes(left.read_bytes()[:100])  # a file that cannot be read is no obstacle
    assert measure.measure(model, ids, SETTINGS, tmp_path, resume=True) == whole


def test_ctrl_c_keeps_the_batches_that_are_complete(tmp_path, monkeypatch):
    model, ids = random_model("qwen2"), texts()
    whole = measure.measure(model, ids, SETTINGS, tmp_path)
    calls = failing_in_the_fourth_batch(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(model, ids, SETTINGS, tmp_path)
    assert measure.measure(model, ids, SETTINGS, tmp_path, resume=True) == whole
    assert len(calls) == 4 + len(batches_by_length(ids, SETTINGS.batch_tokens)) - 3


def test_sums_of_the_same_run_are_taken_up_whatever_its_paths(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "ubmoe")
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    model, ids = random_model("qwen2"), texts()
    model.name_or_path = "here"
    measure.measure(model, ids, SETTINGS, tmp_path)
    model.name_or_path = "there"
    elsewhere = SETTINGS.model_copy(update={"dataset": "elsewhere.jsonl"})
    measure.measure(model, ids, elsewhere, tmp_path, resume=True)
    assert "resuming after" in caplog.text and "afresh" not in caplog.text
    with torch.no_grad():  # two rows change places: no sum of a tensor sees it
        rows = model.model.layers[0].self_attn.k_proj.weight
        rows[[1, 2]] = rows[[2, 1]]
    (tmp_path / "fresh").mkdir()
    expected = measure.measure(model, ids, SETTINGS, tmp_path / "fresh")
    assert measure.measure(model, ids, SETTINGS, tmp_path, resume=True) == expected
    assert "of another run (other weights); starting afresh" in caplog.text
    measure.measure(model, ids[:-1], SETTINGS, tmp_path, resume=True)
    assert "of another run (other data); starting afresh" in caplog.text


def test_sums_of_another_run_are_not_taken_up(tmp_path, monkeypatch):
    model, ids = random_model("qwen2"), texts()
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    measure.measure(model, ids, SETTINGS, tmp_path)
    other = texts(seed=1)
    (tmp_path / "fresh").mkdir()
    expected = measure.measure(model, other, SETTINGS, tmp_path / "fresh")
    assert measure.measure(model, other, SETTINGS, tmp_path, resume=True) == expected
    measure.measure(model, ids, SETTINGS, tmp_path)
    changed = random_model("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    expected = measure.measure(changed, ids, SETTINGS, tmp_path / "fresh")
    assert measure.measure(changed, ids, SETTINGS, tmp_path, resume=True) == expected


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tiny_path, tmp_path):
    common = ["dependence.max_texts=24", "dependence.batch_tokens=600", "model.device=cpu"]
    script = ROOT / "calculate_dp.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    launch += [str(script), *common, f"output_dir={tmp_path}/2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, _, errors = run(*common, f"output_dir={tmp_path}/1", script=script.name)
    assert code == 0, errors
    sections = []
    for processes in (1, 2):
        path = tmp_path / str(processes) / "dependence.json"
        section = json.loads(path.read_text())["dependence"]
        assert section.pop("seconds") > 0
        sections.append(section)
    one, two = (json.dumps(section, sort_keys=True) for section in sections)
    flat = [np.array([float(x) for x in _numbers(section)]) for section in sections]
    np.testing.assert_allclose(flat[0], flat[1], rtol=1e-12, atol=0)
    assert one.count("main") == two.count("main")


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [value]
