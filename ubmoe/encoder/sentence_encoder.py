"""A causal language model as a sentence encoder, saved so that stock libraries load either.

sentence-transformers pushes every string through a tokenizer's chat template where there is one
(Qwen's system prompt included), so the input form is pinned in what is saved. The inner model is
shared with the causal LM: training the one trains the other, and the lm_head is kept.
"""

import copy
import json
import logging
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import is_sentence_transformer_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bidirectional import is_bidirectional, set_attention
from ubmoe.bounds import read_json
from ubmoe.config import BiSection, Config, UserError, shown
from ubmoe.data import templates, tokens
from ubmoe.encoder import card, whitening
from ubmoe.encoder.echo import EchoTransformer
from ubmoe.encoder.prefix import SINK, save_sink
from ubmoe.files import replace_directory
from ubmoe.layered import is_ours, keeps_sink, named_layers, partial_layers
from ubmoe.models import cards
from ubmoe.models.loading import best_device, load_model
from ubmoe.models.lora import last_attention
from ubmoe.models.precision import weights_dtype
from ubmoe.models.source import ModelSource, as_user_error, context_length
from ubmoe.models.tensors import guard
from ubmoe.models.tokenizer_file import alike, as_stored

log = logging.getLogger(__name__)
POOLING = {"mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken"}
TEXT = "text"  # name of the prompt that every text gets, where it only stands before it
SIDES = ("query", "document")  # whose prompt the library else takes for empty
PROBES = (" a", *string.ascii_letters, *string.digits, *string.punctuation, "é", "你", "ж")
UNCUT, AT_ONCE = 10**6, 1000  # tokens of a text; texts that are tokenised together
# The library's modules that may follow one of ours.
STOCK: dict[str, Any] = {kind.__name__: kind for kind in (Pooling, Dense, Normalize)}
# Rounding is far below, in bfloat16 too; padding that is read moves a vector by tenths.
BATCH_TOLERANCE = 0.05
SHORT_AND_LONG = ["A cat.", "A cat sat on the mat in the small room by the door, and saw a bird."]
SAID = "messages|map(attribute='content')|join"  # in a template: an instruction, and the text
TEXT_FORM = {"method": "forward", "method_output_name": "last_hidden_state"}


def as_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: BiSection
) -> SentenceTransformer:
    """A SentenceTransformer that shares `model`'s inner model: texts -> (N, D)."""
    if model.base_model is model:
        raise UserError(
            f"model.name: {type(model).__name__} has no model without its head, which an encoder "
            "is; expected another family"
        )
    tokenizer = copy.deepcopy(tokenizer)  # the length is the encoder's, not the language model's
    tokenizer.model_max_length = settings.max_tokens
    tokenizer.padding_side = "right"
    forms: dict[str, dict[str, str]] = {"text": TEXT_FORM}
    keys: dict[str, Any] = {"modality_config": forms, "module_output_name": "token_embeddings"}
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type, union-attr]
    tokens.fit(tokenizer, rows)
    echo = settings.form == "echo"
    prefix = None if echo else prefix_of(tokenizer, settings)
    if settings.prompt not in (None, "{text}") and prefix is None and not echo:
        forms["message"] = TEXT_FORM | {"format": "flat"}
        template = input_template(tokenizer, settings.prompt)
        keys["processing_kwargs"] = {"chat_template": {"chat_template": template}}
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module: Any = _Given(folder, model_kwargs={"given": model.base_model}, **keys)
    both = tokenizer.is_fast and module.tokenizer.is_fast
    if both and not alike(module.tokenizer.backend_tokenizer, tokenizer.backend_tokenizer):
        raise UserError(
            f"model.name: {tokenizer.name_or_path}: beside a model of type "
            f"{model.config.model_type} stock libraries would read other tokens from its "
            f"tokenizer.json ({type(module.tokenizer).__name__}); no encoder can be saved of it"
        )
    module.tokenizer.padding_side = "right"  # not saved where the tokenizer's class has its own
    tokens.fit(module.tokenizer, rows)
    # what modules.json names is the library's own, where stock libraries can read it
    ours = is_bidirectional(model.config) and is_ours(model.config)
    module.__class__ = LayeredTransformer if ours else Transformer
    if echo and not tokenizer.is_fast:
        raise UserError("bi.form: echo needs a tokenizer.json; expected another form")
    if echo:
        module.__class__ = LayeredEchoTransformer if ours else EchoTransformer
        module.echo = settings.prompt
    width = model.config.get_text_config().hidden_size
    pooling = Pooling(width, POOLING[settings.pooling], include_prompt=settings.prompt_in_mean)
    encoder = SentenceTransformer(
        modules=[module, pooling],
        device=str(model.device),
        prompts=None if prefix is None else dict.fromkeys((TEXT, *SIDES), prefix),
        default_prompt_name=None if prefix is None else TEXT,
    )
    instruct(encoder, settings.instructions)
    check_room(encoder, settings)
    return encoder


