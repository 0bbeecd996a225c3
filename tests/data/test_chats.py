"""The assistant's tokens are found whatever the template, and a chat without them is refused."""

import json

import pytest
from builders import metaspace_tokenizer
from transformers import AutoTokenizer

from ubmoe.bitune.examples import read_examples
from ubmoe.config import QUESTION, UserError
from ubmoe.data.chats import Chat, collate, read_chats
from ubmoe.data.padding import IGNORE_INDEX
from ubmoe.data.plain import noting
from ubmoe.data.rows import read_texts
from ubmoe.dependence.texts import tokenize

LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOOLS = (  # as Qwen2.5 writes tools and calls
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name }}'
    "{{ '\", \"arguments\": ' }}{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
BACKWARDS = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content }} {{ m.content }}\n{% endfor %}"
TURNS = [
    {"role": "user", "content": "Where does he live?"},
    {"role": "assistant", "content": "In the garden, 你好!"},
    {"role": "user", "content": "Where does he live?"},
    {"role": "assistant", "content": "Where does he live?"},
]
THOUGHT = [TURNS[0], {"role": "assistant", "content": "<think>so</think>In the garden"}]


@pytest.fixture
def tokenizer(tiny_path):
    return AutoTokenizer.from_pretrained(tiny_path)


def written(tmp_path, *chats):
    tmp_path.mkdir(exist_ok=True)
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


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI = (  # the prompt is the end of a user's turn
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
    "<|assistant|>\n{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
CHAT_END = (  # the chat has an end, and a turn none
    "{% for m in messages %}{{ '[U] ' if m.role == 'user' else '[A] ' }}{{ m.content }}"
    "{{ '</s>' if loop.last and m.role != 'user' else ' ' }}{% endfor %}"
)
THINKING = (  # what is thought is written where a prompt would be, and not in earlier answers
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_THOUGHTS = (  # whose prompt is not how an answer begins
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML + "<|im_start|>assistant\n", "<|im_end|>"),
        (SYSTEM + CHATML + "<|im_start|>assistant\n", "<|im_end|>"),
        (PLAIN, "<|end|>"),
        (PLAIN + "<|assistant|>\n", "<|end|>"),
        ("<s>" + PLAIN + "<|assistant|>\n", "<|end|>"),
        (ALPACA, ""),
        (ALPACA + "### Response:\n", ""),
        ("Below are instructions.\n\n" + ALPACA + "### Response:\n", ""),
        (VICUNA, "</s>"),
        (PHI, "<|end|>"),
        (CHAT_END, "</s>"),
        (NO_THOUGHTS, "<end>"),
    ],
)
def test_no_header_is_an_answer_whatever_the_template_writes(tokenizer, tmp_path, template, end):
    tokenizer.chat_template = template
    chats = read_chats(written(tmp_path, TURNS), tokenizer, 500).chats
    answers = [
        piece.strip()
        for chat in chats
        for piece in pieces(tokenizer, chat, chat.answer.__getitem__)
    ]
    assert answers == [TURNS[1]["content"] + end, TURNS[3]["content"] + end]


@pytest.mark.parametrize("said", ["Qz1zQ", "Wx2xW", "Qz1zQ Qz1zzQ Wx2zzzW", "assistant"])
@pytest.mark.parametrize("template", [CHATML + "<|im_start|>assistant\n", VICUNA, CHATML])
def test_a_chat_may_hold_the_texts_that_stand_in_for_answers(tokenizer, tmp_path, template, said):
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": f"{said}!"}] * 2
    [chat] = read_chats(written(tmp_path, turns), tokenizer, 500).chats
    answers = pieces(tokenizer, chat, chat.answer.__getitem__)
    end = "</s>" if template == VICUNA else "<|im_end|>"
    assert [item.strip() for item in answers] == [f"{said}!{end}"] * 2


