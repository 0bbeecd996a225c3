"""A tokenizer's ids: those that the model has, its own first and last tokens, prompt and answer.

A tokenizer may know more tokens than the model has embeddings (a token was added, the model never
resized), and its post-processor may begin and end every text with tokens of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from ubmoe.config import UserError
from ubmoe.data.bad_rows import RowError, usable
from ubmoe.data.rows import SENTENCE, cell, left, training_rows

ROWS = "embedding_rows"  # attribute of a loaded tokenizer: the ids of its model are below


def fit(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Tell a tokenizer of its model's embedding rows, and give it a padding token among them.

    Padding is masked, so that any token will do; a special one stands in no text.
    """
    setattr(tokenizer, ROWS, rows)
    pad = tokenizer.pad_token_id
    if pad is None or (rows is not None and pad >= rows):
        special = (tokenizer.eos_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
        known = (token for token in special if token is not None and (rows is None or token < rows))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(known, 0))


def strangers(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens, by id, that the tokenizer knows and its model has no embedding for."""
    rows = getattr(tokenizer, ROWS, None)
    if rows is None:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], where: str) -> None:
    """Raises RowError, naming place and token, where the model has no embedding for one."""
    rows = getattr(tokenizer, ROWS, None)
    if rows is not None and (largest := max(ids, default=0)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise RowError(
            where,
            f"holds the token {token!r} (id {largest}), and the model has {rows} embeddings; "
            "expected a text without it",
        )


def checking(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], str]:
    """(where, text) -> the text, as `check_ids`; where the tokenizer has such tokens at all."""
    some = bool(strangers(tokenizer))

    def checked(where: str, text: str) -> str:
        if some:
            check_ids(tokenizer, tokenizer(text, verbose=False)["input_ids"], where)
        return text

    return checked


def sentences_of(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
    blank: bool = False,
) -> list[str]:
    """The sentences of a data set to train on; blank: empty ones, too."""
    rows, checked = training_rows(dataset, most), checking(tokenizer)
    sentences = usable(lambda row: checked(row.where, cell(row, SENTENCE, blank)), rows)
    return left(dataset, list(sentences), len(rows))


def chunks_of(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, dataset: str
) -> list[list[int]]:
    """The texts, a line each, end to end and cut into chunks of `length` tokens; a rest is dropped.

    Raises UserError where they do not fill one chunk.
    """
    lines = [f"{text}\n" for text in texts if text]
    ids = [token for line in tokenizer(lines)["input_ids"] for token in line] if lines else []
    if len(ids) < length:
        raise UserError(
            f"{dataset}: {len(ids)} tokens; expected one chunk of max_tokens={length} at least"
        )
    starts = range(0, len(ids) - length + 1, length)
    return [ids[start : start + length] for start in starts]


def own_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after every text."""
    ends = []
    for keys in ({}, {"add_special_tokens": False}):
        encoded: Any = tokenizer("text", **keys)
        ends.append(list(encoded["input_ids"]))
    whole, bare = ends
    start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: without those that end a text."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    ends = own_ends(tokenizer)[1]
    return ids[: -len(ends)] if ends and ids[-len(ends) :] == ends else ids


def split_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[list[int], list[int]]:
    """The tokens of the whole text, parted where the prompt ends, as lm-eval parts them.

    White space at the prompt's end belongs to the answer. Tokenised apart, an answer would begin as
    a text does, in some tokenizers with a mark of its own.
    """
    length = len(prompt_ids(tokenizer, prompt.rstrip()))
    whole = prompt_ids(tokenizer, prompt + answer)
    return whole[:length], whole[length:]
