"""What is no regular file of a sensible size is refused before it is opened, whatever reads it."""

import json
import os
import time
from functools import partial

import pytest
from builders import tokenizer_of

from ubmoe import bounds, fetch, owned
from ubmoe.config import ModelSection, UserError, load_config
from ubmoe.config.reading import DEFAULT_CONFIG
from ubmoe.data.inputs import inputs
from ubmoe.data.rows import read_texts, training_rows
from ubmoe.dependence.texts import tokenize
from ubmoe.evaluate.generation import check_tasks
from ubmoe.evaluate.sts import sts_tasks
from ubmoe.models.lora import adapter_attention
from ubmoe.results import packed
from ubmoe.results.plan import execute
from ubmoe.results.records import read_result
from ubmoe.results.study import Step
from ubmoe.training.checkpoints import STAGE
from ubmoe.training.checkpoints import _resume_key_in as resume_key_in


def adapter(path):
    (path.parent / "adapter_model.safetensors").touch()
    return adapter_attention(str(path.parent))


READERS = {  # the file's name, and who reads it
    "rows.jsonl": lambda path: read_texts(str(path)),
    "rows.json": lambda path: training_rows(str(path)),
    "rows.csv": lambda path: training_rows(str(path)),
    "rows.txt": lambda path: training_rows(str(path)),
    "pairs.tsv": lambda path: sts_tasks([str(path)]),
    "run.yaml": lambda path: load_config(path),
    "chat.jinja": lambda path: tokenize(None, [], str(path)),
    "task.yaml": lambda path: check_tasks([str(path)]),
    "result.json": lambda path: read_result(path),
    "records.jsonl": lambda path: packed.read(path.parent),
    "SmolLM2-135M-Instruct.Q4_1.gguf": lambda path: fetch.fetch("smollm2-135m", str(path.parent)),
    "tokenizer.json": lambda path: tokenizer_of(ModelSection(name=str(path.parent))),
    "chat_template.jinja": lambda path: tokenizer_of(ModelSection(name=str(path.parent))),
    "ubmoe.json": adapter,
}


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def endless(path):
    with path.open("wb") as file:
        file.truncate(2**42)


@pytest.mark.parametrize("make", [pipe, device, folder, endless])
@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_file_that_is_none(tmp_path, name, make):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    make(tmp_path / name)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path / name)
    said = str(caught.value)
    assert name in said and "\n" not in said and time.monotonic() - began < 5
    expected = {folder: "is a folder", endless: "is too large"}.get(make, "is a pipe or a device")
    assert expected in said


@pytest.mark.parametrize("make", [pipe, device, folder, endless])
@pytest.mark.parametrize("key", ["dependence.dataset", "dependence.chat_template", "scan.pairs"])
def test_a_digest_waits_for_none_of_them(tmp_path, key, make):
    path = tmp_path / "rows.tsv"
    make(path)
    section = key.partition(".")[0]
    assert inputs(load_config(None, [f"{key}={path}"]), section)[key] is None


@pytest.mark.parametrize("make", [pipe, device, endless])
def test_no_mark_is_waited_for(tmp_path, make):
    make(tmp_path / owned.MARK)
    make(tmp_path / "sts.json")
    make(tmp_path / "train_bi.config.yaml")
    began = time.monotonic()
    assert owned.claimed(tmp_path) is None
    for name in ("sts.json", "train_bi.config.yaml"):
        with pytest.raises(UserError, match="is in the way"):
            owned.check(tmp_path / name)
    make(tmp_path / STAGE)
    assert resume_key_in(tmp_path / STAGE) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("make", [pipe, device, folder])
def test_a_log_that_is_no_file_is_in_the_way(tmp_path, make):
    make(tmp_path / "sts.log")
    with pytest.raises(UserError, match=r"sts.log is in the way"):
        keys = (f"output_dir={tmp_path}",)
        settings, file = load_config(None), str(DEFAULT_CONFIG)
        execute(Step(("train_bi.py",), "a", "sts", settings, file, "", keys))


def test_a_folder_without_a_model_is_not_read_through(tmp_path):
    (tmp_path / "some.json").write_text("{}")
    key = f"model.name={tmp_path}"
    assert inputs(load_config(None, [key]), "scan")["model.name"] is None
    (tmp_path / "config.json").write_text("{}")
    assert inputs(load_config(None, [key]), "scan")["model.name"]


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "train.tsv").write_text("a word\n")
    digest = partial(inputs, load_config(None, [f"probing.data={tmp_path}"]), "probing")
    before = digest()
    (tmp_path / "task" / "loop").symlink_to(tmp_path)
    assert digest() == before


def test_a_file_that_grows_as_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.txt"
    path.write_text("12345678")
    assert bounds.read_bytes(path, 8) == b"12345678"
    monkeypatch.setattr(bounds, "regular", lambda path, _: path)  # as files of /proc say 0
    with pytest.raises(OSError, match="is too large"):
        bounds.read_bytes(path, 7)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "csv", "tsv"])
def test_a_file_in_one_line_is_no_row(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    text = "word " * 2_200_000
    whole = {"jsonl": json.dumps({"text": text}), "json": json.dumps([{"text": text}])}
    path.write_text(whole.get(suffix, f"text\n{text}"))
    with pytest.raises(UserError, match=rf"rows\.{suffix}:.*(10,000,000|10000000)"):
        read_texts(str(path))