def test_a_chat_whose_earlier_answers_change_is_read_answer_by_answer(tokenizer, tmp_path):
    tokenizer.chat_template = THINKING
    thought = [{**item, "reasoning_content": f"hm {n}"} for n, item in enumerate(TURNS)]
    actual = read_chats(written(tmp_path, TURNS[:2], thought, TURNS[:2]), tokenizer, 500)
    assert [len(row) for row in actual.by_row] == [1, 2, 1]
    for chat, turn in zip(actual.by_row[1], (1, 3), strict=True):
        history = tokenizer.apply_chat_template(thought[: turn + 1], tokenize=False)
        assert tokenizer.decode(chat.ids) == history
        [answer] = pieces(tokenizer, chat, chat.answer.__getitem__)
        said = TURNS[turn]["content"]
        assert answer == f"<think>\nhm {turn}\n</think>\n\n{said}<|im_end|>"
    train, kept = actual.held_out(1, "held_out")  # all of a row, or nothing
    assert {item.where for item in train}.isdisjoint(item.where for item in kept)
    examples = read_examples(written(tmp_path, thought), tokenizer, None, 500).chats
    assert [len(example) for example in examples] == [2]
    assert examples[0][1].prompt + examples[0][1].answer == actual.by_row[1][1].ids[:-1]


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"weight": 0}, [False, True]),
        ({"weight": 0.0}, [False, True]),
        ({"train": False}, [False, True]),
        ({"training": False, "weight": 1}, [False, True]),
        ({"weight": 1}, [True, True]),
        ({"train": True}, [True, True]),
        ({"weight": None}, [True, True]),
    ],
)
@pytest.mark.parametrize("template", [None, QUESTION])
def test_an_answer_of_weight_zero_is_read_and_not_learned(
    tokenizer, tmp_path, fields, trained, template
):
    turns = [TURNS[0], TURNS[1] | fields, *TURNS[2:]]
    path = written(tmp_path, turns)
    whole, plain = (
        read_examples(item, tokenizer, template, 500).chats
        for item in (written(tmp_path / "plain", TURNS), path)
    )
    expected = [item for item, own in zip(whole[0], trained, strict=True) if own]
    assert plain == [expected]
    [chat] = read_chats(path, tokenizer, 500).chats
    contents = [TURNS[turn]["content"] for turn, own in zip((1, 3), trained, strict=True) if own]
    answers = pieces(tokenizer, chat, chat.answer.__getitem__)
    assert answers == [f"{content}<|im_end|>" for content in contents]


@pytest.mark.parametrize(
    ("turn", "fields", "expected"),
    [
        (1, {"weight": 0.5}, "turn 2: weight is 0.5; expected 0 or 1"),
        (1, {"train": "no"}, "turn 2: train is 'no'; expected 0 or 1"),
        (1, {"train_detail": [{"begin_offset": 0}]}, "turn 2: train_detail is of parts"),
        (0, {"train": True}, "turn 1: train is true of user; only answers are learned"),
        (3, {"loss_scale": 2}, "turn 4: loss_scale is 2"),
    ],
)
def test_what_is_neither_learned_nor_not_is_refused(tokenizer, tmp_path, turn, fields, expected):
    turns = [item | (fields if n == turn else {}) for n, item in enumerate(TURNS)]
    with pytest.raises(UserError) as caught:
        read_chats(written(tmp_path, turns), tokenizer, 500)
    assert expected in str(caught.value)


def test_a_chat_none_of_whose_answers_count_is_refused(tokenizer, tmp_path):
    turns = [turn | {"weight": 0} for turn in TURNS]
    with pytest.raises(UserError, match=":1: no assistant turn of weight 1; expected one"):
        read_chats(written(tmp_path, turns), tokenizer, 500)


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
    actual = {name: value.tolist() for name, value in collate(chats).items()}
    assert actual["labels"] == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 9, IGNORE_INDEX]]


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"text": "hello"}, None, ":1: a text, no chat; expected messages"),
        ({"messages": TURNS[:1]}, None, ":1: no assistant turn; expected one at least"),
        ({"messages": [TURNS[1]]}, None, ":1: no assistant turn but the first; expected one"),
        ({"messages": TURNS}, LAST_ONLY, ":1: the chat template leaves out the content of turn 1"),
        ({"messages": TURNS}, BACKWARDS, "hides where turn 2, the assistant's, stands"),
        ({"messages": TURNS}, TWICE, "turn 2, the assistant's, stands (an answer does not stand"),
        ({"messages": THOUGHT}, NO_THOUGHTS, "stands (its content is changed)"),
        (
            {"messages": TURNS},
            "{{ messages[0].content + 1 }}",
            "the chat template fails (something in it is missing or of an unexpected kind)",
        ),
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


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = [
    {"role": "user", "content": "How warm is it in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is 4 degrees."},
]
TOOL = {"type": "function", "function": {"name": "weather"}}


def read(tmp_path, tokenizer, row):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row))
    [measured] = tokenize(tokenizer, read_texts(str(path)))
    [chat] = read_chats(str(path), tokenizer, 500).chats
    assert measured == chat.ids  # measured and trained alike
    return chat


@pytest.mark.parametrize("tools", [None, [TOOL], json.dumps([TOOL])])
def test_calls_and_tools_reach_the_template_and_a_call_is_an_answer(tokenizer, tmp_path, tools):
    tokenizer.chat_template = QWEN_TOOLS
    chat = read(tmp_path, tokenizer, {"messages": CALLING, "tools": tools})
    said = [CALLING[0], {**CALLING[1], "content": ""}, *CALLING[2:]]
    offered = None if tools is None else [TOOL]
    expected = tokenizer.apply_chat_template(said, offered, tokenize=False)
    assert tokenizer.decode(chat.ids) == expected and '"city": "Oslo"' in expected
    answers = pieces(tokenizer, chat, lambda number: chat.answer[number])
    assert [answer.strip() for answer in answers] == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "It is 4 degrees.<|im_end|>",
    ]


