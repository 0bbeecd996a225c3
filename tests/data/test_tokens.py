"""Ids that the model has, a tokenizer's own first and last tokens, answers as parts of texts."""

import json

import pytest
from builders import metaspace_tokenizer, random_model, tokenizer_of
from transformers import AutoTokenizer

from ubmoe.bitune.examples import read_examples
from ubmoe.config import ModelSection, StageSection, UserError
from ubmoe.data import tokens
from ubmoe.data.chats import read_chats
from ubmoe.data.rows import read_texts
from ubmoe.dependence.texts import tokenize
from ubmoe.encoder.contrastive import read_dataset
from ubmoe.encoder.mntp import chunked
from ubmoe.probing.word_vectors import Sentences, Word


@pytest.fixture
def grown(tiny_path, tmp_path):
    """The embedded model's tokenizer with a token more than its model has embeddings, to pad."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    random_model("qwen2", vocab_size=rows).save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == rows
    return tokenizer_of(ModelSection(name=str(tmp_path / "model")))


def test_padding_is_a_token_that_the_model_has(grown):
    assert grown.pad_token_id == grown.eos_token_id < grown.embedding_rows


def saved(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_text_that_holds_a_token_without_an_embedding_is_named_by_row(grown, tmp_path):
    expected = r"jsonl:2: holds the token '\[PAD\]' \(id \d+\), and the model has \d+ embeddings"
    texts = saved(tmp_path, {"text": "The cat slept."}, {"text": "The [PAD] slept."})
    stages = [StageSection(objective=name, dataset=texts) for name in ("mntp", "simcse")]
    calls = [
        lambda: chunked(stages[0], grown),
        lambda: read_dataset(stages[1], grown),
        lambda: tokenize(grown, read_texts(texts)),
    ]
    for call in calls:
        with pytest.raises(UserError, match=expected):
            call()
    asked = {"role": "user", "content": "Who?"}
    said = [{"role": "assistant", "content": answer} for answer in ("Anna.", "[PAD]")]
    chats = saved(tmp_path, *({"messages": [asked, item]} for item in said))
    calls = [
        lambda: read_chats(chats, grown, 99),
        lambda: read_examples(chats, grown, "Q: {prompt} A:", 99),
        lambda: read_examples(chats, grown, None, 99),
        lambda: tokenize(grown, read_texts(chats)),
    ]
    for call in calls:
        with pytest.raises(UserError, match=expected):
            call()
    with pytest.raises(UserError, match=r"'a \[PAD\]': holds the token"):
        Sentences([Word("a [PAD]", 0, 1)], grown, 99)


@pytest.mark.parametrize("first", [(), ("<s>",)])
@pytest.mark.parametrize("last", [(), ("</s>",), ("</s>", "<s>")])
def test_own_ends_are_those_of_the_post_processor(first, last):
    tokenizer = metaspace_tokenizer(first, last)
    actual = [tokenizer.convert_ids_to_tokens(item) for item in tokens.own_ends(tokenizer)]
    assert actual == [list(first), list(last)]


@pytest.mark.parametrize("last", [(), ("</s>",)])
def test_an_answer_is_tokenised_as_the_end_of_the_whole_text(last):
    tokenizer = metaspace_tokenizer(last=last)
    prompt, answer = tokens.split_ids(tokenizer, "Q: a?\nA: ", " b c.")
    text = ["<s>", *"▁Q:▁a?\nA:▁▁b▁c."]
    assert tokenizer.convert_ids_to_tokens([*prompt, *answer]) == text
    assert tokenizer.convert_ids_to_tokens(answer) == [*"▁▁b▁c."]


def test_an_answer_begins_with_one_mark_of_a_word(tmp_path):
    tokenizer = metaspace_tokenizer()
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    path = saved(tmp_path, {"messages": [*turns, *turns]})
    [examples] = read_examples(path, tokenizer, "Q: {prompt}\nA:", 99).chats
    for example, text in zip(examples, ["Q: a?\nA: b", "Q: a?\nA: b\n\nQ: a?\nA: b"], strict=True):
        assert example.prompt + example.answer[:-1] == tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(example.answer) == ["▁", "b", "</s>"]
