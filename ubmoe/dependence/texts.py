"""The texts whose dependence is measured, as tokens."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bounds import read_text
from ubmoe.config import UserError, error_reason
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.chats import render
from ubmoe.data.messages import messages
from ubmoe.data.plain import is_plain
from ubmoe.data.rows import Text, left
from ubmoe.data.tokens import check_ids
from ubmoe.models.source import context_length


def unread(contents: Sequence[str | list[dict[str, Any]]]) -> list[Text]:
    """Texts and chats that are in no file, called by their number. Raises UserError, RowError."""
    if isinstance(contents, str) or not contents:
        raise UserError("texts: expected a list of texts or chats, one at least")
    return [
        Text(
            f"texts: {n}", content if isinstance(content, str) else messages(f"texts: {n}", content)
        )
        for n, content in enumerate(contents, 1)
    ]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[Text], chat_template: str | None = None
) -> list[list[int]]:
    """Token ids of each text; chats go through the tokenizer's own chat template, or the one named,
    and have the plain form where there is none.

    Raises RowError for a template that fails on a chat or leaves out a part of it, and for a text
    without tokens.
    """
    template = _template(chat_template)  # None: the tokenizer's own, which may be a named set
    called = None if template is None else f"dependence.chat_template: {chat_template}"
    ids = list(usable(lambda text: _tokens(tokenizer, text, template, called), texts))
    return left("dependence.dataset", ids, len(texts))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: Text, template: str | None, called: str | None
) -> list[int]:
    if isinstance(text.content, str):
        ids = tokenizer(text.content, truncation=False)["input_ids"]
    else:
        rendered = render(tokenizer, text, template, called)
        adds_special = is_plain(tokenizer, template)
        ids = tokenizer(rendered, add_special_tokens=adds_special, truncation=False)["input_ids"]
    if not ids:
        raise RowError(text.where, "empty text; it has no tokens")
    check_ids(tokenizer, ids, text.where)
    return ids


def _template(named: str | None) -> str | None:
    if named is None or ("{" in named and not os.path.exists(named)):
        return named
    try:
        return read_text(named)
    except (OSError, ValueError) as error:
        raise UserError(
            f"dependence.chat_template: {named} cannot be read ({error_reason(error)}); expected a "
            "Jinja file or string"
        ) from error


def cut(
    model: PreTrainedModel, texts: list[list[int]], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Texts cut at `max_tokens` and at the model's context, and how many were longer."""
    limit = min(max_tokens, context_length(model.config) or max_tokens)
    return [text[:limit] for text in texts], sum(len(text) > limit for text in texts)
