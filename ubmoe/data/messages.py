"""The messages of a row: roles and contents as chat templates know them, all else as it is.

Read are `messages` (role, content) and ShareGPT's `conversations` (from, value); a content may be a
list of text parts.
"""

import json
from typing import Any

from ubmoe.config import error_reason, shown
from ubmoe.data.bad_rows import RowError

Message = dict[str, Any]
LONGEST = 10**7  # characters of a row; a longer one is a whole file in a line
SHAREGPT = "conversations"
CHATS = ("messages", SHAREGPT)  # what the column of chats is called
EXPECTED = '{"role": "user", "content": "..."}, or {"from": "human", "value": "..."} as in ShareGPT'
CALL = "function_call"  # a speaker of ShareGPT: an answer that is a call, as JSON
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
CALLS = ("tool_calls", "function_call")  # what may stand in place of an answer's content
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # before it
# By which fine-tuning files say whether a turn is trained on, and what it says of parts of one.
SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale")
DETAILS = ("train_detail", "training_detail", "weights")


def messages(where: str, given: Any, system: Any = None) -> list[Message]:
    """Messages whose role and content are texts, and what else each carries.

    given: a list, or its JSON. system: the text of a system message before them, as ShareGPT's rows
    may have it. Raises RowError, naming the turn, for what is none, and for an answer that is
    empty and calls nothing: of it only an end token would be learned.
    """
    given = from_json(where, given)
    if not isinstance(given, list) or not given:
        raise RowError(where, f"messages must be a list of {EXPECTED}; got {shown(given)}")
    read = [_message(where, turn, message) for turn, message in enumerate(given, 1)]
    if isinstance(system, str) and system.strip() and read[0]["role"] != "system":
        read = [{"role": "system", "content": system}, *read]
    said = [message for message in read if message["content"].strip() or calls(message)]
    if not said:
        raise RowError(where, "empty text in every message; remove the row")
    for turn, message in enumerate(read, 1):
        if message["role"] == "assistant" and message not in said:
            raise RowError(where, f"an empty answer; remove the row (turn {turn})")
    return read


def calls(message: Message) -> list[str]:
    """The fields of a message that hold its calls."""
    return [name for name in CALLS if message.get(name)]


def is_trained(where: str, turn: int, message: Message) -> bool:
    """Whether a turn counts: an answer that no field says otherwise of, as `weight: 0` does.

    Raises RowError for what is neither yes nor no, is of a part, or is yes of a turn that is no
    answer.
    """
    if parts := [name for name in DETAILS if message.get(name)]:
        raise RowError(where, f"turn {turn}: {parts[0]} is of parts; expected weight 0 or 1 of all")
    said = {name: message[name] for name in SWITCHES if name in message}
    for name, value in said.items():
        if value not in (0, 1):  # false and true, too
            raise RowError(where, f"turn {turn}: {name} is {shown(value)}; expected 0 or 1")
    is_answer = message["role"] == "assistant"
    if not is_answer and any(said.values()):
        role, name = message["role"], next(name for name, value in said.items() if value)
        raise RowError(
            where,
            f"turn {turn}: {name} is {shown(said[name])} of {role}; only answers are learned",
        )
    return is_answer and all(said.values())


def tools(where: str, given: Any) -> list[dict[str, Any]] | None:
    """The tools that a row offers: a list of objects, or its JSON; None where there are none."""
    given = from_json(where, given)
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise RowError(where, f"tools must be a list of objects; got {shown(given)}")
    return given


def from_json(where: str, given: Any) -> Any:
    """The value of a text that is JSON, as tables keep lists; anything else as it is."""
    if not isinstance(given, str) or not given.strip():
        return given
    value = parsed(given, where)
    check_unicode(where, value)
    return value


def bounded(where: str, text: str) -> str:
    """The text of a row. Raises RowError for one that nobody can have meant as one."""
    if len(text) > LONGEST:
        raise RowError(
            where, f"holds {len(text):,} characters; expected at most {LONGEST:,} in a row"
        )
    return text


def check_unicode(where: str, value: Any) -> None:
    """Raises RowError for half a surrogate pair, which JSON can say and no tokenizer can read."""
    try:
        bounded(where, json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RowError(
            where,
            f"not valid Unicode ({half} is half of a character); write all of it, or remove it",
        ) from error


def parsed(text: str, where: str) -> Any:
    """JSON. Raises RowError for what is none, and for a key that occurs twice in an object."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text else ""
        reason = f"{error.msg}, column {error.colno}"
        raise RowError(f"{where}{line}", f"malformed JSON ({reason})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise RowError(where, f"malformed JSON ({error_reason(error)})") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # json itself keeps the last one without a word
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return fields


def _message(where: str, turn: int, given: Any) -> Message:
    if not isinstance(given, dict):
        raise RowError(where, f"turn {turn} must be {EXPECTED}; got {shown(given)}")
    rest = {name: value for name, value in given.items() if value is not None}
    role, speaker = rest.pop("role", None), rest.pop("from", None)
    content, value = rest.pop("content", None), rest.pop("value", None)
    if role is None and speaker is not None:
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(SPEAKERS)
            raise RowError(where, f"turn {turn} is from {shown(speaker)}; expected one of {known}")
    if not isinstance(role, str):
        raise RowError(where, f"turn {turn} must be {EXPECTED}; got {shown(given)}")
    content = value if content is None else content
    if speaker == CALL and "tool_calls" not in rest:
        function = from_json(where, content)
        content, rest["tool_calls"] = "", [{"type": "function", "function": function}]
    _check_calls(where, turn, rest)
    return {"role": role, "content": _content(where, turn, content, rest)} | rest


def _check_calls(where: str, turn: int, rest: Message) -> None:
    given = rest.get("tool_calls", [])
    each_given = given if isinstance(given, list) else [given]
    functions = [call.get("function", call) for call in each_given if isinstance(call, dict)]
    named = [
        function for function in functions if isinstance(function, dict) and function.get("name")
    ]
    if not isinstance(given, list) or len(named) < len(given):
        raise RowError(
            where,
            f"turn {turn}: tool_calls must be a list of "
            f'{{"function": {{"name": "...", arguments": {{...}}}}}}; got {shown(given)}',
        )


def _content(where: str, turn: int, given: Any, rest: Message) -> str:
    """A text, text parts joined, or "" beside what stands in its place, as tool_calls do."""
    if isinstance(given, list) and given:
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in given]
        other = [part for part, text in zip(given, texts, strict=True) if not isinstance(text, str)]
        if other:
            raise RowError(
                where,
                f"turn {turn}: a part of the content is {shown(other[0])}; expected texts alone, "
                'as {"type": "text", "text": "..."}',
            )
        return "".join(texts)
    if isinstance(given, str):
        return given
    if given is None and calls(rest):
        return ""
    raise RowError(where, f"turn {turn}: its content is {shown(given)}; expected a text")