def test_a_template_that_leaves_calls_out_is_refused_wherever_chats_are_read(tokenizer, tmp_path):
    path = written(tmp_path, CALLING)
    expected = ":1: the chat template leaves out the tool_calls of turn 2"
    with pytest.raises(UserError, match=expected):
        read_chats(path, tokenizer, 500)
    with pytest.raises(UserError, match=expected):
        tokenize(tokenizer, read_texts(path))


SPOKEN = [("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"), ("gpt", "Good bye.")]


def test_sharegpt_and_text_parts_are_the_chats_that_they_say(tokenizer, tmp_path):
    roles = {"human": "user", "gpt": "assistant"}
    plain = [{"role": roles[who], "content": said} for who, said in SPOKEN]
    parts = [item | {"content": [{"type": "text", "text": item["content"]}]} for item in plain]
    share = [{"from": who, "value": said} for who, said in SPOKEN]
    expected = read(tmp_path, tokenizer, {"messages": plain})
    for row in (
        {"messages": parts},
        {"conversations": share, "id": "7"},
        {"conversations": json.dumps(share)},
        {"conversations": plain, "messages": None},
    ):
        actual = read(tmp_path, tokenizer, row)
        assert (actual.ids, actual.answer) == (expected.ids, expected.answer)
    with_system = [{"role": "system", "content": "Be kind."}, *plain]
    actual = read(tmp_path, tokenizer, {"conversations": share, "system": "Be kind."})
    assert actual.ids == read(tmp_path, tokenizer, {"messages": with_system}).ids


def test_a_call_of_sharegpt_is_a_call(tokenizer, tmp_path):
    tokenizer.chat_template = QWEN_TOOLS
    share = [
        {"from": "human", "value": CALLING[0]["content"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4 degrees."},
    ]
    actual = read(tmp_path, tokenizer, {"conversations": share})
    assert actual.ids == read(tmp_path, tokenizer, {"messages": CALLING}).ids


def test_what_a_chat_opens_with_is_read_and_not_trained_on(tokenizer, tmp_path):
    chat = read(tmp_path, tokenizer, {"messages": TURNS[1:]})
    answers = pieces(tokenizer, chat, lambda number: chat.answer[number])
    assert answers == ["Where does he live?<|im_end|>"]
    assert TURNS[1]["content"] in tokenizer.decode(chat.ids)


SHORT = [{"role": "user", "content": "a b?"}, {"role": "assistant", "content": "c d"}]


def test_without_a_template_chats_are_texts_of_questions_and_answers(tokenizer, tmp_path):
    tokenizer.chat_template = None
    system = {"role": "system", "content": "Be brief."}
    chat = read(tmp_path, tokenizer, {"messages": [system, *TURNS]})
    assert tokenizer.decode(chat.ids) == (
        "Be brief.\n\nQuestion: Where does he live?\n\nAnswer: In the garden, 你好!<|im_end|>\n\n"
        "Question: Where does he live?\n\nAnswer: Where does he live?<|im_end|>"
    )
    answers = pieces(tokenizer, chat, lambda number: chat.answer[number])
    assert answers == [" In the garden, 你好!<|im_end|>", " Where does he live?<|im_end|>"]


@pytest.mark.parametrize("once", [False, True])
def test_the_plain_form_has_the_tokens_of_bitunes_examples(once, tmp_path):
    """Which are split from the whole text in another way."""
    tokenizer = metaspace_tokenizer(once=once)
    path = written(tmp_path, SHORT)
    [example] = read_examples(path, tokenizer, QUESTION, 100).chats[0]
    [chat] = read_chats(path, tokenizer, 100).chats
    assert chat.ids == example.prompt + example.answer
    assert chat.answer == [False] * len(example.prompt) + [True] * len(example.answer)
    assert chat.ids.count(tokenizer.bos_token_id) == 1 and chat.roles[0] == "template"


def test_the_plain_form_is_said_once_and_noted(tokenizer, tmp_path, caplog):
    tokenizer.chat_template = None
    with caplog.at_level("INFO"), noting() as noted:
        assert noted == {}
        read_chats(written(tmp_path, SHORT, SHORT), tokenizer, 100)
    assert noted == {"chat_form": "question"}
    assert len([message for message in caplog.messages if "no chat template" in message]) == 1


def test_tools_and_calls_are_in_the_plain_form(tokenizer, tmp_path):
    tokenizer.chat_template = None
    chat = read(tmp_path, tokenizer, {"messages": CALLING, "tools": [{"name": "weather"}]})
    text = tokenizer.decode(chat.ids)
    assert (
        text.startswith('[{"name": "weather"}]\n\nQuestion: ') and CALL["function"]["name"] in text
    )
