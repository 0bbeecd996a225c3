"""Whatever a file or a key holds, a reader reads it or complains in one line that names it."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ubmoe.config import UserError, dump_config, load_config
from ubmoe.config.schema import Config, keys
from ubmoe.data.rows import read_texts, training_rows
from ubmoe.evaluate.sts import sts_task

NAMES = sorted({name.replace(".N", ".0") for name, _ in keys(Config)})
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
)  # NaN and infinities too
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
INTERNAL = re.compile(
    r"NoneType|Traceback|object has no|datetime|'(?:dict|list|str|int|float|tuple|bool)'|"
    r"got (?:dict|list|str|int|float|bool|None|True|False)\b"
)
FREE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(error: UserError, culprit: str = "") -> None:
    said = str(error)
    assert "\n" not in said and culprit in said and len(said) < 2000
    assert not INTERNAL.search(said), said


@FREE
@given(st.sampled_from(NAMES), VALUES)
@example("seed", -1)
@example("output_dir", "\0")
def test_a_key_takes_a_value_or_is_named(key, value):
    arguments = ["bi.stages=[{}]"] * key.startswith("bi.stages.")
    try:
        config = load_config(None, [*arguments, f"{key}={json.dumps(value)}"])
    except UserError as error:
        one_line(error)
        return
    assert isinstance(config, Config)


@FREE
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_config_file_is_read_or_named(tmp_path, content):
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except UserError as error:
        one_line(error, "some.yaml")
        return
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def a_row(value: Any) -> bytes:
    """A line of JSON Lines; half a surrogate pair stays one, as an escape."""
    return json.dumps(value).encode()


ROWS = st.dictionaries(
    st.sampled_from(["text", "messages", "sentence", "anchor", "positive", "conversations"])
    | st.text(max_size=5),
    VALUES,
    max_size=4,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), VALUES, max_size=3),
    max_size=3,
)
LINES = st.lists(ROWS | MESSAGES.map(lambda actual: {"messages": actual}), max_size=4).map(
    lambda rows: b"\n".join(map(a_row, rows))
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
@FREE
@given(content=LINES | st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
@example(content=b'{"text": "a \\ud83d b"}')
@example(content=b"text\ttext\na\tb\n")
@example(content=b"\xef\xbb\xbf\xef\xbb\xbftext\na\n")
def test_texts_are_read_or_their_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"some{suffix}"
    path.write_bytes(content)
    for read in (read_texts, training_rows):
        try:
            actual = read(str(path))
        except UserError as error:
            one_line(error, "some")
            continue
        for entry in actual:
            assert entry.where.startswith(str(path))
            strings(entry.content if read is read_texts else entry.fields)


def strings(value: Any) -> None:
    """Every text in it can be written down: no half of a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for item in value.items():
            strings(list(item))
    elif isinstance(value, list):
        for item in value:
            strings(item)


CELLS = st.sampled_from(["score", "sentence1", "sentence2", "3", "-1", "nan", "a b", "", '"', "é"])
TABLES = st.lists(st.lists(CELLS | st.text(max_size=4), max_size=5).map("\t".join), max_size=5).map(
    lambda lines: "\n".join(["score\tsentence1\tsentence2", *lines]).encode()
)


@FREE
@given(content=TABLES | st.binary(max_size=60))
def test_sentence_pairs_are_read_or_their_file_is_named(tmp_path, content):
    path = tmp_path / "some.tsv"
    path.write_bytes(content)
    try:
        task = sts_task(str(path))
    except UserError as error:
        one_line(error, "some.tsv")
        return
    task.load_data()
    scores = task.dataset["test"]["score"]
    assert len(scores) > 0 and all(map(math.isfinite, scores))
