"""mteb's benchmarks by their names, its tasks of every kind, and one instruction a task."""

import json
import logging

import mteb
import numpy as np
import pytest
from builders import random_model, run
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from ubmoe import endings
from ubmoe.config import TABLE2, BiSection, UserError, load_config
from ubmoe.encoder.sentence_encoder import as_encoder, load_encoder, load_saved, save_encoder
from ubmoe.evaluate import benchmark, sts
from ubmoe.models.source import ModelSource
from ubmoe.report.tables import evaluation_text
from ubmoe.tiny import language

LEADERBOARD = {  # the column STS of MTEB(eng, v2)
    *("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STSBenchmark", "STS17"),
    "STS22.v2",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def encoder_of(tokenizer, **settings):
    return as_encoder(random_model("qwen2", vocab_size=len(tokenizer)), tokenizer, given(settings))


def given(settings):
    return BiSection(**({"prompt": None} | settings))


def names(tasks):
    return [task.metadata.name for task in tasks]


# --- names ----------------------------------------------------------------------------------------


def test_one_word_is_the_english_column_of_the_leaderboard():
    tasks = sts.sts_tasks(["eng", "STS12", "STS16"])
    assert set(names(tasks)) == LEADERBOARD | {"STS16"} and len(tasks) == 10
    assert [task.hf_subsets for task in tasks if "STS17" in task.metadata.name] == [["en-en"]]
    assert set(names(sts.sts_tasks(["MTEB(eng, v1)"]))) == set(TABLE2)


def test_the_word_is_the_whole_benchmark_where_tasks_of_any_type_are_asked_for():
    tasks = benchmark.mteb_tasks(["eng", "Banking77Classification", "SprintDuplicateQuestions"])
    assert set(names(tasks)) >= LEADERBOARD and len(tasks) == 41  # each once
    assert len({task.metadata.type for task in tasks}) == 7


@pytest.mark.parametrize(
    ("read", "name", "said"),
    [
        (sts.sts_tasks, "STS99", "evaluation.sts: STS99: no mteb task and no local file; did you"),
        (sts.sts_tasks, "CodeRAG", "evaluation.sts: CodeRAG has no STS task; expected a benchmark"),
        (
            benchmark.mteb_tasks,
            "MTEB(eng, v9)",
            r"evaluation.mteb: MTEB\(eng, v9\): no task and no benchmark of mteb; did you mean "
            r"MTEB\(eng, v2\)\?",
        ),
        (benchmark.mteb_tasks, "Baking77Classification", "did you mean Banking77Classification?"),
        (benchmark.mteb_tasks, "CIFAR10", "CIFAR10 is of image; expected tasks of text alone"),
    ],
)
def test_an_unknown_name_is_one_line(read, name, said):
    with pytest.raises(UserError, match=said) as error:
        read([name])
    assert "\n" not in str(error.value)


def test_the_program_ends_with_one_line_for_it(tmp_path):
    code, output, errors = run(
        *("evaluation.mteb=[qqqq]", "evaluation.sts=[]", f"output_dir={tmp_path}/run"),
        script="-m ubmoe.evaluate",
    )
    assert (code, output) == (2, "")
    # runpy itself warns where an earlier test has imported the program
    said = [line for line in errors.splitlines() if "RuntimeWarning" not in line]
    assert said == ["error: evaluation.mteb: qqqq: no task and no benchmark of mteb"]


# --- scores ---------------------------------------------------------------------------------------

TEXTS = {  # of a retrieval: what is asked, and what answers it
    "q1": "the dog sleeps in the garden",
    "q2": "Anna eats bread",
    "q3": "a cat saw the small bird",
}


def metadata(name, kind, score):
    return TaskMetadata(
        name=name,
        dataset={"path": name, "revision": "1"},
        description="A stand-in.",
        type=kind,
        category="t2t",
        eval_langs=["eng-Latn"],
        main_score=score,
    )


class LocalRetrieval(AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, *_, **__):
        documents = [f"{text} by the door" for text in TEXTS.values()]
        documents += [pair.sentence1 for pair in language.pairs(20, 3)]
        corpus = [{"id": f"d{n}", "text": text, "title": ""} for n, text in enumerate(documents)]
        part = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list([{"id": k, "text": v} for k, v in TEXTS.items()]),
            "relevant_docs": {name: {f"d{n}": 1} for n, name in enumerate(TEXTS)},
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": part}}, True


class LocalClassification(AbsTaskClassification):
    metadata = metadata("LocalClassification", "Classification", "accuracy")

    def load_data(self, *_, **__):
        pairs = language.pairs(60, 5)
        rows = [{"text": pair.sentence1, "label": int("dog" in pair.sentence1)} for pair in pairs]
        parts = {"train": Dataset.from_list(rows[:40]), "test": Dataset.from_list(rows[40:])}
        self.dataset, self.data_loaded = DatasetDict(parts), True


def pairs_task(name="LocalSTS"):
    rows = [pair._asdict() for pair in language.pairs(40, 9)]
    return sts.local_task(name, rows, "1")


def ndcg(encoder):
    """By hand: one right document a query, so 1 / log2(1 + rank) each, none behind rank 10."""
    task = LocalRetrieval()
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]["text"]
    asked, actual = (encoder.encode(list(item)) for item in (TEXTS.values(), corpus))
    asked, actual = (item / np.linalg.norm(item, axis=1, keepdims=True) for item in (asked, actual))
    ranks = [1 + (row > row[n]).sum() for n, row in enumerate(asked @ actual.T)]
    return 100 * np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks])


