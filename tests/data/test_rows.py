"""Every reader gives the rows that are there, and names file and line of one that is wrong."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from ubmoe.config import UserError
from ubmoe.data import rows
from ubmoe.data.bad_rows import RowError, dropping
from ubmoe.data.rows import Row, finite_number, read_rows, read_texts, spaced, training_rows

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi\u2028there"},
        {"role": "assistant", "content": "Yo"},
    ]
}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_chats_from_json_jsonl_and_a_table(tmp_path):
    line = json.dumps(CHAT, ensure_ascii=False)
    quoted = '"' + json.dumps(CHAT["messages"]).replace('"', '""') + '"'
    for name, content in (
        ("a.json", f"[{line},\n {line}]"),
        ("a.jsonl", f"{line}\n\n{line}"),
        ("a.csv", f"messages,source\n{quoted},x\n{quoted},y\n"),
    ):
        texts = read_texts(write(tmp_path, name, content))
        assert [text.content for text in texts] == [CHAT["messages"]] * 2
        assert all(text.is_chat for text in texts)


def test_plain_text_lines_skip_blank_ones_and_keep_their_numbers(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\n\n  \n two \r\n")
    assert [(text.where, text.content) for text in read_texts(path)] == [
        (f"{path}:1", "one"),
        (f"{path}:4", "two"),
    ]


def test_a_tsv_knows_no_quoting(tmp_path):
    path = write(tmp_path, "a.tsv", 'score\ttext\n5\t"Hello\n4\tthere" he said\n')
    assert [row.fields["text"] for row in read_rows(path)] == ['"Hello', 'there" he said']


def test_a_sample_is_spaced_evenly_over_the_data():
    rows = [Row(str(number), {}) for number in range(10)]
    assert [row.where for row in spaced(rows, 4)] == ["0", "2", "5", "7"]
    assert spaced(rows, None) == spaced(rows, 10) == spaced(rows, 99) == rows


def test_the_embedded_chats_are_the_same_every_time():
    assert read_texts("tiny", 5) == read_texts("tiny", 5)
    assert len(read_texts("tiny")) == len(read_texts("tiny", 10**20)) > 100


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "empty; expected rows"),
        ("a.txt", "\n \n", "empty; expected rows"),
        ("a.json", "[]", "empty; expected rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', ":2: malformed JSON"),
        ("a.json", '[\n{"text": "a"},\n{"text" 3}]', ":3: malformed JSON"),
        ("a.json", '{"text": "a"}', 'got {"text": "a"}, expected a list'),
        ("a.jsonl", '{"text": "a"}\n["b"]', ':2: got ["b"], expected an object'),
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b"}',
            ":2: has no messages and no text (its fields: txt)",
        ),
        ("a.jsonl", '{"\\n": null}', r":1: has no messages and no text (its fields: '\n')"),
        ("a.jsonl", '{"messages": []}', ":1: messages must be a list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', ":1: turn 1: its content is null"),
        ("a.jsonl", '{"messages": ["Hi"]}', ':1: turn 1 must be {"role": "user"'),
        ("a.jsonl", '{"messages": [{"from": "narrator", "value": "x"}]}', "from 'narrator'"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
            'a part of the content is {"type": "image"',
        ),
        (
            "a.jsonl",
            '{"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}',
            ":1: an empty answer; remove the row (turn 2)",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": ["f"]}]}',
            ":1: turn 1: tool_calls must be a list of",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b \\ud83d"}',
            ":2: not valid Unicode (\\ud83d is half",
        ),
        ("a.json", '[{"text": "a \\ude00"}]', ": item 1: not valid Unicode"),
        (
            "a.csv",
            'messages\n"[{""role"": ""user"", ""content"": ""\\ud83d""}]"\n',
            ":2: not valid",
        ),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}',
            ":1: malformed JSON (the key 'text' occurs twice",
        ),
        ("a.csv", "text,b,text\n1,2,3\n", ":1: two columns are called text"),
        ("a.tsv", "text\t text\n1\t2\n", ":1: two columns are called text"),
        (
            "a.tsv",
            "text\tb\none\ttwo\tthree\n",
            ":2: got 3 columns, expected 2 (text, b); is there",
        ),
        ("a.csv", 'text\nfine\n"open\nand on\n', ":3: malformed row"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": " "}]}', ":1: empty text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}', ":2: empty text"),
        ("a.txt", b"good\nbad \xff\n", ":2: not UTF-8"),
        ("a.csv", 'text,b\n"open,1\n', "malformed row"),
        ("a.csv", "a,text\n1\n", ":2: got 1 columns, expected 2 (a, text)"),
        ("a.csv", "text,a\none, two,1\n", ":2: got 3 columns, expected 2 (text, a)"),
        ("a.jsonl", "[" * 200_000, ":1: malformed JSON"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", ":1: malformed JSON"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, name, content, expected):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        read_texts(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "folder.json"])
def test_a_file_that_is_not_there(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(str(tmp_path / name))


def test_a_name_that_is_neither_file_nor_hub_id(tmp_path):
    for name in (str(tmp_path), "data.parquet/x/y", "what is this"):
        with pytest.raises(UserError, match="expected a hub id, or a file ending in .json"):
            read_texts(name)


def test_a_hub_data_set_that_cannot_be_had_is_one_line():
    with pytest.raises(UserError) as caught:
        read_texts("nobody/nothing:default:train")
    assert "nobody/nothing:default:train: cannot be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_rows_come_from_the_named_config_and_split(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [text.content for text in read_texts("org/set")] == ["a", "b"]
    assert read_texts("org/set:small:test")[1].where == "org/set:small:test: row 1"
    read_texts("org/set::test")
    assert calls == [
        ("org/set", None, "train"),
        ("org/set", "small", "test"),
        ("org/set", None, "test"),
    ]


class Table:
    """A hub's data set, which knows the places of the rows that were made objects."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        self.read.append(place)
        return self.rows[place]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


