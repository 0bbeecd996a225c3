"""STS scores are Spearman's rank correlation of cosines, of the right model, or an error."""

import csv
import gzip
import itertools
import json
import warnings

import numpy as np
import pyarrow
import pytest
from builders import random_model, run
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import TABLE2, BiSection, UserError, load_config, with_keys
from ubmoe.encoder.sentence_encoder import as_encoder, load_encoder
from ubmoe.evaluate import sts as evaluate
from ubmoe.models.source import ModelSource
from ubmoe.tiny import language, sizes


@pytest.fixture
def encoders(tiny_path):
    """Two encoders with different weights."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    models = [random_model("qwen2", vocab_size=len(tokenizer), rms_norm_eps=e) for e in (1e-6, 1.0)]
    return [as_encoder(model, tokenizer, BiSection(prompt=None)) for model in models]


def spearman(xs, ys):
    """Pearson's correlation of the ranks, ties sharing their mean rank."""

    def ranks(values):
        values = np.asarray(values, dtype=float)
        return [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]

    return np.corrcoef(ranks(xs), ranks(ys))[0, 1]


def by_hand(encoder, rows):
    a, b = (encoder.encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return 100 * spearman(cosines, [row["score"] for row in rows])


def scores(encoder, *names):
    return evaluate.sts_scores(encoder, [evaluate.sts_task(name) for name in names], 16)


SETS = {"one": "", "two": "5\ta\tb\tx\n", "three": "0\tc\td\tx\n"}


def pairs_file(tmp_path, name="pairs.tsv", extra=""):
    path = tmp_path / name
    rows = [
        f'{pair.score}\t"{pair.sentence1}\t{pair.sentence2}\tx' for pair in language.pairs(40, 9)
    ]
    path.write_text("score\tsentence1\tsentence2\tsubset\n" + "\n".join(rows) + "\n" + extra)
    return path


def test_two_local_models_get_their_own_scores_equal_to_a_hand_computation(encoders, tmp_path):
    path = pairs_file(tmp_path)
    rows = evaluate.read_pairs(path)
    assert len(rows) == 40 and rows[0]["sentence1"].startswith('"')  # nothing is quoted
    actual = [scores(encoder, "tiny", str(path)) for encoder in encoders]
    tiny_rows = [pair._asdict() for pair in language.pairs(sizes.STS_PAIRS, evaluate.TINY_SEED)]
    for encoder, section in zip(encoders, actual, strict=True):
        assert section["tasks"]["pairs"] == pytest.approx(by_hand(encoder, rows), abs=1e-3)
        assert section["tasks"]["tiny"] == pytest.approx(by_hand(encoder, tiny_rows), abs=1e-3)
        assert section["average"] == pytest.approx(np.mean(list(section["tasks"].values())))
    assert actual[0]["tasks"] != actual[1]["tasks"]


def test_a_text_of_several_pairs_is_encoded_once(encoders, tmp_path, monkeypatch):
    path = tmp_path / "repeats.tsv"
    texts = ["a b", "c", "d e f", "g", "h i"]
    lines = [f"{a}\t{b}\n" for a, b in itertools.combinations(texts, 2)]  # no two cosines tie
    lines = [f"{(3 * score) % 10}\t{line}" for score, line in enumerate(lines)]
    path.write_text("score\tsentence1\tsentence2\n" + "".join(lines))
    expected = by_hand(encoders[0], evaluate.read_pairs(path))
    encode, encoded = encoders[0].encode, []
    monkeypatch.setattr(
        encoders[0], "encode", lambda some, **keys: encoded.extend(some) or encode(some, **keys)
    )
    actual = scores(encoders[0], str(path))
    assert actual["average"] == pytest.approx(expected, abs=1e-3)
    assert sorted(encoded) == sorted(set(texts))


def test_no_warning_of_mtebs_reaches_the_user(encoders, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores(encoders[0], str(pairs_file(tmp_path)))
    assert not [item for item in said if "mteb" in item.filename]


def test_the_interval_of_a_score_is_a_slow_bootstraps(encoders, tmp_path):
    path = pairs_file(tmp_path)
    rows = evaluate.read_pairs(path)
    a, b = (encoders[0].encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    gold = np.array([row["score"] for row in rows])
    rng, slow = np.random.default_rng(1), []
    for _ in range(3000):
        drawn = rng.integers(0, len(rows), len(rows))
        slow.append(100 * spearman(cosines[drawn], gold[drawn]))
    expected = np.percentile(slow, [2.5, 97.5])
    assert scores(encoders[0], str(path))["intervals"]["pairs"] == pytest.approx(expected, abs=2.5)


def test_a_prompt_out_of_the_mean_is_there_when_mteb_scores(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    settings = BiSection(prompt="Say this:\n{text}", prompt_in_mean=False)
    encoder = as_encoder(random_model("qwen2", vocab_size=len(tokenizer)), tokenizer, settings)
    path = pairs_file(tmp_path)
    rows = evaluate.read_pairs(path)
    expected = by_hand(encoder, rows)  # encode() puts the prompt there by itself
    assert scores(encoder, str(path))["average"] == pytest.approx(expected, abs=1e-3)


def test_a_score_that_is_no_number_is_an_error_and_never_averaged(encoders, tmp_path):
    path = tmp_path / "flat.tsv"
    path.write_text("score\tsentence1\tsentence2\n3\ta\tb\n3\tc\td\n3\te\tf\n")
    with pytest.raises(UserError, match="flat scores nan"):
        scores(encoders[0], str(path))


def test_no_task_means_no_score(encoders):
    section = scores(encoders[0])
    assert (section["tasks"], section["average"]) == ({}, None)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("oops\ta\tb\n", ":42: got the score 'oops'; expected a number"),
        ("1\tonly one\n", ":42: lacks a column sentence2"),
        ("1\t \tb\n", ":42: empty sentence1"),
        ("1\ta stray\ttab\tb\tx\n", ":42: got 5 columns, expected 4"),
        ("nan\ta\tb\n", ":42: got the score 'nan'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, extra, expected):
    with pytest.raises(UserError) as caught:
        evaluate.sts_task(str(pairs_file(tmp_path, extra=extra)))
    assert expected in str(caught.value)


def test_files_of_one_stem_are_both_scored_under_names_that_differ(encoders, tmp_path):
    paths = []
    for number, folder in enumerate(("a", "b", "b/c")):
        (tmp_path / folder).mkdir()
        paths.append(pairs_file(tmp_path / folder, "test.tsv", f"{number}\tsome\twords\n" * number))
    paths.append(pairs_file(tmp_path, "other.tsv"))
    tasks = evaluate.sts_tasks([str(path) for path in paths])
    actual = evaluate.sts_scores(encoders[0], tasks, 16)
    assert list(actual["tasks"]) == ["a/test", "b/test", "c/test", "other"]
    for name, path in zip(actual["tasks"], paths, strict=True):
        expected = by_hand(encoders[0], evaluate.read_pairs(path))
        assert actual["tasks"][name] == pytest.approx(expected, abs=1e-3)
    assert actual["average"] == pytest.approx(np.mean(list(actual["tasks"].values())))


def test_a_file_is_not_called_as_what_needs_no_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    names = [str(pairs_file(folder, f"{name}.tsv")) for name in ("STS12", "tiny", "plain")]
    tasks = evaluate.sts_tasks(["STS12", "tiny", *names])
    called = [task.metadata.name for task in tasks]
    assert called == ["STS12", "tiny", "mine/STS12", "mine/tiny", "plain"]
    with pytest.raises(UserError, match=r"plain.tsv is named twice"):
        evaluate.sts_tasks([names[2], str(folder / ".." / "mine" / "plain.tsv")])


def test_missing_files_and_unknown_tasks(tmp_path):
    (tmp_path / "empty.tsv").write_text("score\tsentence1\tsentence2\n")
    for name, expected in (
        (str(tmp_path / "none.tsv"), "cannot be read"),
        (
            str(tmp_path / "empty.tsv"),
            "0 pairs; expected two rows at least",
        ),
        ("STS99", "no mteb task and no local file"),
        ("STSBenchmarkMultilingualSTS", "is 10 data sets .*; expected a task of one"),
        ("Banking77Classification", "is a Classification task; expected an STS task"),
    ):
        with pytest.raises(UserError, match=expected):
            evaluate.sts_task(name)


def test_the_ten_tasks_of_table_2_are_pinned_and_english():
    tasks = [evaluate.sts_task(name) for name in TABLE2]
    assert len(tasks) == 10
    for task in tasks:
        assert len(task.metadata.dataset["revision"]) == 40
        assert len(task.hf_subsets) == 1
    assert {task.metadata.name: task.hf_subsets for task in tasks}["STS22"] == ["en"]


def test_an_adapter_is_scored_under_its_own_mask_only(tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "ubmoe.json").write_text('{"attention": "causal"}')
    keys = ["model.device=cpu", f"model.adapter={tmp_path}"]
    config = load_config(None, keys)
    source = ModelSource.of(config.model)
    with pytest.raises(UserError, match=r"trained causal, not bidirectional"):
        load_encoder(config, source)
    load_encoder(with_keys(config, ["bi.attention=causal"]), source)
    untrained = [*keys, "bi.stages=[]", f"output_dir={tmp_path}/run"]
    status, _, errors = run(*untrained, script="train_bi.py")
    assert status == 2 and "trained causal, not bidirectional" in errors


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_scored_pairs_are_read_from_whatever_holds_them(tmp_path, name):
    rows = [
        {"score": 1.5, "sentence1": "A, cat.", "sentence2": "The cat."},
        {"score": 4.0, "sentence1": 'A "dog".', "sentence2": "No."},
    ]
    path = tmp_path / name
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert evaluate.read_pairs(path) == rows
    [task] = evaluate.sts_tasks([str(path)])
    assert task.metadata.name == "pairs"


def test_an_interrupted_scoring_goes_on_after_the_last_whole_task(encoders, tmp_path, monkeypatch):
    files = [pairs_file(tmp_path, f"{name}.tsv", extra) for name, extra in SETS.items()]
    tasks, partial = evaluate.sts_tasks([str(path) for path in files]), tmp_path / "partial.npz"
    expected = evaluate.sts_scores(encoders[0], tasks, 16)
    scored, score = [], evaluate._task_scores

    def until_the_third(encoder, task, *rest):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(task.metadata.name)
        return score(encoder, task, *rest)

    monkeypatch.setattr(evaluate, "_task_scores", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate.sts_scores(encoders[0], tasks, 16, partial=partial)
    files[0].write_text(files[0].read_text() + "9\tnew\twords\tx\n")
    tasks = evaluate.sts_tasks([str(path) for path in files])
    again = []
    monkeypatch.setattr(
        evaluate, "_task_scores", lambda *given: again.append(given) or score(*given)
    )

    def went_on(encoder, **more):
        again.clear()
        section = evaluate.sts_scores(encoder, tasks, 16, partial=partial, **more)
        return section, [task.metadata.name for _, task, *_ in again]

    section, names = went_on(encoders[0])
    assert scored == ["one", "two"] and names == ["one", "three"]  # one has another row by now
    assert section["tasks"].pop("one") != expected["tasks"].pop("one")
    for column in ("tasks", "intervals", "truncated"):
        assert section[column] == section[column] | {
            name: expected[column][name] for name in ("two", "three")
        }
    assert went_on(encoders[0])[1] == []

    def quick(_, task, *__):
        row = {"score": 1.0, "interval": [0.0, 2.0], "truncated": 0}
        return row | {"source": task.metadata.dataset}

    score = quick
    for other in (encoders[1], encoders[0]):  # each takes the other's place
        assert went_on(other)[1] == ["one", "two", "three"]
    assert went_on(encoders[0], route="half")[1] == ["one", "two", "three"]
    encoders[0].max_seq_length = 5
    assert went_on(encoders[0], route="half")[1] == ["one", "two", "three"]