@pytest.fixture
def stand_in(monkeypatch):
    """A benchmark of three local tasks in place of mteb's."""
    tasks = [pairs_task(), pairs_task("OtherSTS"), LocalRetrieval(), LocalClassification()]
    made = mteb.Benchmark(name="stand-in", tasks=tasks)
    monkeypatch.setattr(mteb, "get_benchmark", {"MTEB(eng, v2)": made}.__getitem__)
    return tasks


def test_a_benchmark_is_scored_as_mteb_scores_it(tokenizer, stand_in, caplog):
    caplog.set_level(logging.INFO)
    encoder = encoder_of(tokenizer)
    section = benchmark.mteb_scores(encoder, benchmark.mteb_tasks(["eng"]), 8)
    actual = {name: row["score"] for name, row in section["tasks"].items()}
    own = mteb.evaluate(encoder, LocalClassification(), cache=None).task_results[0].scores
    expected = {
        "LocalSTS": sts.sts_scores(encoder, [pairs_task()], 8)["average"],
        "OtherSTS": sts.sts_scores(encoder, [pairs_task()], 8)["average"],
        "LocalRetrieval": ndcg(encoder),
        "LocalClassification": 100 * own["test"][0]["accuracy"],
    }
    assert actual == pytest.approx(expected, abs=1e-3)
    assert section["average"] == pytest.approx(np.mean(list(expected.values())), abs=1e-3)
    types = [expected[name] for name in ("LocalSTS", "LocalRetrieval", "LocalClassification")]
    assert section["average_of_types"] == pytest.approx(np.mean(types), abs=1e-3)
    assert any("LocalRetrieval (Retrieval): " in message for message in caplog.messages)


def test_tables_and_last_words_have_both_means():
    rows = {
        "A": {"type": "STS", "metric": "cosine_spearman", "score": 50.0},
        "B": {"type": "STS", "metric": "cosine_spearman", "score": 60.0},
        "C": {"type": "Retrieval", "metric": "ndcg_at_10", "score": 20.0},
    }
    section = {"tasks": rows, "types": {"STS": 55.0, "Retrieval": 20.0}, "average": 43.333}
    evaluation = {"tasks": {}, "average": None}
    result = {"mteb": section | {"average_of_types": 37.5}, "evaluation": evaluation}
    assert list(endings.scores("evaluation", result)) == [
        "mteb: 43.3 (main scores x 100, mean of 3 tasks; of 2 types 37.5)"
    ]
    text = evaluation_text(result | {"config": {"model": {"name": "runs/x/bi"}}})
    assert "mteb of bi, main scores x 100." in text
    assert text.split()[-4:] == ["mean", "of", "types", "37.50"] and "ndcg_at_10" in text


def test_data_that_cannot_be_had_are_one_line(tokenizer, monkeypatch):
    def missing(*_, **__):
        raise ConnectionError("Couldn't reach 'mteb/x' on the Hub")

    for task in (LocalRetrieval(), pairs_task()):
        monkeypatch.setattr(type(task), "load_data", missing)
        with pytest.raises(UserError, match=f"{task.metadata.name}.*Couldn't reach"):
            if isinstance(task, LocalRetrieval):
                benchmark.mteb_scores(encoder_of(tokenizer), [task], 8)
            else:
                sts.sts_scores(encoder_of(tokenizer), [task], 8)


# --- instructions ---------------------------------------------------------------------------------

