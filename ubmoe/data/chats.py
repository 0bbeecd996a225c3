"""Chats as tokens, with the assistant's part known, whatever the chat template.

Each answer is found in the chat up to it. Where the whole chat goes on from there, it is read as
one; a template that shows earlier answers otherwise than the last makes a chat of each answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError, error_reason
from ubmoe.data import plain, templates
from ubmoe.data.answers import HiddenError, Span, located
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.messages import Message, calls, is_trained
from ubmoe.data.padding import IGNORE_INDEX, padded, padded_with_mask
from ubmoe.data.plain import is_plain
from ubmoe.data.rows import Text, held_out, left, read_texts
from ubmoe.data.tokens import check_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A chat of T tokens: ids, whether each belongs to an answer, and its role.

    A role is `prompt` or `answer` (content of the user or system, of the assistant), `punctuation`
    (of any content, without a letter or digit), or `template`.
    """

    where: str
    ids: list[int]
    answer: list[bool]
    roles: list[str]
    cut: bool = False  # whether it was longer


@dataclass(frozen=True)
class Chats:
    """Chats, and how many were cut, or dropped because no answer was left.

    Of a row that was split into its turns they follow one another.
    """

    chats: list[Chat]
    truncated: int
    dropped: int

    @property
    def by_row(self) -> list[list[Chat]]:
        return [list(same) for _, same in groupby(self.chats, key=lambda chat: chat.where)]

    def held_out(self, count: int, key: str) -> tuple[list[Chat], list[Chat]]:
        """The chats to train on, and those of `count` other rows, as `rows.held_out`."""
        train, kept = held_out(self.by_row, count, key)
        return [item for row in train for item in row], [item for row in kept for item in row]