def instruct(encoder: SentenceTransformer, instructions: Mapping[str, str]) -> None:
    """Give an encoder a prompt for each of mteb's names: its own, then the instruction.

    Raises UserError where a text melts into one that is left out of the mean, and for an encoder
    whose chat template passes prompts over.
    """
    before = own_prompt(encoder) or ""
    pooling = next((item for item in encoder if isinstance(item, Pooling)), None)
    plain = encoder.preprocess(["a"], prompt=before) if instructions else {}
    for name, text in instructions.items():
        if pooling is not None and not pooling.include_prompt:
            _check_apart(encoder.tokenizer, before + text, f"bi.instructions.{name}")
        encoder.prompts[name] = before + text
        read = encoder.preprocess(["a"], prompt=before + text)
        if text and "input_ids" in plain and plain["input_ids"].equal(read["input_ids"]):
            raise UserError(
                f"bi.instructions.{name}: the encoder's chat template passes it over; expected one "
                "that renders every message, as train_bi.py saves it"
            )


class LayeredTransformer(Transformer):
    """The module of an encoder under a mask of `ubmoe.layered`: layers, or the first token kept.

    Saved encoders name it in modules.json: sentence-transformers has one switch for all layers. It
    asks for trust_remote_code=True before it imports a class of another package; `load_saved` does
    not need it.
    """

    def _load_model(self, *arguments: Any, **model_kwargs: Any) -> PreTrainedModel:
        model = super()._load_model(*arguments, **model_kwargs)
        return set_attention(model, is_bidirectional(model.config))


class LayeredEchoTransformer(EchoTransformer, LayeredTransformer):
    """Both: a text read twice by a model in which some layers are bidirectional."""


def load_saved(directory: str, device: str | None = None, **keys: Any) -> SentenceTransformer:
    """As `SentenceTransformer(directory)`, and knows our modules without trusting any code.

    directory: or a hub id; keys: further ones of SentenceTransformer, as revision.
    """
    templates.install()
    path = Path(directory) / "modules.json"
    modules_of_ours = LayeredTransformer, EchoTransformer, LayeredEchoTransformer
    kinds = {f"{module.__module__}.{module.__qualname__}": module for module in modules_of_ours}
    keys |= {"trust_remote_code": False}
    kind = path.is_file() and kinds.get(read_json(path)[0]["type"])
    if not kind:
        return _fitted(SentenceTransformer(directory, device=device, **keys), keys.get("revision"))
    said = read_json(path.with_name("config_sentence_transformers.json"))
    modules = [
        STOCK[module["type"].split(".")[-1]].load(directory, subfolder=module["path"])
        for module in read_json(path)[1:]
    ]
    encoder = SentenceTransformer(
        modules=[kind.load(directory, **keys), *modules],
        device=device,
        prompts=said.get("prompts"),
        default_prompt_name=said.get("default_prompt_name"),
    )
    return _fitted(encoder, keys.get("revision"))


def _fitted(encoder: SentenceTransformer, revision: str | None) -> SentenceTransformer:
    """It reads as its tokenizer.json does, pads with a token of its model, within its context."""
    first: Any = encoder[0]
    lowered = getattr(first, "do_lower_case", False)  # which changes the tokenizer
    if not lowered and isinstance(getattr(first, "processor", None), PreTrainedTokenizerBase):
        first.processor = as_stored(first.processor, revision)
    inner, tokenizer = getattr(encoder[0], "model", None), encoder.tokenizer
    limit: Any = encoder.max_seq_length
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise UserError(
            f"max_seq_length of the encoder's sentence_bert_config.json: got {shown(limit)}; "
            "expected 1 token or more, or null"
        )
    if isinstance(inner, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase):
        tokens.fit(tokenizer, len(inner.get_input_embeddings().weight))  # type: ignore
        context = context_length(inner.config)
        if context and (limit is None or limit > context):
            log.info("max_seq_length: %d, the model's context, not %s", context, limit)
            encoder.max_seq_length = context
        if alone_and_together(encoder) > BATCH_TOLERANCE:
            tokenizer.padding_side = {"left": "right", "right": "left"}[tokenizer.padding_side]
            prove_batches(encoder)
            log.info("padded on the %s, as its positions require", tokenizer.padding_side)
    return encoder


