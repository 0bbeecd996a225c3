"""tokenizer.json is the tokenizer.

Many classes of transformers 5 take no more than its vocabulary and put their own normalizer,
pre-tokenizer and decoder beside it; where these read a text otherwise, the file's are used.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
ADDED = 100  # of the tokens that texts are cut at, so many are tried
# Contractions, digits of several scripts, white space of every kind, letters that normal forms and
# lower case change, ligatures, emoji, what no vocabulary has.
PROBES = (
    "It's 2024, we'LL pay $1,234.56 for 7\u00bd x\u00b2 \u0663\u0664 (it\u2019s OK)!?",
    "Caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \ufb01ne \uff21\uff11 \u4f60\u597d \u0416\u0443\u043a "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f600\U0001f469\u200d\U0001f680 \ue000\U000f0000",
    "  two  spaces 12  3\tand\u00a0tabs \n\n\tlines\r\n \n  end  ",
    "\n<b>snake_case camelCase</b> \u2581mark http://a.b/c?d=e&f #1 @x",
)


def alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both read texts as the same pieces and tokens, and write them back alike.

    The pieces are compared, too: on so few words a vocabulary may have no merge that shows which
    way a text was split.
    """
    for tokenizer in (one, other):  # of the call before, or of the file
        tokenizer.no_truncation()
        tokenizer.no_padding()
    added = (token.content for token in other.get_added_tokens_decoder().values())
    words = [*islice(added, ADDED), *islice(_named(one), ADDED), *islice(_named(other), ADDED)]
    around = [f"a {word} b{word}c" for word in words]
    for text in (*PROBES, *around):
        if _pieces(one, text) != _pieces(other, text):
            return False
        ids, others = (tokenizer.encode(text).ids for tokenizer in (one, other))
        if ids != others or one.decode(ids) != other.decode(ids):
            return False
    return getattr(one.model, "ignore_merges", None) == getattr(other.model, "ignore_merges", None)


def _named(tokenizer: Tokenizer) -> Iterator[str]:
    """The texts that its normalizer and pre-tokenizer name, such as one that is replaced."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer)
    left = [json.loads(part.__getstate__()) for part in parts if part is not None]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += [value for name, value in item.items() if name != "type"]
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str):
            yield item


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def as_stored(
    tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, or where it reads otherwise than the tokenizer.json beside it, the file's own.

    Special tokens, template, lengths and padding stay. Raises ValueError where the file cannot be
    had as it is.
    """
    keys: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    path = tokenizer.name_or_path
    file = cached_file(
        path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return tokenizer  # of a kind that has none: nothing says otherwise
    as_written = Tokenizer.from_file(file)
    if getattr(as_written.model, "dropout", None):
        raise ValueError("its tokenizer.json drops merges at random; expected dropout: null in it")
    if tokenizer.is_fast and alike(tokenizer.backend_tokenizer, as_written):
        return tokenizer
    names = {key: getattr(tokenizer, key) for key in NAMED}
    named = {
        key: name for key, name in names.items() if as_written.token_to_id(str(name)) is not None
    }
    again: Any = PreTrainedTokenizerFast.from_pretrained(path, **keys, **named)
    again.padding_side = tokenizer.padding_side
    again.model_max_length = tokenizer.model_max_length
    if not alike(again.backend_tokenizer, as_written):
        raise ValueError(
            "beside its tokenizer_config.json its tokenizer.json gives other tokens than alone; "
            "expected them to agree"
        )
    return again
