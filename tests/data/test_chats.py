"""The assistant's tokens are found whatever the template, and a chat without them is refused."""

import json

import pytest
from transformers import AutoTokenizer

from ubmoe.config import UserError
from ubmoe.data.chats import Chat, collate, read_chats
from ubmoe.data.padding import IGNORE_INDEX

LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
TURNS = [
    {"role": "user", "content": "Where does he live?"},
    {"role": "assistant", "content": "In the garden, 你好!"},
    {"role": "user", "content": "Where does he live?"},
    {"role": "assistant", "content": "Where does he live?"},
]


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def written(tmp_path, *chats):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return str(path)


def pieces(tokenizer, chat, keep):
    """The decoded runs of tokens that `keep` keeps."""
    runs, open_run = [], False
    for number, token in enumerate(chat.ids):
        if keep(number):
            runs = [*runs[:-1], [*runs[-1], token]] if open_run else [*runs, [token]]
        open_run = keep(number)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"), [(None, "<|im_end|>"), (QWEN, "<|im_end|>"), (LLAMA, "</s>")]
)
def test_answers_are_found_with_their_end_token(tokenizer, tmp_path, template, end):
    if template:
        tokenizer.chat_template = template
    [chat] = read_chats(written(tmp_path, TURNS), tokenizer, 500).chats
    answers = pieces(tokenizer, chat, lambda number: chat.answer[number])
    expected = [f"In the garden, 你好!{end}", f"Where does he live?{end}"]
    assert [answer.strip() for answer in answers] == expected
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(chat.ids) == whole


def test_roles_are_those_of_the_contents(tokenizer, tmp_path):
    [chat] = read_chats(written(tmp_path, TURNS), tokenizer, 500).chats
    prompts = pieces(tokenizer, chat, lambda number: chat.roles[number] == "prompt")
    answers = pieces(tokenizer, chat, lambda number: chat.roles[number] == "answer")
    assert prompts == ["Where does he live"] * 2  # the question marks are punctuation
    assert answers[0] == "In the garden" and answers[-1] == "Where does he live"
    marks = pieces(tokenizer, chat, lambda number: chat.roles[number] == "punctuation")
    assert set("".join(marks)) == set("?,!")
    rest = pieces(tokenizer, chat, lambda number: chat.roles[number] == "template")
    assert rest[0] == "<|im_start|>user\n" and rest[1] == "<|im_end|>\n<|im_start|>assistant\n"


def test_long_chats_are_cut_and_those_without_an_answer_dropped(tokenizer, tmp_path):
    path = written(tmp_path, TURNS, TURNS[:2], TURNS[2:])
    whole = read_chats(path, tokenizer, 500)
    assert (len(whole.chats), whole.truncated, whole.dropped) == (3, 0, 0)
    first = whole.chats[0].answer.index(True)
    cut = read_chats(path, tokenizer, first + 1)
    assert {len(chat.ids) for chat in cut.chats} == {first + 1}
    assert cut.truncated == 3 and cut.dropped + len(cut.chats) == 3
    assert cut.chats[0].ids == whole.chats[0].ids[: first + 1]
    with pytest.raises(UserError, match="no answer is left within 2 tokens of any chat"):
        read_chats(path, tokenizer, 2)


def test_labels_are_the_answers_tokens():
    chats = [Chat("a", [5, 6, 7], [False, True, True], []), Chat("b", [8, 9], [False, True], [])]
    found = {name: value.tolist() for name, value in collate(chats).items()}
    assert found["labels"] == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 9, IGNORE_INDEX]]


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"text": "hello"}, None, ":1: a text, no chat; expected messages"),
        ({"messages": TURNS[:1]}, None, ":1: no assistant turn; expected one at least"),
        ({"messages": TURNS}, LAST_ONLY, "hides where turn 2, the assistant's, stands"),
        ({"messages": TURNS}, "{{ raise_exception('no') }}", ":1: the chat template fails"),
    ],
)
def test_what_has_no_answers_is_refused_by_row(tokenizer, tmp_path, row, template, expected):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    if template:
        tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path / "bad.jsonl"), tokenizer, 100)
    assert expected in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; expected a chat model"):
        read_chats("tiny", tokenizer, 100)