@torch.no_grad()
def alone_and_together(encoder: SentenceTransformer) -> float:
    """How far a text's vector moves when it is padded beside a longer one, relative to its norm."""
    keys: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    training = encoder.training
    [alone] = encoder.encode(SHORT_AND_LONG[:1], **keys).float()
    together = encoder.encode(SHORT_AND_LONG, **keys).float()[0]
    encoder.train(training)
    return float((alone - together).norm() / alone.norm())


def prove_batches(encoder: SentenceTransformer) -> None:
    """Raises UserError where a text's vector depends on the texts beside it, as by its padding."""
    if not (moved := alone_and_together(encoder)) <= BATCH_TOLERANCE:
        raise UserError(
            f"model.name: a short text's vector moves by {moved:.2f} of its length when a longer "
            f"text stands beside it (padding on the {encoder.tokenizer.padding_side}); expected a "
            "model whose attention masks padding and whose positions leave it out"
        )


class _Given(Transformer):
    """Takes the inner model that it is given, where its parent would load a second one."""

    def _load_model(self, *arguments: Any, **model_kwargs: Any) -> PreTrainedModel:
        return model_kwargs["given"]


def prefix_of(tokenizer: PreTrainedTokenizerBase, settings: BiSection) -> str | None:
    """The prompt's text where it only stands before a text; None for none, and for any other.

    Raises UserError where it cannot be left out of the mean, as asked.
    """
    if settings.prompt in (None, "{text}") or not str(settings.prompt).endswith("{text}"):
        return "" if not settings.prompt_in_mean else None
    prefix = str(settings.prompt).removesuffix("{text}")
    if not settings.prompt_in_mean:
        _check_apart(tokenizer, prefix, "bi.prompt_in_mean")
    return prefix


def _check_apart(tokenizer: PreTrainedTokenizerBase, prefix: str, where: str) -> None:
    """That a prompt can be left out of the mean: its first tokens, as many as it alone has.

    Raises UserError where a text melts into these, as after a prompt that ends in a space, and
    where sentence-transformers would count others.
    """
    alone = tokens.prompt_ids(tokenizer, prefix)
    ended = tokenizer(prefix)["input_ids"]  # it takes one special token off the end of these
    counted = len(ended) - (ended[-1:] != [] and ended[-1] in tokenizer.all_special_ids)
    if prefix and counted != len(alone):
        raise UserError(
            f"{where}: sentence-transformers would leave {counted} tokens out of the mean, and the "
            f"prompt has {len(alone)}: it, or what this tokenizer appends, ends in special tokens "
            "that are counted otherwise; expected bi.prompt_in_mean: true"
        )
    for first in PROBES:
        if tokenizer(f"{prefix}{first}")["input_ids"][: len(alone)] != alone:
            raise UserError(
                f"{where}: a text that begins with {first!r} changes the tokens of the prompt; "
                "expected a prompt that ends in a line break or a colon, or bi.prompt_in_mean: true"
            )


