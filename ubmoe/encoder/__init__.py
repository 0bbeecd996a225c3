"""The encoder and its stages. Called, the package makes one: `ubmoe.encoder(model, tokenizer)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ubmoe.config import Form


def encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: Form = "eol", **settings: Any
) -> SentenceTransformer:
    """A causal language model as an encoder: texts -> (N, D) vectors, D the model's width.

    It shares the model's weights and mask: what trains the one trains the other. form: "plain" (no
    prompt, the mean of all tokens), "eol" (PromptEOL, 2307.16645: the last token of a prompt),
    "echo" (2402.15449: the text twice, the mean of its second copy) or "paper" (UBMoE's prompt, the
    mean). settings: keys of the configuration's section `bi`: max_tokens (longer texts are cut), or
    prompt, pooling and prompt_in_mean with form None.

    Raises UserError for a tokenizer that stock libraries would read otherwise, for a prompt that
    leaves no room for a text, and for a setting that is not one.

    >>> import ubmoe
    >>> from transformers import AutoTokenizer
    >>> model = ubmoe.load("tiny")
    >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    >>> encoder = ubmoe.encoder(model, tokenizer, form="plain")
    >>> encoder.encode(["The dog sleeps.", "Anna lives here."]).shape
    (2, 128)
    """
    from ubmoe.config import validated
    from ubmoe.encoder.sentence_encoder import as_encoder

    section = validated({"bi": {"form": form} | settings}, "encoder").bi
    return as_encoder(model, tokenizer, section)


class _Package(ModuleType):
    """Python sets `ubmoe.encoder` to this package when a file of it is imported, over any function
    of that name: so that the package itself is called.
    """

    __call__ = staticmethod(encoder)


sys.modules[__name__].__class__ = _Package
