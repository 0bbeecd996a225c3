"""Prompts and answers as tokens: every assistant turn of a chat, with all that came before it."""

import sys
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.chats import Chat, read_chats, turns
from ubmoe.data.messages import calls
from ubmoe.data.prompts import Example
from ubmoe.data.rows import Text, left, read_texts
from ubmoe.data.tokens import check_ids, split_ids


@dataclass(frozen=True)
class Examples:
    """The examples of each chat, and how many were dropped: too long to have an end.

    A chat's turns stay together: the prompt of a later one holds the answers of the earlier ones.
    """

    chats: list[list[Example]]
    dropped: int


def read_examples(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    max_tokens: int,
    most: int | None = None,
) -> Examples:
    """Every assistant turn of a data set of chats.

    template: a user's turn stands in it, at {prompt}, and the answer follows after a space, with
    the end token; None: the tokenizer's chat template. Raises UserError naming the row.
    """
    if template is None:
        rows = read_chats(dataset, tokenizer, sys.maxsize, most).by_row
        by_row = [[example for chat in row for example in _parted(chat)] for row in rows]
    else:
        texts = read_texts(dataset, most)
        read = usable(lambda text: _templated(text, tokenizer, template), texts)
        by_row = left(dataset, list(read), len(texts))
    kept = [[example for example in chat if len(example) <= max_tokens] for chat in by_row]
    total, short = (sum(map(len, chats)) for chats in (by_row, kept))
    if not short:
        raise UserError(
            f"{dataset}: none of {total} examples has at most bitune.max_tokens={max_tokens}"
        )
    return Examples([chat for chat in kept if chat], total - short)


def _parted(chat: Chat) -> list[Example]:
    """An example for each run of answer tokens that has something before it."""
    examples, place = [], 0
    for is_answer, run in groupby(chat.answer):
        end = place + len(list(run))
        if is_answer and place:
            examples.append(Example(chat.ids[:place], chat.ids[place:end]))
        place = end
    return examples


def _templated(text: Text, tokenizer: PreTrainedTokenizerBase, template: str) -> list[Example]:
    messages, answering = turns(text)
    if text.tools or any(map(calls, messages)):
        raise RowError(
            text.where, "calls tools, for which bitune.template has no place; expected null there"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no end token")
    before, asked, examples = "", "", []
    for turn, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            asked = f"{asked}\n{content}".strip()
            continue
        if not turn:
            before = f"{content}\n\n"
            continue
        if not asked:
            raise RowError(
                text.where, f"turn {turn + 1} answers nothing; expected a question before it"
            )
        prompt = before + template.replace("{prompt}", asked)
        ids, answer = split_ids(tokenizer, prompt, f" {content}")
        check_ids(tokenizer, [*ids, *answer, tokenizer.eos_token_id], text.where)
        if turn in answering:
            examples.append(Example(ids, [*answer, tokenizer.eos_token_id]))
        before, asked = f"{prompt} {content}\n\n", ""
    return examples