def input_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The Jinja template of a text in its prompt, with the tokenizer's own first and last tokens.

    A template's tokens are its string's alone, so that these stand in it. Behind a first token some
    tokenizers take a space for the beginning of a text. Raises UserError where no template gives
    the ids of the text in its prompt.
    """
    prefix, suffix = prompt.split("{text}")
    ends = [tokenizer.convert_ids_to_tokens(ids) for ids in tokens.own_ends(tokenizer)]
    first, last = ("".join(end) for end in ends)
    for joint in ("", " "):
        before, after = f"{first}{joint}{prefix}", f"{suffix}{last}"
        if all(
            tokenizer(f"{before}{text}{after}", add_special_tokens=False)["input_ids"]
            == tokenizer(prompt.replace("{text}", text))["input_ids"]
            for text in PROBES
        ):
            quoted = [json.dumps(part, ensure_ascii=False) for part in (before, after)]
            return "{{ " + f"{quoted[0]} + {SAID} + {quoted[1]}" + " }}"
    raise UserError(
        f"bi.prompt: {tokenizer.name_or_path}: its tokenizer puts {first!r} before and {last!r} "
        "after a text in a way that no template can; expected null"
    )


def rendered(encoder: SentenceTransformer, text: str) -> str:
    """The text as the model reads it, special tokens included."""
    ids = encoder.preprocess([text], prompt=own_prompt(encoder))["input_ids"][0]
    return str(encoder.tokenizer.decode(ids))


def lengths(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    where: str = "row",
    prompt: str | None = None,
) -> list[int]:
    """Tokens of each text as the encoder would read it uncut; [] for one that counts none.

    prompt: what stands before a text; None: the encoder's own. Raises UserError, as `where` and the
    number of the text, for a token that the model lacks.
    """
    prompt = own_prompt(encoder) if prompt is None else prompt
    limit, encoder.max_seq_length = encoder.max_seq_length, UNCUT
    strange = tokens.strangers(encoder.tokenizer)
    counts: list[int] = []
    try:
        for start in range(0, len(texts), AT_ONCE):
            features = encoder.preprocess(list(texts[start : start + AT_ONCE]), prompt=prompt)
            if "attention_mask" not in features:
                return []
            counts += features["attention_mask"].sum(1).tolist()
            for number, ids in enumerate(features["input_ids"].tolist() if strange else [], start):
                tokens.check_ids(encoder.tokenizer, ids, f"{where} {number + 1}")
    finally:
        encoder.max_seq_length = limit
    return counts


def check_room(encoder: SentenceTransformer, settings: BiSection) -> None:
    """Raises UserError for a limit of tokens that the prompt alone fills: all texts were alike."""
    limits = {"": settings.max_tokens}
    contrastive = (
        (n, stage) for n, stage in enumerate(settings.stages) if stage.objective != "mntp"
    )
    limits |= {f"stages.{n}.": stage.max_tokens for n, stage in contrastive}
    [least] = lengths(encoder, ["a"])
    for name in settings.instructions:
        [own] = lengths(encoder, ["a"], prompt=encoder.prompts[name])
        if settings.max_tokens < own:
            raise UserError(
                f"bi.instructions.{name}: leaves no room for a text; with it, a text of one letter "
                f"has {own} tokens, and bi.max_tokens is {settings.max_tokens}; expected more"
            )
    for where, limit in limits.items():
        if limit < least:
            raise UserError(
                f"bi.{where}max_tokens: {limit} leaves no room for a text; with the prompt, a text "
                f"of one letter has {least} tokens; expected more"
            )


def own_prompt(encoder: SentenceTransformer) -> str | None:
    """The prompt that `encode` adds by itself, and `preprocess` and the trainer do not."""
    return encoder.prompts.get(encoder.default_prompt_name or "") or None


def load_encoder(config: Config, source: ModelSource) -> SentenceTransformer:
    """Any encoder that sentence-transformers knows, or else a causal LM in the form of `bi`.

    source: of the config's model.
    """
    device, name = best_device(config.model.device), source.path
    if source.file is None and is_sentence_transformer_model(name, revision=config.model.revision):
        if config.model.adapters:
            raise UserError(
                f"model.adapter: {config.model.name} is an encoder of sentence-transformers; "
                "expected null, or a causal language model as model.name"
            )
        keys: Any = {
            "revision": config.model.revision,
            "model_kwargs": {"dtype": weights_dtype(config.model.dtype, device)},
        }
        with as_user_error(config.model, "an encoder"):
            encoder = load_saved(name, str(device), **keys)
        instruct(encoder, config.bi.instructions)
        return encoder
    check_mask(config)
    config = source.within_context(config, "bi")
    unlabelled = whitening.read_sentences(config.bi.whiten, source.tokenizer)
    model = load_model(source, *config.bi.mask)
    encoder = as_encoder(model, source.tokenizer, config.bi)
    whitening.whiten(encoder, config, unlabelled)
    return encoder


def check_mask(config: Config) -> None:
    """Raises UserError where the last adapter was trained under another mask than the encoder's."""
    if (trained := last_attention(config.model.adapters)) not in (None, config.bi.attention):
        raise UserError(
            f"bi.attention: the adapter was trained {trained}, not {config.bi.attention}; expected "
            f"bi.attention={trained}"
        )


