"""Where an answer stands in a rendered chat, whatever the chat template.

Where the template has a generation prompt, an answer is what follows it. Else two stand-ins in the
answer's place show the turn's header, which the two renders share, and what follows an answer. A
template that always writes a prompt writes it there too, behind the end token.
"""

import re
from collections.abc import Callable, Collection
from os.path import commonprefix

from ubmoe.data.bad_rows import RowError
from ubmoe.data.messages import CALLS, THOUGHTS, Message

Span = tuple[int, int]  # of characters
Render = Callable[[list[Message], bool], str]  # of messages, with a generation prompt or without
STAND_INS = ("Qz1{}Q", "Wx2{}W")


class HiddenError(Exception):
    """A template does not show where an answer stands, and why."""


def located(
    render: Render, messages: list[Message], turn: int, special: Collection[str]
) -> tuple[str, Span]:
    """The chat up to an answer, rendered, and where in it the answer stands, its end included.

    The line break after the end is not. special: the tokenizer's special tokens. Raises HiddenError
    where that is not known.
    """
    before, after = messages[:turn], render(messages[: turn + 1], False)
    prompt, bare = render(before, True), render(before, False)
    if prompt != bare and after.startswith(prompt):
        start, behind = len(prompt), ""
    else:
        head, tail = _around(render, messages, turn)
        if not head.startswith(bare.rstrip()) or not after.startswith(head.rstrip()):
            raise HiddenError("what is before it is rendered otherwise without it")
        start = len(head.rstrip(" "))  # a space before it is in its first token
        start = max(start, len(prompt) if head.startswith(prompt) else 0)
        behind = _prompt_behind(render, before, head, tail, special)
    if not after.endswith(behind):
        raise HiddenError("what follows it depends on it")
    span = start, len(after.removesuffix(behind).rstrip())
    content = "".join(messages[turn]["content"].split())
    if content not in "".join(after[slice(*span)].split()):
        raise HiddenError("its content is changed")
    return after, span


def _stand_ins(messages: list[Message]) -> tuple[str, str]:
    """Two texts that no message holds."""
    said, fill = "\n".join(item["content"] for item in messages), "z"
    while any(item.format(fill) in said for item in STAND_INS):
        fill += "z"
    one, other = (item.format(fill) for item in STAND_INS)
    return one, other


def _around(render: Render, messages: list[Message], turn: int) -> tuple[str, str]:
    """The texts before and behind an answer."""
    fields = {name: value for name, value in messages[turn].items() if name not in CALLS + THOUGHTS}
    texts = _stand_ins(messages[:turn])
    both = [render([*messages[:turn], fields | {"content": text}], False) for text in texts]
    head = commonprefix(both)
    ends = [rendered.removeprefix(head + text) for rendered, text in zip(both, texts, strict=True)]
    if ends[0] != ends[1]:  # not there, or more than once
        raise HiddenError("an answer does not stand in one place")
    return head, ends[0]


def _prompt_behind(
    render: Render, before: list[Message], head: str, tail: str, special: Collection[str]
) -> str:
    """The part of `tail`, behind an answer, that prompts a next one."""
    one, other = _stand_ins(before)
    answered = [*before, {"role": "assistant", "content": one}]
    try:
        asked = render([*answered, {"role": "user", "content": other}], False)
    except RowError:  # whatever may follow, no user does
        return ""
    between = asked.partition(one)[2].partition(other)[0]
    shared = commonprefix([tail, between])
    rest = tail[len(shared) :]
    if not rest.strip() or not head.rstrip().endswith(rest.rstrip()):  # it ends a turn, or a chat
        return ""
    opening = render([{"role": "user", "content": other}], False).partition(other)[0]
    return tail[_end(shared, between, opening, special) :]


def _end(shared: str, between: str, opening: str, special: Collection[str]) -> int:
    """Where a turn's end is over, in what an end and a next turn's header begin with.

    between: the end and the user's header. opening: that header at the beginning of a chat.
    """
    if not between.endswith(opening):  # a chat may begin with a token of its own
        opening = next((opening.removeprefix(e) for e in special if opening.startswith(e)), opening)
    if opening and between.endswith(opening):
        return len(between) - len(opening)
    if ends := [shared.find(token) + len(token) for token in special if token in shared]:
        return min(ends)
    if space := re.match(r"\S*(?=\s)", shared):
        return space.end()
    raise HiddenError("where its end is over")
