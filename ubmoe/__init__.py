"""Attention dependence, bidirectional fine-tuning and the uni-/bi-directional mixture of experts.

The four ideas of UBMoE (ICML 2025) for models of transformers, without a configuration file:

    make_bidirectional(model)                      every token sees all others, and it is proved
    attention_dependence(model, tokenizer, texts)  where attention would go, were it not masked
    encoder(model, tokenizer, form="eol")          the model as a sentence-transformers encoder
    join(language_model, encoder)                  one model of two FFNs, which does both
    load(directory, route="mode")                  a saved model, and which FFN is read

All raise UserError, one line that says what is wrong. Nothing heavy is imported before a call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ubmoe.config import Layers, Route

__all__ = [
    "UserError",
    "attention_dependence",
    "encoder",
    "join",
    "load",
    "make_bidirectional",
]


def make_bidirectional(
    model: PreTrainedModel, layers: Layers = "all", keep_sink: bool = False
) -> PreTrainedModel:
    """Let every token see every other one, in place, and prove by a leak test that it does.

    layers: those that are bidirectional, numbered from 0: "all", "none", a list, or a dict of
    `from`, `to` and `every`; the rest stay causal. keep_sink: the first token sees itself alone,
    so that the attention sink on it stays (Xiao et al., 2309.17453). `model.config` keeps all of
    it, and is saved with the model. Returns the model.

    Raises UserError for layers that the model lacks, and for a family on which the mask has no
    effect, such as a recurrent one.

    >>> import ubmoe
    >>> model = ubmoe.load("tiny")  # the embedded model; else a directory or hub id
    >>> ubmoe.make_bidirectional(model).config.is_causal
    False
    >>> ubmoe.make_bidirectional(model, layers={"from": 2}).config.bidirectional_layers
    [2, 3]
    """
    from ubmoe import bidirectional

    return bidirectional.make_bidirectional(model, layers, keep_sink)


def attention_dependence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | list[dict[str, Any]]],
    **settings: Any,
) -> dict[str, Any]:
    """Where each token's attention would go, were nothing masked, in percent (UBMoE, section 3).

    texts: plain ones, or chats as lists of {"role", "content"}. The states are those of the
    model's own mask. settings: keys of the configuration's section `dependence`: max_tokens,
    batch_tokens, buckets (tokens, edges), chat_template and bf16.

    Returns `overall`: the share of attention to the token itself (main), before and after it, as
    means over rows, heads, layers and texts; `uniform`: the same of attention that prefers nothing;
    `stderr` over texts; and the shares by layer and head (`layers`), length (`buckets`) and text
    (`by_text`, one number a text).

    Raises UserError for a family that does not use transformers' attention interface, for a text
    without tokens, and for a setting that is not one.

    >>> import ubmoe
    >>> from transformers import AutoTokenizer
    >>> model = ubmoe.load("tiny")
    >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    >>> found = ubmoe.attention_dependence(model, tokenizer, ["The dog sleeps in the garden."])
    >>> sorted(found["overall"]), round(sum(found["overall"].values()))
    (['after', 'before', 'main'], 100)
    >>> len(found["layers"]), found["texts"]
    (4, 1)
    """
    from ubmoe.config import validated
    from ubmoe.dependence.measure import measure
    from ubmoe.dependence.texts import cut, tokenize, unread

    section = validated({"dependence": settings}, "attention_dependence").dependence
    ids = tokenize(tokenizer, unread(texts), section.chat_template)
    return measure(model, cut(model, ids, section.max_tokens)[0], section)


def join(
    language_model: PreTrainedModel,
    encoder: PreTrainedModel | SentenceTransformer,
    route: Route = "mode",
    top_k: int = 2,
) -> PreTrainedModel:
    """One model of both FFNs in every layer: the original's, and those of its tuned encoder.

    encoder: tuned from the language model in its FFNs alone. The result is a stock Qwen2-MoE or
    Qwen3-MoE in its own memory, whose routers are zero until they are trained: at top_k 2 both
    FFNs count half. route: as of `load`. With "mode" the causal model is exactly the language
    model, and after `make_bidirectional` exactly the encoder's.

    Raises UserError for a family without a stock mixture of experts, for weights that differ
    outside the FFNs, and for numbers that are not finite; it calls the two as the configuration
    does, model.name and ubmoe.bi.

    >>> import ubmoe
    >>> language_model, tuned = ubmoe.load("tiny"), ubmoe.load("tiny")
    >>> _ = tuned.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)  # in place of a training
    >>> mixture = ubmoe.join(language_model, tuned)
    >>> type(mixture).__name__, mixture.config.num_experts
    ('Qwen2MoeForCausalLM', 2)
    >>> ids = language_model.dummy_inputs["input_ids"]
    >>> bool((mixture(ids).logits == language_model(ids).logits).all())
    True
    """
    from ubmoe.moe.joining import join_models
    from ubmoe.moe.routes import set_route

    mixture = join_models(language_model, encoder, top_k)
    set_route(mixture, route)
    return mixture


def load(directory: str, route: Route | None = None, **settings: Any) -> PreTrainedModel:
    """A causal language model in eval mode, on the best device, its causal mask proved.

    directory: or a hub id, a .gguf file, or "tiny". route, of a mixture: "learned" (the routers
    decide), "uni" or "bi" (one of the two FFNs), "mode" (uni where the mask is causal, bi where it
    is bidirectional), "half" (the mean of both outputs) or "average" (of both weights); None leaves
    the model as it is. settings: keys of the configuration's section `model`: revision, dtype,
    device, attn_implementation, adapter, cache.

    Raises UserError for a missing or broken checkpoint, one that is no decoder or needs code of its
    own, and a route of a model that is no mixture.

    >>> import ubmoe
    >>> ubmoe.load("tiny", dtype="bfloat16").dtype
    torch.bfloat16
    >>> ubmoe.load("no/such/model")
    Traceback (most recent call last):
    ubmoe.config.errors.UserError: model.name: no/such/model is no directory; expected a model \
directory, a hub id, a .gguf file, or tiny
    """
    from ubmoe.config import validated
    from ubmoe.models.loading import load_model
    from ubmoe.moe.routes import set_route

    section = validated({"model": {"name": str(directory)} | settings}, "load").model
    model = load_model(section)
    if route is not None:
        set_route(model, route)
    return model


def __getattr__(name: str) -> Any:
    """`encoder` is the package of that name, which can be called; UserError is wanted seldom."""
    if name == "encoder":
        return import_module("ubmoe.encoder")
    if name == "UserError":
        return import_module("ubmoe.config").UserError
    raise AttributeError(f"module 'ubmoe' has no attribute {name!r}")
