"""Chats as tokens, with the assistant's part known, whatever the chat template.

The chat is rendered up to before and up to after each assistant turn; both must be prefixes of the
whole, and what lies between them is the answer, its end token included.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data.padding import IGNORE_INDEX, padded, padded_with_mask
from ubmoe.data.rows import Text, read_texts
from ubmoe.data.tokens import check_ids

Span = tuple[int, int]  # of characters


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
    """Chats, and how many were cut, or dropped because no answer was left."""

    chats: list[Chat]
    truncated: int
    dropped: int


def read_chats(
    dataset: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, most: int | None = None
) -> Chats:
    """Chats of a data set, cut at `max_tokens`.

    Raises UserError, naming the row, for one that is no chat or has no assistant turn, and for a
    template or a tokenizer in which answers cannot be found.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; expected a chat model"
        )
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer gives no offsets; expected fast")
    whole = [_chat(tokenizer, text) for text in read_texts(dataset, most)]
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


def _chat(tokenizer: PreTrainedTokenizerBase, text: Text) -> Chat:
    if isinstance(text.content, str):
        raise UserError(f"{text.where}: a text, no chat; expected messages")
    if not any(message["role"] == "assistant" for message in text.content):
        raise UserError(f"{text.where}: no assistant turn; expected one at least")
    rendered = _rendered(tokenizer, text, text.content)
    answers = _answers(tokenizer, text, rendered)
    contents = _contents(tokenizer, text, rendered)
    keys = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(rendered, **keys)
    check_ids(tokenizer, encoded["input_ids"], text.where)
    offsets: list[Span] = encoded["offset_mapping"]
    answer = [any(low <= start < high for low, high in answers) for start, _ in offsets]
    roles = [_role(rendered[start:end], start, contents) for start, end in offsets]
    return Chat(text.where, encoded["input_ids"], answer, roles)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, text: Text, messages: list[dict[str, str]], **keys: Any
) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **keys))
    except Exception as error:  # a template is a program, and may fail in any way
        reason = " ".join(str(error).split())
        raise UserError(f"{text.where}: the chat template fails ({reason})") from error


def _answers(tokenizer: PreTrainedTokenizerBase, text: Text, rendered: str) -> list[Span]:
    """Where the assistant speaks, its end token included and the line break after it not."""
    messages: Any = text.content
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(tokenizer, text, messages[:turn], add_generation_prompt=True)
            after = _rendered(tokenizer, text, messages[: turn + 1])
            if not (after.startswith(before) and rendered.startswith(after)):
                raise UserError(
                    f"{text.where}: the chat template hides where turn {turn + 1}, the assistant's,"
                    " stands; expected one that renders a chat's beginning as the chat's beginning"
                )
            spans.append((len(before), len(after.rstrip())))
    return spans


STAND_IN = "\u2063content\u2063"  # of a message; invisible separators are in no template


def _contents(
    tokenizer: PreTrainedTokenizerBase, text: Text, rendered: str
) -> list[tuple[Span, str]]:
    """Where each message's content stands, and whose it is.

    A short content may be part of the template, too (`a` of `assistant`): so the place of another
    text in the same message is looked for first.
    """
    messages: Any = text.content
    found, place = [], 0
    for turn, message in enumerate(messages):
        content = message["content"].strip()
        other = [*messages[:turn], message | {"content": STAND_IN}]
        start = _rendered(tokenizer, text, other).find(STAND_IN, place)
        if start < 0 or not rendered.startswith(content, start):
            start = rendered.find(content, place)
        if content and start >= 0:
            place = start + len(content)
            role = "answer" if message["role"] == "assistant" else "prompt"
            found.append(((start, place), role))
    return found


def _role(token: str, start: int, contents: list[tuple[Span, str]]) -> str:
    role = next((role for (low, high), role in contents if low <= start < high), "template")
    if role != "template" and token.strip() and not any(char.isalnum() for char in token):
        return "punctuation"
    return role


def collate(chats: list[Chat]) -> dict[str, Tensor]:
    """(B, T) input_ids, attention_mask and labels: the answers' tokens, IGNORE_INDEX elsewhere."""
    labels = [
        [token if own else IGNORE_INDEX for token, own in zip(chat.ids, chat.answer, strict=True)]
        for chat in chats
    ]
    inputs = padded_with_mask([chat.ids for chat in chats])
    return inputs | {"labels": padded(labels, IGNORE_INDEX)}