@pytest.fixture
def hub(monkeypatch):
    """rows -> the data set org/set, in which they are."""
    import datasets

    def holding(table):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
        return table

    return holding


def first_all(rows, most):
    """Numbers and rows, chosen from a list of all of them."""
    numbered = list(enumerate(rows))
    if most is None or most >= len(numbered):
        return numbered
    return [numbered[index * len(numbered) // most] for index in range(most)]


@pytest.mark.parametrize("most", [1, 3, 7, 10, 11, None])
def test_the_chosen_rows_of_a_hub_alone_are_read(hub, most):
    rows = [{"text": f"text {number}"} for number in range(10)]
    chosen = first_all(rows, most)
    for read, content in (
        (read_texts, lambda text: text.content),
        (training_rows, lambda row: row.fields["text"]),
    ):
        table = hub(Table(rows))
        actual = [(entry.where, content(entry)) for entry in read("org/set", most)]
        assert actual == [(f"org/set: row {number}", row["text"]) for number, row in chosen]
        assert table.read == [number for number, _ in chosen]


@pytest.mark.parametrize("most", [4, None])
def test_chats_of_a_parquet_file_are_those_of_a_list(hub, tmp_path, most):
    import datasets

    rows = [{"messages": [{"role": "user", "content": f"{n}"}], "x": None} for n in range(11)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    places = {"data_files": str(tmp_path / "a.parquet"), "cache_dir": str(tmp_path / "cache")}
    hub(datasets.load_dataset("parquet", split="train", **places))
    assert [(text.where, text.content) for text in read_texts("org/set", most)] == [
        (f"org/set: row {number}", row["messages"]) for number, row in first_all(rows, most)
    ]


def test_a_hubs_bad_row_is_met_where_it_is_chosen_and_not_replaced(hub):
    rows = [{"text": text} for text in ("a", "b", "", "d", "e", "f")]  # of 3: 0, 2 and 4
    hub(Table(rows))
    with pytest.raises(UserError, match="org/set: row 2: empty text"):
        read_texts("org/set", 3)
    assert [text.content for text in read_texts("org/set", 2)] == ["a", "d"]
    with dropping(True) as dropped:
        assert [text.content for text in read_texts("org/set", 3)] == ["a", "e"]
    assert dropped == {"org/set: row 2"}


def test_a_files_line_that_cannot_be_parsed_is_dropped_before_the_choice(tmp_path):
    lines = ['{"text": "a"}', "{", '{"text": "c"}', '{"text": ""}', '{"text": "e"}']
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    with dropping(True) as dropped:  # of the four that are left the first and the third
        assert [text.where for text in read_texts(path, 2)] == [f"{path}:1"]
    assert dropped == {f"{path}:2", f"{path}:4"}


def test_an_empty_hub_data_set(hub):
    hub(Table([]))
    with pytest.raises(UserError, match="org/set: empty; expected rows"):
        read_texts("org/set", 3)


@pytest.mark.parametrize(
    "text", ["1_0", "٣", "inf", "-infinity", "nan", "1e400", "0x1", "1e", ".", ""]
)
def test_a_score_is_a_number_as_everybody_writes_it(text):
    with pytest.raises(RowError, match="a.tsv:2: got .*; expected a number"):
        finite_number("a.tsv:2", text)


def test_usual_numbers_are_read():
    actual = [finite_number("", text) for text in ("3", "-1.5", "+.5", "4.", "1e-3", " 2 ")]
    assert actual == [3, -1.5, 0.5, 4, 0.001, 2]


def test_parquet_and_gzipped_lines_are_read_row_by_row(tmp_path):
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ("Hello.", "Good day.")]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    lines = "".join(f"{json.dumps(chat)}\n" for chat in chats)
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name, places in (
        ("chats.parquet", ["chats.parquet: row 1", "chats.parquet: row 2"]),
        ("chats.jsonl.gz", ["chats.jsonl.gz:1", "chats.jsonl.gz:2"]),
    ):
        actual = list(read_rows(str(tmp_path / name)))
        assert [row.fields for row in actual] == chats
        assert [row.where.removeprefix(f"{tmp_path}/") for row in actual] == places


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.parquet", "no Parquet file"), ("a.jsonl.gz", "no gzip file"), ("b.parquet", "cannot be")],
)
def test_what_is_no_such_file_is_one_line(tmp_path, name, expected):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "a.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(UserError, match=expected) as caught:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_a_gzipped_file_is_bounded_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "DATA", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a line\n" * 1000))
    with pytest.raises(UserError, match="holds more than"):
        list(read_rows(str(tmp_path / "a.txt.gz")))
