"""Chats as tokens, with the assistant's part known, whatever the chat template.

The chat is rendered up to before and up to after each assistant turn; both must be prefixes of the
whole, and what lies between them is the answer, its end token included.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data import plain
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.messages import Message, calls
from ubmoe.data.padding import IGNORE_INDEX, padded, padded_with_mask
from ubmoe.data.plain import is_plain
from ubmoe.data.rows import Text, left, read_texts
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

    Without a chat template they have the plain form. Raises UserError, naming the row, for one that
    is no chat or has no assistant turn, and for a template or a tokenizer in which answers cannot
    be found.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer gives no offsets; expected fast")
    texts = read_texts(dataset, most)
    whole = left(dataset, list(usable(lambda text: _chat(tokenizer, text), texts)), len(texts))
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


def turns(text: Text) -> list[Message]:
    """The messages of a chat to train on: an answer that follows another turn, one at least.

    What a chat opens with answers nothing: it is read, and never trained on. Raises RowError.
    """
    if isinstance(text.content, str):
        raise RowError(text.where, "a text, no chat; expected messages")
    answers = [turn for turn, each in enumerate(text.content) if each["role"] == "assistant"]
    if not any(answers):  # the opening is turn 0
        found = "no assistant turn but the first" if answers else "no assistant turn"
        raise RowError(text.where, f"{found}; expected one at least")
    return text.content


def _chat(tokenizer: PreTrainedTokenizerBase, text: Text) -> Chat:
    messages = turns(text)
    rendered = render(tokenizer, text)
    answers = _answers(tokenizer, text, messages, rendered)
    contents = _contents(tokenizer, text, messages, rendered)
    keys = {"return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(rendered, add_special_tokens=is_plain(tokenizer), **keys)
    check_ids(tokenizer, encoded["input_ids"], text.where)
    offsets: list[Span] = encoded["offset_mapping"]
    answer = [any(low <= start < high for low, high in answers) for start, _ in offsets]
    roles = [_role(rendered[start:end], start, contents) for start, end in offsets]
    return Chat(text.where, encoded["input_ids"], answer, roles)


def render(tokenizer: PreTrainedTokenizerBase, text: Text, template: str | None = None) -> str:
    """A whole chat through the tokenizer's chat template or the one given, or in the plain form.

    Raises RowError where the template fails, or leaves a content or a call out.
    """
    messages: Any = text.content
    rendered = _rendered(tokenizer, text, messages, chat_template=template)
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

    marks = [f"Qz{turn}zQ" if each["content"].strip() else "" for turn, each in enumerate(messages)]
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
    tokenizer: PreTrainedTokenizerBase, text: Text, messages: list[Message], **keys: Any
) -> str:
    if is_plain(tokenizer, keys.get("chat_template")):
        keys["chat_template"] = plain.TEMPLATE
    try:
        tools: Any = text.tools
        return str(tokenizer.apply_chat_template(messages, tools, tokenize=False, **keys))
    except Exception as error:  # a template is a program, and may fail in any way
        said = isinstance(error, TemplateError)  # its own words; others know nothing of chats
        reason = " ".join(str(error).split()) if said else type(error).__name__
        raise RowError(text.where, f"the chat template fails ({reason})") from error


def _answers(
    tokenizer: PreTrainedTokenizerBase, text: Text, messages: list[Message], rendered: str
) -> list[Span]:
    """Where the assistant answers, its end token included and the line break after it not."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn:
            before = _rendered(tokenizer, text, messages[:turn], add_generation_prompt=True)
            after = _rendered(tokenizer, text, messages[: turn + 1])
            if not (after.startswith(before) and rendered.startswith(after)):
                raise RowError(
                    text.where,
                    f"the chat template hides where turn {turn + 1}, the assistant's, stands; "
                    "expected one that renders a chat's beginning as the chat's beginning",
                )
            spans.append((len(before), len(after.rstrip())))
    return spans


STAND_IN = "\u2063content\u2063"  # of a message; invisible separators are in no template


def _contents(
    tokenizer: PreTrainedTokenizerBase, text: Text, messages: list[Message], rendered: str
) -> list[tuple[Span, str]]:
    """Where each message's content stands, and whose it is.

    A short content may be part of the template, too (`a` of `assistant`): so the place of another
    text in the same message is looked for first.
    """
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
    found = [role for (low, high), role in contents if low <= start < high]
    role = found[0] if found and token else "template"  # a tokenizer's own first token is no text
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
