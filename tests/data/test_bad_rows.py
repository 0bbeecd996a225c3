"""A bad row is an error in every reader, or dropped and counted in every one."""

import json
import logging

import datasets
import pytest
from transformers import AutoTokenizer

from ubmoe.bitune.examples import read_examples
from ubmoe.config import QUESTION, StageSection, UserError
from ubmoe.data.bad_rows import dropping
from ubmoe.data.chats import read_chats
from ubmoe.data.rows import read_texts
from ubmoe.data.tokens import sentences_of
from ubmoe.dependence.texts import tokenize
from ubmoe.encoder import contrastive, mntp
from ubmoe.evaluate.sts import read_pairs
from ubmoe.probing.files import READERS


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def chat(answer):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


CHATS = [chat("Anna."), chat(""), chat("Ben."), chat("a \ud83d"), {"txt": "x"}, chat(7), chat("I.")]
TEXTS = [{"text": "one dog"}, {"text": ""}, {"text": None}, {"text": "\ude00"}, {"text": "a cat"}]
PAIRS = [
    {"query": "a", "pos": "b", "neg": "c"},
    {"query": "d", "pos": "e"},
    {"query": "f", "pos": "g", "neg": None},
    {"query": "h", "pos": ["i"], "neg": ["j"]},
    {"query": "k", "pos": ["l", "m"], "neg": "n"},
]
STS = "score\tsentence1\tsentence2\n1\ta\tb\n2\ta\tb\tc\n3\ta\n4\tx\ty\nfour\ta\tb\n"


def sts(path, _):
    return [row["score"] for row in read_pairs(path)]


def supervised(path, tokenizer):
    stage = StageSection(objective="supervised", loss="simcse", dataset=str(path))
    return contrastive.read_dataset(stage, tokenizer)[0]["negative"]


READ = {  # reader: rows, what is left of them, and the bad one that is met first
    "dp": (CHATS, lambda path, t: tokenize(t, read_texts(str(path))), 3, 4),
    "chats": (CHATS, lambda path, t: read_chats(str(path), t, 99).chats, 3, 4),
    "bitune": (CHATS, lambda path, t: read_examples(str(path), t, None, 99).chats, 3, 4),
    "question": (CHATS, lambda path, t: read_examples(str(path), t, QUESTION, 99).chats, 3, 4),
    "sentences": (
        TEXTS,
        lambda path, tokenizer: sentences_of(str(path), tokenizer),
        ["one dog", "a cat"],
        4,
    ),
    "supervised": (PAIRS, supervised, ["c", "j"], 2),
    "sts": (STS, sts, [1, 4], 3),
}


@pytest.mark.parametrize("name", READ)
def test_a_bad_row_is_refused_or_dropped_and_counted(tokenizer, tmp_path, caplog, name):
    rows, read, expected, first = READ[name]
    path = tmp_path / ("rows.tsv" if isinstance(rows, str) else "rows.jsonl")
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=f"{path.name}:{first}: ") as caught:
        read(path, tokenizer)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "ubmoe"), dropping(True) as dropped:
        actual = read(path, tokenizer)
    total = len(rows) if isinstance(rows, list) else len(rows.splitlines()) - 1
    assert (len(actual) if isinstance(expected, int) else list(actual)) == expected
    assert len(dropped) == total - len(actual)
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == min(3, len(dropped)) and named[0] == f"dropped {caught.value}"
    with pytest.raises(UserError), dropping(False):
        read(path, tokenizer)


def test_chunks_and_probing_drop_rows_too(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"text": "one dog"}, {"text": 3}])))
    stage = StageSection(objective="mntp", max_tokens=2, dataset=str(path))
    with pytest.raises(UserError, match=":2: text is 3; expected a text"):
        mntp.chunked(stage, tokenizer)
    with dropping(True) as dropped:
        assert len(mntp.chunked(stage, tokenizer)) and dropped == {f"{path}:2"}
    words = tmp_path / "Task3_x" / "c.txt"
    words.parent.mkdir()
    row = "1\tcook\tV\t2\tit is cooked .\t5.8\n"
    words.write_text(f"i\tTARGET\tPOS\tINDEX\tTEXT\tAVG\n{row}{row.replace('5.8', 'x')}")
    with pytest.raises(UserError, match=r"c.txt:3: got 'x'; expected a number"):
        READERS["concreteness"](tmp_path)
    with dropping(True) as dropped:
        [task] = READERS["concreteness"](tmp_path)
    assert len(task.words) == 1 and dropped == {f"{words}:3"}


def test_a_row_that_two_readers_meet_is_counted_once_and_none_left_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}')
    with dropping(True) as dropped:
        for _ in range(2):
            with pytest.raises(UserError, match="none of its 2 rows can be used"):
                read_texts(str(path))
        assert len(dropped) == 2


@pytest.mark.parametrize("order", [1, -1])
def test_negatives_in_some_rows_are_refused_whatever_the_order(tmp_path, order):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS[:2][::order])))
    where = f"rows.jsonl:{2 if order == 1 else 1}: has no negative"
    with pytest.raises(UserError, match=where):
        supervised(path, None)


def test_a_list_of_texts_is_called_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIRS[4]))
    with pytest.raises(UserError, match="rows.jsonl:1: pos is a list of 2; expected one text"):
        supervised(path, None)


def test_a_cell_may_be_longer_than_csvs_own_limit(tmp_path):
    for name in ("a.csv", "a.tsv"):
        path = tmp_path / name
        path.write_text("text\n" + "long " * 40_000 + "\n")
        [text] = read_texts(str(path))
        assert len(text.content) == 200_000


def test_pairs_of_a_hub_are_those_of_a_file(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: PAIRS)
    with dropping(True) as dropped:
        assert list(supervised("org/set", None)) == list(supervised(path, None)) == ["c", "j"]
    hubs = {"org/set: row 1", "org/set: row 2", "org/set: row 4"}  # counted from 0, lines from 1
    assert dropped == hubs | {f"{path}:{line}" for line in (2, 3, 5)}
