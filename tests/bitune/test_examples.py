"""Every assistant turn is an example, its prompt all that came before it."""

import json

import pytest
from transformers import AutoTokenizer

from ubmoe.bitune.examples import read_examples
from ubmoe.config import QUESTION, UserError
from ubmoe.data.chats import read_chats
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.data.prompts import Example, batch

TALK = [
    {"role": "user", "content": "Where does Anna live?"},
    {"role": "assistant", "content": "Anna lives in the house."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "In the garden."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def saved(tmp_path, *chats):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


def texts(tokenizer, examples):
    return [(tokenizer.decode(e.prompt), tokenizer.decode(e.answer)) for e in examples]


def test_a_template_makes_an_example_of_every_turn_with_what_came_before(tokenizer, tmp_path):
    actual = read_examples(saved(tmp_path, TALK), tokenizer, QUESTION, 512)
    end = tokenizer.eos_token
    first = "Question: Where does Anna live?\n\nAnswer:"
    [examples] = actual.chats
    assert texts(tokenizer, examples) == [
        (first, f" Anna lives in the house.{end}"),
        (
            f"{first} Anna lives in the house.\n\nQuestion: And the dog?\n\nAnswer:",
            f" In the garden.{end}",
        ),
    ]


def test_the_chat_template_gives_prompt_and_answer_that_are_the_chat(tokenizer, tmp_path):
    path = saved(tmp_path, TALK)
    [chat] = read_chats(path, tokenizer, 512).chats
    [examples] = read_examples(path, tokenizer, None, 512).chats
    for example in examples:
        assert example.prompt + example.answer == chat.ids[: len(example)]
    answers = [token for example in examples for token in example.answer]
    assert answers == [t for t, own in zip(chat.ids, chat.answer, strict=True) if own]
    assert texts(tokenizer, examples)[1][1] == "In the garden.<|im_end|>"


def test_examples_that_are_too_long_are_dropped_and_counted(tokenizer, tmp_path):
    path = saved(tmp_path, TALK[:2], TALK)
    whole = read_examples(path, tokenizer, None, 512)
    shortest, longest = (f(len(e) for chat in whole.chats for e in chat) for f in (min, max))
    actual = read_examples(path, tokenizer, None, longest - 1)
    assert ([len(chat) for chat in actual.chats], actual.dropped, whole.dropped) == ([1, 1], 1, 0)
    with pytest.raises(UserError, match=r"none of 3 examples has at most bitune.max_tokens="):
        read_examples(path, tokenizer, None, shortest - 1)


def test_a_batch_moves_the_last_prompt_token_into_the_answer():
    actual = batch([Example([1, 2, 3], [4]), Example([5], [6, 7])])
    assert {name: value.tolist() for name, value in actual.items()} == {
        "prompt_ids": [[1, 2], [0, 0]],
        "prompt_mask": [[1, 1], [0, 0]],
        "answer_ids": [[3, 4, 0], [5, 6, 7]],
        "answer_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[IGNORE_INDEX, 4, IGNORE_INDEX], [IGNORE_INDEX, 6, 7]],
    }


@pytest.mark.parametrize("template", [None, QUESTION])
@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ([TALK[0], {"role": "assistant", "content": " "}], "jsonl:2: an empty answer; remove"),
        (TALK[:1], "jsonl:2: no assistant turn"),
    ],
)
def test_what_has_no_answer_is_refused_by_row(tokenizer, tmp_path, chat, template, expected):
    with pytest.raises(UserError, match=expected):
        read_examples(saved(tmp_path, TALK, chat), tokenizer, template, 512)


def test_an_answer_of_one_letter_is_no_empty_one(tokenizer, tmp_path):
    chat = [TALK[0], {"role": "assistant", "content": "a"}]  # as in <|im_start|>assistant
    [[example]] = read_examples(saved(tmp_path, chat), tokenizer, None, 512).chats
    assert tokenizer.decode(example.answer) == "a<|im_end|>"


def test_an_answer_to_nothing_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="jsonl:1: turn 3 answers nothing"):
        read_examples(saved(tmp_path, [*TALK[:2], TALK[1]]), tokenizer, QUESTION, 512)


@pytest.mark.parametrize("template", [None, QUESTION])
def test_what_a_chat_opens_with_is_read_and_not_trained_on(tokenizer, tmp_path, template):
    [[example]] = read_examples(saved(tmp_path, TALK[1:]), tokenizer, template, 512).chats
    assert TALK[1]["content"] in tokenizer.decode(example.prompt)
    assert tokenizer.decode(example.answer).strip() == f"In the garden.{tokenizer.eos_token}"


def test_a_call_has_no_place_in_the_question_form(tokenizer, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(UserError, match="jsonl:1: calls tools, for which bitune.template has no"):
        read_examples(saved(tmp_path, [TALK[0], call]), tokenizer, QUESTION, 512)
