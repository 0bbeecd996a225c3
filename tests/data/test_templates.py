"""Chat templates know one date, wherever they are rendered, and come to an end."""

import json
import threading
import time

import pytest
from transformers import AutoTokenizer

from ubmoe.bounds import limited
from ubmoe.config import UserError, load_config
from ubmoe.data import templates
from ubmoe.data.chats import read_chats
from ubmoe.data.rows import read_texts
from ubmoe.data.templates import dated
from ubmoe.dependence.texts import tokenize

TODAY = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}|{% endif %}"
)
LLAMA3 = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ date_string }}{% for m in messages %}|{{ m.content }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.mark.parametrize("template", [TODAY, LLAMA3])
def test_a_template_has_the_date_of_the_run_and_no_other(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))

    def read():
        [chat] = read_chats(str(path), tokenizer, 100).chats
        assert [chat.ids] == tokenize(tokenizer, read_texts(str(path)))
        assert tokenizer.apply_chat_template(CHAT, tokenize=False) == tokenizer.decode(chat.ids)
        return tokenizer.decode(chat.ids)

    first = read()
    assert first.startswith("26 Jul") and "2024" in first
    with dated("2031-02-03"):
        assert read() == first.replace("26", "03").replace("Jul", "Feb").replace(
            "y 2024" if "July" in first else " 2024", "ruary 2031" if "July" in first else " 2031"
        )
    assert read() == first


@pytest.mark.parametrize(
    "chance",
    [
        "{{ ['Hi', 'Good day'] | random }}",
        "{{ lipsum(n=1) }}",
        "{{ [[1, 2]] | map('random') | list }}",
    ],
)
def test_a_template_that_draws_at_random_is_refused(tokenizer, tmp_path, chance):
    tokenizer.chat_template = chance + TODAY
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(UserError, match="the chat template fails .it draws at random, by "):
        read_chats(str(path), tokenizer, 100)


@pytest.mark.parametrize("said", ["2031-02-03", "'2031-02-03'", '"2031-02-03"'])
def test_the_date_is_a_key(said):
    config = load_config(None, [f"data.template_date={said}"])
    assert config.data.template_date == "2031-02-03"


@pytest.mark.parametrize(
    "said", ["today", "2031-2-3", "2031-13-01", "7", "null", "2031-02-03 10:00"]
)
def test_what_is_no_day_is_refused(said):
    with pytest.raises(UserError, match="data.template_date: got .*expected a day such as"):
        load_config(None, [f"data.template_date={said}"])


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}" + (
    "{% endfor %}" * 3
)
DOUBLING = (
    "{% set ns = namespace(s='aa') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}"
)


@pytest.mark.parametrize(
    "template", [LOOPS, DOUBLING, "{{ 'a' * 10 ** 11 }}", "{{ 9 ** (9 ** 9) }}"]
)
def test_a_template_without_an_end_is_refused_in_time(tokenizer, monkeypatch, tmp_path, template):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "MEMORY", 2**28)
    began = time.monotonic()
    texts = read_texts("tiny", 2)
    path = tmp_path / "some.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match=r"some\.jinja: takes more than 0.5 s .* of tiny:1"):
        tokenize(tokenizer, texts, str(path))
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the chat template of .*: takes more than 0.5 s"):
        tokenize(tokenizer, texts)
    assert time.monotonic() - began < 30


def test_templates_are_rendered_beside_the_main_thread_too(tokenizer):
    actual = []
    thread = threading.Thread(
        target=lambda: actual.append(tokenize(tokenizer, read_texts("tiny", 2)))
    )
    thread.start()
    thread.join()
    assert actual == [tokenize(tokenizer, read_texts("tiny", 2))]


def test_limits_are_taken_back():
    with pytest.raises(TimeoutError), limited(0.1, 2**30):
        while True:
            pass
    with pytest.raises(TimeoutError), limited(0.3, 2**30):
        with limited(9, 2**30):
            pass
        while True:
            pass
    with pytest.raises(MemoryError), limited(5, 2**20):
        bytearray(2**27)
    assert len(bytearray(2**27)) == 2**27
