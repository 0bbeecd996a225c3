"""The plain form of chats, for a tokenizer without a chat template, as those of base models.

Bitune's question form, from its first turn to its last; an answer ends with the end token:

    You are brief.

    Question: Where does Anna live?

    Answer: In Rome.</s>

It is a text: whatever the tokenizer puts before and after every text belongs to it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
NAME = "question"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson + '\n\n' }}{% endif %}"
    "{% for message in messages %}{{ '' if loop.first else '\n\n' }}"
    "{% if message.role == 'user' %}Question: {% elif message.role == 'assistant' %}Answer: "
    "{% elif message.role != 'system' %}{{ message.role | capitalize }}: {% endif %}"
    "{{ message.content | trim }}{{ message.tool_calls | tojson if message.tool_calls else '' }}"
    "{{ eos_token if message.role == 'assistant' else '' }}{% endfor %}"
    "{{ '\n\nAnswer:' if add_generation_prompt else '' }}"
)
_noted: ContextVar[dict[str, str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[dict[str, str]]:
    """Inside, the plain form is said once if it is used; yields what the record says of it."""
    noted: dict[str, str] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def is_plain(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> bool:
    """Whether chats have the plain form: there is no template of the tokenizer's, and none named.

    Said and noted where it is the first such chat of a run.
    """
    plain = template is None and tokenizer.chat_template is None
    noted = _noted.get()
    if plain and noted is not None and not noted:
        noted["chat_form"] = NAME
        log.info(
            "%s: its tokenizer has no chat template; chats are read as texts, "
            "'Question: ... Answer: ...', with blank lines between",
            tokenizer.name_or_path,
        )
    return plain