def save_encoder(
    encoder: SentenceTransformer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: BiSection,
    directory: Path,
) -> None:
    """One directory for SentenceTransformer, AutoModel and AutoModelForCausalLM, or nothing.

    sentence-transformers saves first: it would drop the lm_head and the true model_max_length.
    """

    prove_batches(encoder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = encoder.tokenizer.padding_side  # learned positions count from the left
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # or it is not saved

    def write(folder: Path) -> None:
        encoder.save_pretrained(str(folder))
        for weights in folder.glob("*.safetensors*"):
            weights.unlink()  # of the headless model; its shards may be named otherwise
        model.config.use_cache, cached = True, model.config.use_cache
        model.save_pretrained(folder)  # for generation; an encoder switches it off on loading
        model.config.use_cache = cached
        tokenizer.save_pretrained(folder)
        path = folder / "sentence_bert_config.json"
        form = json.loads(path.read_text(encoding="utf-8"))
        form["max_seq_length"] = settings.max_tokens
        if isinstance(encoder[0], LayeredTransformer):
            form["config_kwargs"] = {"is_causal": False}
            _make_causal(folder / "config.json")
            first = save_sink(model, _firsts(encoder), folder / SINK)
        else:
            first = None
        path.write_text(json.dumps(form, indent=4, ensure_ascii=False), encoding="utf-8")
        card.name_modules_for_servers(folder)
        if not isinstance(encoder[0], LayeredTransformer | EchoTransformer):
            family = model.config.model_type
            cards.write(folder, card.METADATA, card.usage(encoder, tokenizer, settings, family))
        else:
            cards.write(folder, card.METADATA, card_of_ours(encoder, settings, first))
        if is_bidirectional(model.config):
            guard(folder)

    replace_directory(directory, write)


def _make_causal(path: Path) -> None:
    """Readers of config.json alone know no layers, and must not be bidirectional in all of them."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"is_causal": True}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _firsts(encoder: SentenceTransformer) -> list[int]:
    """The token that each of some unlike texts begins with, in each prompt."""
    firsts: list[int] = []
    for prompt in {own_prompt(encoder), *encoder.prompts.values()}:
        features = encoder.preprocess(list(PROBES), prompt=prompt)
        starts = features["attention_mask"].argmax(1, keepdim=True)
        firsts += features["input_ids"].gather(1, starts)[:, 0].tolist()
    return firsts


def _mask_in_words(config: Any) -> str:
    """A mask of ours, for a card."""
    layers, said = partial_layers(config), "every layer"
    if layers is not None:
        said = f"layers {named_layers(layers)} and causal in the others"
    alone = "; the first token sees itself alone, as in a causal model"
    return said + alone * keeps_sink(config)


def card_of_ours(encoder: SentenceTransformer, settings: BiSection, first: int | None) -> str:
    """The card of an encoder that a module of this package reads. first: the token of its sink."""
    layered = isinstance(encoder[0], LayeredTransformer)
    inner: Any = encoder[0]
    mask = _mask_in_words(inner.model.config) if layered else f"{settings.attention} attention"
    parts = [OURS.format(start=cards.START, mask=mask)]
    parts.append(ECHO_CARD if isinstance(encoder[0], EchoTransformer) else "")
    parts.append("" if first is None else SINK_CARD.format(start=cards.START, first=first))
    parts.append(card.WHITEN_CARD if settings.whiten is not None else "")
    parts.append(card.instructed(settings))
    causal = "" if layered or not settings.bidirectional else ", is_causal=True"
    return "".join([*parts, OURS_LANGUAGE.format(causal=causal)])


OURS = """# A language model as a sentence encoder

A causal language model as an encoder; its head is still there. It reads with {mask}. A module of
the package `ubmoe` does this: install it. transformers alone, and servers, cannot. `.` is this
folder.

```python
{start}
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(directory, trust_remote_code=True)
vectors = encoder.encode(["The dog sleeps.", "A cat sat in the garden."])
```
"""
OURS_LANGUAGE = """
As a language model: `AutoModelForCausalLM.from_pretrained("."{causal})`, causal in every layer.
"""
SINK_CARD = """
Its states without `ubmoe`, in stock peft: every text begins with token {first}, whose keys and
values are one virtual token in `sink/`. Give the model the ids behind it:

```python
{start}
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModel.from_pretrained(directory, is_causal=False)
model = PeftModel.from_pretrained(model, f"{{directory}}/sink").eval()
ids = tokenizer("The dog sleeps.", return_tensors="pt")["input_ids"]  # in the encoder's prompt
states = model(input_ids=ids[:, 1:]).last_hidden_state
```
"""
ECHO_CARD = """
Every text is read twice, and its vector is of the second copy's tokens.
"""