INSTRUCTIONS = {"STS": "Similar texts:\n", "STS12": "As in STS12:\n", "query": "Asked:\n"}
FORMS = {
    "alone": {},
    "template": {"prompt": "Say <{text}> in one word:"},
    "out of the mean": {"prompt": "Here it comes:\n{text}", "prompt_in_mean": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_instruction_stands_right_before_a_text_within_the_prompt(tokenizer, form):
    settings = FORMS[form] | {"instructions": INSTRUCTIONS}
    encoder = encoder_of(tokenizer, **settings)
    read = encoder.preprocess(["Anna sleeps."], prompt=encoder.prompts["STS"])
    whole = given(settings).prompt or "{text}"
    expected = tokenizer(whole.replace("{text}", "Similar texts:\nAnna sleeps."))["input_ids"]
    assert read["input_ids"][0].tolist() == expected
    assert ("prompt_length" in read) or form == "template"
    plain = encoder.preprocess(["Anna sleeps."])["input_ids"][0]
    assert len(plain) < len(expected)


@pytest.mark.parametrize("form", FORMS)
def test_stock_libraries_give_the_same_scores_by_the_saved_instructions(tokenizer, form, tmp_path):
    settings = FORMS[form] | {"instructions": INSTRUCTIONS}
    model = random_model("qwen2", vocab_size=len(tokenizer))
    encoder = as_encoder(model, tokenizer, given(settings))
    save_encoder(encoder, model, tokenizer, given(settings), tmp_path / "bi")
    stock = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    by_type, by_name, without = [], [], []
    for name, actual in (("LocalSTS", by_type), ("STS12", by_name)):
        ours = sts.sts_scores(load_saved(str(tmp_path / "bi"), "cpu"), [pairs_task(name)], 8)
        theirs = mteb.evaluate(stock, pairs_task(name), cache=None).task_results[0].get_score()
        assert ours["average"] == pytest.approx(100 * theirs, abs=1e-3)
        actual.append(ours["average"])
    for prompt, actual in (("STS", by_type), ("STS12", by_name), (None, without)):
        rows = [pair._asdict() for pair in language.pairs(40, 9)]
        sides = ("sentence1", "sentence2")
        a, b = (stock.encode([row[side] for row in rows], prompt_name=prompt) for side in sides)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        ranks = [np.argsort(np.argsort(item)) for item in (cosines, [r["score"] for r in rows])]
        actual.append(100 * np.corrcoef(*ranks)[0, 1])
    assert abs(by_type[0] - by_name[0]) > 0.1 and abs(by_type[1] - without[0]) > 0.1
    assert 'prompt_name="STS"' in (tmp_path / "bi" / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_queries_and_documents_are_read_in_the_prompt_as_any_text(tokenizer, form, tmp_path):
    model = random_model("qwen2", vocab_size=len(tokenizer))
    encoder = as_encoder(model, tokenizer, given(FORMS[form]))
    save_encoder(encoder, model, tokenizer, given(FORMS[form]), tmp_path / "bi")
    stock = SentenceTransformer(str(tmp_path / "bi"), device="cpu")
    actual = mteb.evaluate(stock, LocalRetrieval(), cache=None).task_results[0].get_score()
    assert 100 * actual == pytest.approx(ndcg(stock), abs=1e-3)
    [plain] = stock.encode(["Anna sleeps."])
    for read in (stock.encode_query, stock.encode_document):
        assert abs(read(["Anna sleeps."])[0] - plain).max() < 1e-5
    encoder.prompts.clear()
    assert (abs(encoder.encode(["Anna sleeps."], prompt="") - plain).max() > 1e-2) == (
        form == "out of the mean"
    )


def test_an_encoder_that_is_evaluated_is_given_them(tokenizer, tmp_path):
    model = random_model("qwen2", vocab_size=len(tokenizer))
    save_encoder(encoder_of(tokenizer), model, tokenizer, given({}), tmp_path / "bi")
    keys = [f"model.name={tmp_path}/bi", "model.device=cpu", f"output_dir={tmp_path}/run"]
    source = ModelSource.of(load_config(None, keys).model)
    scores = [
        sts.sts_scores(load_encoder(load_config(None, [*keys, *more]), source), [pairs_task()], 8)
        for more in ([], [f"bi.instructions={json.dumps(INSTRUCTIONS)}"])
    ]
    assert abs(scores[0]["average"] - scores[1]["average"]) > 0.1


def test_a_text_is_cut_where_its_instruction_leaves_no_room(tokenizer):
    settings = {"max_tokens": 32}
    assert sts.truncated_texts(encoder_of(tokenizer, **settings), pairs_task()) == 0
    instructed = encoder_of(tokenizer, **settings, instructions={"STS": "The dog sleeps. " * 3})
    assert sts.truncated_texts(instructed, pairs_task()) > 0
    with pytest.raises(UserError, match="bi.instructions.STS: leaves no room for a text"):
        encoder_of(tokenizer, **settings, instructions={"STS": "The dog sleeps. " * 9})


def test_an_instruction_that_a_text_melts_into_is_refused_where_the_mean_leaves_it_out(tokenizer):
    with pytest.raises(UserError, match="bi.instructions.STS: a text that begins with"):
        encoder_of(tokenizer, prompt="{text}", prompt_in_mean=False, instructions={"STS": "Say "})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "STS99",
            "bi.instructions: STS99: no task of mteb, no type of tasks as STS, not query and",
        ),
        ("Baking77Classification", "did you mean Banking77Classification?"),
        ("STS12-querry", "STS12-querry: no task of mteb"),
    ],
)
def test_a_name_that_mteb_would_pass_over_is_one_line(name, said):
    benchmark.check_instructions(["STS12", "STS", "query", "STS12-query", "Retrieval-document"])
    with pytest.raises(UserError, match=said) as error:
        benchmark.check_instructions([name])
    assert "\n" not in str(error.value)