def read_chats(
    dataset: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, most: int | None = None
) -> Chats:
    """Chats of a data set, cut at `max_tokens`.

    Without a chat template they have the plain form. Raises UserError, naming the row, for one that
    is no chat or has no assistant turn, and for a template or a tokenizer in which answers cannot
    be found.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer gives no offsets; expected fast")
    texts = read_texts(dataset, most)
    by_row = left(dataset, list(usable(lambda text: _chats(tokenizer, text), texts)), len(texts))
    whole = [chat for chats in by_row for chat in chats]
    if split := sum(len(chats) > 1 for chats in by_row):
        log.info(
            "%s: %d chats read answer by answer, as the chat template shows earlier ones otherwise",
            *(dataset, split),
        )
    cut = [
        Chat(
            *(c.where, c.ids[:max_tokens], c.answer[:max_tokens], c.roles[:max_tokens]),
            cut=len(c.ids) > max_tokens,
        )
        for c in whole
    ]
    kept = [chat for chat in cut if any(chat.answer[1:])]
    if not kept:
        raise UserError(f"{dataset}: no answer is left within {max_tokens} tokens of any chat")
    truncated = sum(chat.cut for chat in cut)
    return Chats(kept, truncated, len(cut) - len(kept))


def turns(text: Text) -> tuple[list[Message], list[int]]:
    """The messages of a chat, and which turns to train on: answers to another turn, one at least.

    What a chat opens with answers nothing: it is read, and never trained on. Raises RowError.
    """
    if isinstance(text.content, str):
        raise RowError(text.where, "a text, no chat; expected messages")
    messages = text.content
    trained = [is_trained(text.where, turn, message) for turn, message in enumerate(messages, 1)]
    answer_turns = [turn for turn in range(1, len(messages)) if trained[turn]]
    if not answer_turns:
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        which = " of weight 1" if any(answers) else " but the first" if answers else ""
        raise RowError(text.where, f"no assistant turn{which}; expected one at least")
    return messages, answer_turns


def _chats(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[Chat]:
    """The chat; or one of each answer and what is before it, where later turns change that."""
    messages, answering = turns(text)
    rendered = render(tokenizer, text)
    given = partial(_rendered, tokenizer, text)
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    spans: dict[int, tuple[str, Span]] = {}
    for turn in answering:
        try:
            spans[turn] = located(
                lambda part, prompt: given(part, add_generation_prompt=prompt),
                *(messages, turn, special),
            )
        except HiddenError as error:
            raise RowError(
                text.where,
                f"the chat template hides where turn {turn + 1}, the assistant's, stands "
                f"({error}); expected one that writes an answer as it is, behind what it answers",
            ) from error
    if all(rendered.startswith(after[:high]) for after, (_, high) in spans.values()):
        return [_chat(tokenizer, text, messages, rendered, [span for _, span in spans.values()])]
    return [
        _chat(tokenizer, text, messages[: turn + 1], after, [span])
        for turn, (after, span) in spans.items()
    ]


def _chat(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    messages: list[Message],
    rendered: str,
    answers: Sequence[Span],
) -> Chat:
    contents = _contents(tokenizer, text, messages, rendered)
    keys = {"return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(rendered, add_special_tokens=is_plain(tokenizer), **keys)
    check_ids(tokenizer, encoded["input_ids"], text.where)
    offsets: list[Span] = encoded["offset_mapping"]
    answer = [any(low <= start < high for low, high in answers) for start, _ in offsets]
    roles = [_role(rendered[start:end], start, contents) for start, end in offsets]
    return Chat(text.where, encoded["input_ids"], answer, roles)


def render(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    template: str | None = None,
    called: str | None = None,
) -> str:
    """A whole chat through the tokenizer's chat template or the one given, or in the plain form.

    called: what the one given is called in errors. Raises UserError where one takes too long or too
    much memory, and RowError where it fails, or leaves a content or a call out.
    """
    messages: Any = text.content
    rendered = _rendered(tokenizer, text, messages, called, chat_template=template)
    hidden = _left_out(tokenizer, text, messages, rendered, template)
    if hidden is not None:
        turn, name = hidden
        raise RowError(
            text.where,
            f"the chat template leaves out the {name} of turn {turn + 1} "
            f"({messages[turn]['role']}); expected a template that writes it",
        )
    return rendered


def _left_out(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    messages: list[Message],
    rendered: str,
    template: str | None,
) -> tuple[int, str] | None:
    """The first turn of which the rendered chat does not say the content or a call, and which."""

    def other(changed: list[Message]) -> str | None:
        try:
            return _rendered(tokenizer, text, changed, chat_template=template)
        except RowError:  # a template that fails without something has looked at it
            return None

    marks = [
        f"Qz{turn}zQ" if message["content"].strip() else "" for turn, message in enumerate(messages)
    ]
    pairs = list(enumerate(zip(messages, marks, strict=True)))
    marked = other([message | {"content": mark} for _, (message, mark) in pairs])
    for turn, (message, mark) in pairs:
        if marked is not None and mark not in marked:
            return turn, "content"
        for name in calls(message):
            less = {key: value for key, value in message.items() if key != name}
            if other([*messages[:turn], less, *messages[turn + 1 :]]) == rendered:
                return turn, name
    return None


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    messages: list[Message],
    called: str | None = None,
    **keys: Any,
) -> str:
    templates.install()
    if is_plain(tokenizer, keys.get("chat_template")):
        keys["chat_template"] = plain.TEMPLATE
    try:
        tools: Any = text.tools
        return str(tokenizer.apply_chat_template(messages, tools, tokenize=False, **keys))
    except (TimeoutError, MemoryError) as error:  # the next row would be no better
        raise UserError(
            f"{called or f'the chat template of {tokenizer.name_or_path}'}: takes more than "
            f"{templates.SECONDS:g} s or {templates.MEMORY >> 20:,} MiB for the chat of "
            f"{text.where}; expected another template"
        ) from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise RowError(text.where, f"the chat template fails ({error_reason(error)})") from error


STAND_IN = "\u2063content\u2063"  # of a message; invisible separators are in no template


def _contents(
    tokenizer: PreTrainedTokenizerBase, text: Text, messages: list[Message], rendered: str
) -> list[tuple[Span, str]]:
    """Where each message's content stands, and whose it is.

    A short content may be part of the template, too (`a` of `assistant`): so the place of another
    text in the same message is looked for first.
    """
    spans, place = [], 0
    for turn, message in enumerate(messages):
        content = message["content"].strip()
        other = [*messages[:turn], message | {"content": STAND_IN}]
        start = _rendered(tokenizer, text, other).find(STAND_IN, place)
        if start < 0 or not rendered.startswith(content, start):
            start = rendered.find(content, place)
        if content and start >= 0:
            place = start + len(content)
            role = "answer" if message["role"] == "assistant" else "prompt"
            spans.append(((start, place), role))
    return spans


def _role(token: str, start: int, contents: list[tuple[Span, str]]) -> str:
    roles = [role for (low, high), role in contents if low <= start < high]
    role = roles[0] if roles and token else "template"  # a tokenizer's own first token is no text
    if role != "template" and token.strip() and not any(char.isalnum() for char in token):
        return "punctuation"
    return role


def collate(chats: list[Chat]) -> dict[str, Tensor]:
    """(B, T) input_ids, attention_mask and labels: the answers' tokens, IGNORE_INDEX elsewhere."""
    labels = [
        [
            token if is_answer else IGNORE_INDEX
            for token, is_answer in zip(chat.ids, chat.answer, strict=True)
        ]
        for chat in chats
    ]
    inputs = padded_with_mask([chat.ids for chat in chats])
    return inputs | {"labels": padded(labels, IGNORE_INDEX)}
