"""Every key of every program: its type, default, unit and meaning, and what it can change."""

import math
import re
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo


def _exponent_float(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text; everybody means the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+", value):
        return float(value)
    return value


Float = Annotated[float, BeforeValidator(_exponent_float)]
Positive = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=4096)]  # layers are hardly wider, and memory has an end
Seed = Annotated[int, Field(ge=0, lt=2**32)]


Affects = Literal["weights", "scores", "nothing"]


def key(default: Any, meaning: str, unit: str = "", affects: Affects = "weights") -> Any:
    """A key of the schema: its default, its meaning, its unit where it has one.

    affects: what another value can change. `weights`: whatever is trained, and so every number;
    `scores`: what is measured of a model, not the model; `nothing`: how a run goes on, not what
    comes out.
    """
    extra: Any = {"unit": unit, "affects": affects}
    if isinstance(default, list | dict):
        return Field(
            default_factory=lambda: type(default)(default),
            description=meaning,
            json_schema_extra=extra,
        )
    return Field(default, description=meaning, json_schema_extra=extra)


score_key = partial(key, affects="scores")
running_key = partial(key, affects="nothing")


def _not_empty(value: Any) -> Any:
    if value == []:
        raise ValueError("expected one at least")
    return value


Some = AfterValidator(_not_empty)


Bf16 = Literal["auto"] | bool
MOST = 10**10  # of any number: no count, size or rate is larger, and all arithmetic takes it


def _check_values(value: Any) -> None:
    """Raises ValueError where a key holds, at any depth, what no file or library would take."""
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_values(item)
    elif isinstance(value, int | float) and not -MOST <= value <= MOST:  # NaN, too
        raise ValueError(f"expected numbers from -{MOST} to {MOST}")
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError("expected text without NUL and halves of surrogate pairs")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*")
    @classmethod
    def _is_sound(cls, value: Any) -> Any:
        _check_values(value)
        return value

    @field_validator("*")
    @classmethod
    def _is_named_once(cls, value: Any) -> Any:
        """Refuse duplicates in a list: one would be lost in a result, or counted twice."""
        listed = value if isinstance(value, list) else []
        names = [item for item in listed if isinstance(item, str | int)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is listed twice; expected each once")
        return value


class ModelSection(Section):
    """Which model, and how it is loaded."""

    name: str = key("tiny", "hub id, local directory, .gguf file, or the word tiny")
    revision: str | None = key(None, "branch, tag or commit of a hub model")
    dtype: Literal["float32", "auto", "bfloat16", "float16"] = key(
        "float32",
        "of the weights, but for what is just training: that is float32; auto: bfloat16 where the "
        "device has it, else float32",
    )
    device: str | None = running_key(None, "cpu, cuda, cuda:1, mps, ...; null: the best there is")
    attn_implementation: (
        Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None
    ) = key(None, "attention backend; null: the model's own default")
    adapter: str | list[str] | None = key(
        None, "directory of a LoRA adapter, merged on load, or a list of them, merged in order"
    )
    cache: str | None = running_key(
        None, "folder for the embedded model; null: UBMOE_CACHE or the user's cache folder"
    )

    @property
    def adapters(self) -> list[str]:
        """The adapters in the order of merging; [] for none."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter or []


class DataSection(Section):
    """How data sets are read, by every program."""

    skip_bad_rows: bool = key(
        False,
        "drop rows that cannot be used, and count them in the result; false: they are errors",
    )
    template_date: str = key(
        "2024-07-26", "today, to chat templates that ask for the date", "year-month-day"
    )

    @field_validator("template_date", mode="before")
    @classmethod
    def _is_a_date(cls, value: Any) -> Any:
        text = value.isoformat() if type(value) is date else value  # YAML reads a date as one
        try:
            whole = isinstance(text, str) and date.fromisoformat(text).isoformat() == text
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("expected a day such as 2024-07-26")
        return text


class DependenceSection(Section):
    """Attention dependence DP (calculate_dp.py)."""

    dataset: str = score_key(
        "tiny",
        "chats or texts: hub id[:config[:split]], local file (docs/data.md), or tiny",
    )
    chat_template: str | None = score_key(
        None, "Jinja file or string; null: the tokenizer's own, or a plain form where it has none"
    )
    max_texts: Positive | None = score_key(
        1000, "measure at most this many, spaced evenly over the data; null: all", "texts"
    )
    max_tokens: Positive = score_key(
        2048, "cut longer texts here (or at the model's context), and count them", "tokens"
    )
    buckets: list[int] = score_key(
        [0, 256, 512, 1024, 2048], "edges; a text of length T is in (low, high]", "tokens"
    )
    flow: Literal["causal", "bidirectional"] = score_key(
        "causal", "mask of the states; the observation is always unmasked"
    )
    batch_tokens: Positive = score_key(
        8192, "padded tokens of one forward; a longer text goes alone", "tokens"
    )
    bf16: Bf16 = score_key(
        "auto", "the model's flow under bfloat16 autocast, the sums in float32; auto: where it pays"
    )

    @field_validator("buckets")
    @classmethod
    def _ascend(cls, edges: list[int]) -> list[int]:
        if len(edges) < 2 or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError("expected at least two ascending edges from 0 up, as [0, 256, 512]")
        return edges


Share = Annotated[Float, Field(ge=0, lt=1)]
Above = Annotated[Float, Field(gt=0)]
MODULES = ("ffn", "attention", "embedding", "all", "ffn_up_down")


def _is_module(text: str) -> str:
    """ffn, or ffn@3-29 and ffn@7: the module in some layers alone."""
    module, at, layers = text.partition("@")
    some = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", layers)
    ascend = some is not None and int(some[1]) <= int(some[2] or some[1])
    in_layers = module in ("ffn", "attention", "ffn_up_down") and ascend
    if module not in MODULES or (at and not in_layers):
        choices = " or ".join(map(repr, MODULES)).replace(" or ", ", ", len(MODULES) - 2)
        raise ValueError(f"expected {choices}, or one in some layers, as 'ffn@3-29'")
    return text


Module = Annotated[str, AfterValidator(_is_module)]


def _names_layers(layers: Any) -> Any:
    if layers in ({}, []) or (isinstance(layers, dict) and layers.get("every", 1) < 1):
        raise ValueError("layers must name some; expected all, {from: 3}, {every: 3} or a list")
    return layers


# Which layers are bidirectional: {from: 3}, {every: 3, from: 2, to: 20}, or their numbers.
Layers = Annotated[
    Literal["all", "none"] | dict[Literal["from", "to", "every"], int] | list[int],
    AfterValidator(_names_layers),
]
PROMPT = 'The representative word for sentence {text} is:"'  # the paper's, its quote included
EOL = 'This sentence : "{text}" means in one word:"'  # PromptEOL's (Jiang et al., 2023)
ECHO = "Sentence: {text}\nSentence again: {text}"  # after Springer et al. (2024)
Pooled = Literal["mean", "weighted_mean", "last"]
Form = Literal["plain", "eol", "echo", "paper"]
FORMS: dict[Form, tuple[str | None, Pooled]] = {  # the prompt and the pooling of each
    "plain": (None, "mean"),
    "eol": (EOL, "last"),
    "echo": (ECHO, "mean"),  # of the second copy's tokens alone
    "paper": (PROMPT, "mean"),
}


class TrainingSection(Section):
    """Arguments of transformers' Trainer, under its names."""

    max_steps: Annotated[int, Field(ge=-1)] = key(
        -1, "stop after this many; -1: num_train_epochs decides", "steps"
    )
    num_train_epochs: Above = key(1.0, "passes over the data", "epochs")
    per_device_train_batch_size: Positive = key(64, "rows of a step on one device", "rows")
    learning_rate: Above = key(3e-5, "peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = key(
        "linear", "shape of the learning rate after warm-up"
    )
    warmup_steps: Annotated[Float, Field(ge=0)] = key(
        0, "linear warm-up; below 1 it is a share of all steps", "steps"
    )
    optim: Literal[
        "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"
    ] = key("adamw_torch_fused", "optimiser, by transformers' name; 8bit needs bitsandbytes")
    weight_decay: Annotated[Float, Field(ge=0)] = key(0.0, "of AdamW")
    adam_beta1: Share = key(0.9, "of AdamW")
    adam_beta2: Share = key(0.999, "of AdamW")
    adam_epsilon: Above = key(1e-8, "of AdamW (the paper's code has 1e-3)")
    max_grad_norm: Above = key(1.0, "gradients are clipped at this norm")
    bf16: Bf16 = key(
        "auto", "bfloat16 autocast over float32 weights; auto: where the processor has bfloat16"
    )
    activation_checkpointing: bool = key(
        False, "recompute activations: less memory, a third slower"
    )
    logging_steps: Positive = running_key(10, "between two rows of the log", "steps")
    save_steps: Positive = running_key(200, "between two checkpoints", "steps")
    save_total_limit: Positive = running_key(2, "checkpoints kept")
    report_to: str = running_key("none", "none, wandb, tensorboard, ...")

    def steps(self, rows: int) -> int:
        """Optimiser steps over `rows` rows on one device; the last batch of an epoch is dropped."""
        if self.max_steps >= 0:
            return self.max_steps
        return math.ceil(rows // self.per_device_train_batch_size * self.num_train_epochs)


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning; the defaults are the paper's code's."""

    rank: Rank = key(8, "rank of the adapters")
    alpha: Above = key(16.0, "their scale is alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: Share = key(0.05, "dropout in front of the adapters")
    rslora: bool = key(True, "rank-stabilised scale")


MINI_BATCH = 2048  # tokens that keep a processor, or 8 GiB of a GPU, busy
MiniBatch = Positive | Literal["auto"]


class StageSection(TrainingSection):
    """One stage of bidirectional fine-tuning.

    Keys of the contrastive objectives mean nothing to mntp, and the other way round.
    """

    objective: Literal["simcse", "supervised", "mntp"] = key("simcse", "what the stage learns")
    train: Annotated[list[Module], Some] = key(
        ["ffn"], "modules that train; everything else is frozen"
    )
    lora: LoraSection | None = key(None, "null: the modules themselves train; else their adapters")
    dataset: str = key(
        "tiny",
        "sentences, (anchor, positive[, negatives]) rows, or raw text (mntp): hub id, local file, "
        "or tiny",
    )
    positive_from: Float | None = key(
        None, "supervised: rows whose label or score is lower are left out; null: no such column"
    )
    max_rows: Positive | None = key(None, "use at most this many, evenly spaced; null: all", "rows")
    loss: Literal["nt_xent", "simcse"] = key(
        "nt_xent", "nt_xent: all 2N views are candidates; simcse: anchors against positives"
    )
    temperature: Above = key(0.05, "of the cosines")
    dropout: Share = key(0.3, "attention dropout that makes the two views of simcse")
    max_tokens: Positive = key(
        128, "longer texts are cut, and counted; mntp's chunks have this length", "tokens"
    )
    mini_batch_tokens: MiniBatch = key(
        "auto",
        "most padded tokens of one forward; the batch is sorted by length into such; auto: 2048, "
        "and without cached on CUDA 2048 for every 8 GiB of the card",
        "tokens",
    )
    cached: bool = key(False, "GradCache: memory of one mini-batch, for one more forward")
    lm_weight: Annotated[Float, Field(ge=0)] = key(
        0.0, "of the causal language-model loss beside a contrastive one; 0: without"
    )
    lm_dataset: str = key("tiny", "its chats (their answers count) or texts: hub id, file, or tiny")
    lm_max_rows: Positive | None = key(None, "use at most this many, evenly spaced", "rows")
    lm_max_tokens: Positive = key(256, "longer ones are cut", "tokens")
    lm_batch_size: Positive = key(16, "of them beside each contrastive batch", "rows")
    mlm_probability: Annotated[Float, Field(gt=0, le=1)] = key(
        0.2, "share of tokens that mntp chooses, anew in every epoch"
    )
    masking: Literal["bert", "all"] = key(
        "bert", "bert: 80 % masked, 10 % random, 10 % as they were; all: every chosen one masked"
    )
    mask_token: str = key("_", "what stands for a masked token: one token of the vocabulary")

    @model_validator(mode="before")
    @classmethod
    def _of_the_objective(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("objective") == "mntp":
            return MNTP | given
        return given

    @model_validator(mode="before")
    @classmethod
    def _cached_bounds_memory(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("cached") is True:
            auto = given.get("mini_batch_tokens", "auto") == "auto"
            return given | ({"mini_batch_tokens": MINI_BATCH} if auto else {})
        return given

    @model_validator(mode="after")
    def _lm_beside_contrast(self) -> "StageSection":
        if self.lm_weight and (self.objective == "mntp" or self.activation_checkpointing):
            raise ValueError(
                "lm_weight stands beside simcse or supervised, without activation_checkpointing, "
                "which would recompute it under the other mask; expected 0"
            )
        return self

    @model_validator(mode="after")
    def _positives_of_pairs(self) -> "StageSection":
        if self.positive_from is not None and self.objective != "supervised":
            raise ValueError("positive_from is of supervised pairs; expected null")
        return self

    @model_validator(mode="after")
    def _lora_can_train_it(self) -> "StageSection":
        if self.lora is not None and (wrong := {"embedding", "all"} & set(self.train)):
            raise ValueError(
                f"lora cannot train {' and '.join(sorted(wrong))}; expected lora: null, or train "
                "of ffn, attention, ffn_up_down"
            )
        return self


# LLM2Vec's defaults for masked next token prediction.
MNTP = {
    "train": ["ffn", "attention"],
    "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "rslora": False},
    "max_tokens": 512,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-5,
}


class WhitenSection(Section):
    """A linear map of the vectors, fitted on unlabelled sentences and saved after the pooling."""

    dataset: str = key("tiny", "its sentences: hub id, local file, or tiny")
    rows: Positive = key(10000, "use at most this many, evenly spaced", "rows")
    remove: Annotated[int, Field(ge=0)] | Literal["whiten"] = key(
        1,
        "principal components that are taken out of the centred vectors; 0: they are centred "
        "alone; whiten: all are kept, with the variance 1",
    )


class BiSection(Section):
    """Bidirectional fine-tuning (train_bi.py)."""

    attention: Literal["bidirectional", "causal"] = key("bidirectional", "mask of the encoder")
    layers: Layers = key(
        "all", "bidirectional layers: all, none, {from: N}, {every: K, from: N}, or a list"
    )
    keep_sink: bool = key(
        False, "the first token of each text sees itself alone in these layers, as a causal one"
    )
    form: Form | None = key(
        None,
        "a prompt and its pooling by name: plain (no prompt, mean), eol (PromptEOL, last), echo "
        "(the text twice, the mean of the second copy), paper; null: what prompt and pooling say",
    )
    prompt: str | None = key(PROMPT, "every text stands in it, at {text}; null: the text alone")
    pooling: Pooled = key(
        "mean", "of the last states: all tokens, all by their position (for causal), or the last"
    )
    prompt_in_mean: bool = key(
        True, "false: the mean is of the text's own tokens; for prompts that end in {text}"
    )
    instructions: dict[str, str] = score_key(
        {},
        "what stands right before a text, in the prompt, by mteb's task, its type (STS), query or "
        "document; saved as the encoder's prompts, and given to one that is evaluated",
    )
    max_tokens: Positive = key(512, "the saved encoder cuts longer texts here", "tokens")
    whiten: WhitenSection | None = key(
        None, "what is done to the vectors after training; null: nothing"
    )
    stages: list[StageSection] = key([], "run in order; none: the untouched base is scored")

    @model_validator(mode="before")
    @classmethod
    def _has_what_its_form_has(cls, given: Any) -> Any:
        form = given.get("form") if isinstance(given, dict) else None
        if not isinstance(form, str) or form not in FORMS:
            return given
        return dict(zip(("prompt", "pooling"), FORMS[form], strict=True)) | given

    @field_validator("prompt")
    @classmethod
    def _holds_the_text(cls, prompt: str | None) -> str | None:
        if prompt not in (None, ECHO) and prompt.count("{text}") != 1:
            raise ValueError("expected {text} once, as in " + PROMPT)
        return prompt

    @model_validator(mode="after")
    def _is_of_its_form(self) -> "BiSection":
        if self.form is None and self.prompt == ECHO:
            raise ValueError("the prompt reads the text twice; expected form: echo, without prompt")
        if self.form is not None and self.prompt != FORMS[self.form][0]:
            raise ValueError(
                f"form {self.form} has a prompt of its own; expected no other beside it, or form: "
                "null"
            )
        return self

    @property
    def bidirectional(self) -> bool:
        """Whether any layer is bidirectional."""
        return self.attention == "bidirectional" and self.layers != "none"

    @property
    def mask(self) -> tuple[bool, Layers, bool]:
        """The mask of a model to load: bidirectional or not, in which layers, sink kept or not."""
        return self.bidirectional, self.layers, self.keep_sink

    @model_validator(mode="after")
    def _layers_look(self) -> "BiSection":
        if self.keep_sink and not self.bidirectional:
            raise ValueError(
                "keep_sink is for bidirectional layers, and there are none; expected false"
            )
        if self.attention == "causal" and self.layers not in ("all", "none"):
            raise ValueError("attention causal has no bidirectional layers; expected none")
        return self

    @model_validator(mode="after")
    def _out_of_the_mean(self) -> "BiSection":
        ends = self.prompt is not None and self.prompt.endswith("{text}")
        ends = ends and self.form != "echo"  # whose prompt is never in the mean
        if not self.prompt_in_mean and not (ends and self.pooling == "mean"):
            raise ValueError(
                "prompt_in_mean false is for pooling mean and a prompt that ends in {text}; "
                "expected prompt_in_mean: true"
            )
        return self


Route = Literal["learned", "uni", "bi", "half", "average", "mode"]


class MoeSection(TrainingSection):
    """The mixture of the uni and the bi FFN (train_ubmoe.py)."""

    per_device_train_batch_size: Positive = key(16, "chats of a step on one device", "rows")
    learning_rate: Above = key(1e-3, "peak learning rate; so few weights need a high one")
    bi: str | None = key(None, "directory of the tuned encoder; null: <output_dir>/bi")
    top_k: Literal[2, 1] = key(2, "experts of a token: both, weighted, or the likelier alone")
    norm_topk_prob: bool = key(False, "renormalise the weights; for scoring at top_k 1")
    router_init: Literal["zeros", "normal", "uni"] = key(
        "zeros", "zeros: half of each; normal: N(0, initializer_range); uni: fitted to prefer uni"
    )
    router_aux_loss_coef: Annotated[Float, Field(ge=0)] = key(0.0, "of the load-balancing loss")
    objective: Literal["chat", "both"] = key(
        "chat", "chat: answers, causal (the paper's); both: the encoder's vectors of sentences, too"
    )
    sentences: str = key("tiny", "sentences for objective both: hub id, local file, or tiny")
    embedding_weight: Above = key(1.0, "of 1 - cosine from the encoder's vectors, beside the loss")
    dataset: str = key("tiny", "chats: hub id[:config[:split]], local .json/.jsonl/..., or tiny")
    max_rows: Positive | None = key(None, "use at most this many, evenly spaced; null: all", "rows")
    held_out: Positive = key(200, "chats kept out of training, for perplexity", "chats")
    max_tokens: Positive = key(1024, "longer chats are cut, and counted", "tokens")
    route: Route = score_key("learned", "who decides in the result: the routers, or a forced route")
    routes: list[Route] = score_key(
        ["learned"], "further routes that are scored beside it, as half, average, uni, bi"
    )
    export: list[Literal["mixture", "modes", "adapter"]] = score_key(
        ["mixture", "modes"],
        "saved to <output_dir>/ubmoe, /modes and /adapter; [adapter] alone trains no router",
    )
    rank: Rank = score_key(16, "of the adapters of export: adapter")

    @property
    def mixes(self) -> bool:
        """Whether a mixture is made, with routers to train: an adapter alone needs none."""
        return self.export != ["adapter"]

    @model_validator(mode="after")
    def _routers_can_learn(self) -> "MoeSection":
        if self.max_steps == 0:
            return self
        if self.top_k == 1 and self.norm_topk_prob:
            raise ValueError(
                "norm_topk_prob makes the one weight of top_k 1 always 1, so the routers get no "
                "gradient; expected norm_topk_prob: false, or max_steps: 0 to score only"
            )
        if self.top_k == 1 and self.router_init != "uni":
            raise ValueError(
                "top_k 1 scales an FFN by its router's weight, and a router that starts undecided "
                "would halve it; expected router_init: uni"
            )
        if self.objective == "both" and self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing would recompute the sentences under the mask of the "
                "chats; expected false with objective: both"
            )
        if self.top_k == 2 and self.router_aux_loss_coef:
            raise ValueError(
                "router_aux_loss_coef is constant where every token has both experts; expected 0 "
                "at top_k 2"
            )
        return self


QUESTION = "Question: {prompt}\n\nAnswer:"  # Bitune's
TASKS_OF_BITUNE = [
    *("piqa", "arc_challenge", "commonsense_qa", "social_iqa", "mmlu", "gsm8k"),
]


class BituneSection(TrainingSection):
    """Bitune: two readings of the prompt, mixed (python -m ubmoe.bitune); the paper's defaults."""

    per_device_train_batch_size: Positive = key(
        10, "examples of a step on one device, of like lengths", "examples"
    )
    learning_rate: Above = key(3e-4, "peak learning rate, of the adapters and of theta")
    warmup_steps: Annotated[Float, Field(ge=0)] = key(
        0.1, "linear warm-up; below 1 it is a share of all steps", "steps"
    )
    variant: Literal[
        "full", "naive", "no_mixing", "only_causal", "shared_weights", "anticausal", "lora"
    ] = key("full", "the method, one of the paper's ablations, or lora: the baseline")
    adapter: Literal["lora", "dora", "ia3"] = key("lora", "kind of the adapters")
    rank: Rank = key(8, "of lora and dora")
    alpha: Above = key(1.0, "of lora and dora; their scale is alpha / rank")
    layers: Layers = key("all", "as bi.layers: those in which the second reading is bidirectional")
    keep_sink: bool = key(False, "as bi.keep_sink, of the second reading")
    theta_init: Above = key(0.01, "start of theta; the mixing starts at one half whatever it is")
    dataset: str = key("tiny", "chats: hub id[:config[:split]], local .json/.jsonl/..., or tiny")
    template: str | None = key(
        QUESTION, "a user's turn stands in it, at {prompt}; null: the model's chat template"
    )
    max_rows: Positive | None = key(None, "use at most this many, evenly spaced; null: all", "rows")
    max_tokens: Positive = key(
        512,
        "examples that are longer are dropped, and counted: their answers have no end",
        "tokens",
    )
    held_out: Positive = key(200, "chats kept out of training, for perplexity", "chats")
    generation: list[str] = score_key(
        TASKS_OF_BITUNE, "as evaluation.generation, for this program alone"
    )

    @field_validator("template")
    @classmethod
    def _holds_the_prompt(cls, template: str | None) -> str | None:
        if template is not None and template.count("{prompt}") != 1:
            raise ValueError(f"expected {{prompt}} once, as in {QUESTION!r}")
        return template

    @model_validator(mode="after")
    def _keeps_the_cache(self) -> "BituneSection":
        if self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing drops the caches that Bitune mixes; expected false"
            )
        return self


class ProbedModel(Section):
    """One of the models whose word vectors are compared."""

    label: str = score_key("", "its name in tables and figures; empty: name, attention and route")
    name: str = score_key(..., "hub id, local directory, or tiny")
    attention: Literal["causal", "bidirectional"] | None = score_key(
        None, "mask that it reads with; null: its adapter's, or that of its config.json"
    )
    route: Route | None = score_key(None, "of a mixture: who decides")
    revision: str | None = score_key(None, "as model.revision")
    adapter: str | list[str] | None = score_key(None, "as model.adapter")


Probed = Literal["context", "aspect", "concreteness", "sensorimotor", "wic"]


class ProbingSection(Section):
    """Word-level probing (python -m ubmoe.probing), after Feng et al."""

    models: list[ProbedModel] = score_key(
        [], "models to compare, with the first one; empty: model.name under both masks"
    )
    data: str = score_key("tiny", "folder that holds the five tasks' folders, or tiny")
    tasks: Annotated[list[Probed], Some] = score_key(
        ["context", "aspect", "concreteness", "sensorimotor", "wic"], "which of the five"
    )
    positions: Annotated[list[Literal["same", "previous"]], Some] = score_key(
        ["same", "previous"],
        "a word's own tokens, or the ones before, which mntp predicts from; tables and controls "
        "are of the first one",
    )
    layers: Annotated[list[int] | None, Some] = score_key(
        [-1], "layers that are probed, -1: the last; null: all; tables show the first one"
    )
    probes: Annotated[list[Literal["linear", "ridge", "mlp"]], Some] = score_key(
        ["linear", "mlp"], "kinds; ridge where features are about as many as items, or more"
    )
    seeds: Annotated[list[Seed], Some] = score_key([0, 1, 2], "of the splits and of the MLPs")
    jobs: Positive | None = running_key(None, "tasks that are probed at once; null: one a core")
    controls: bool = score_key(True, "also probe random labels, and words without their sentence")
    max_tokens: Positive = score_key(
        512, "longer sentences are cut; words behind are counted", "tokens"
    )
    batch_tokens: Positive = running_key(8192, "padded tokens of one forward", "tokens")


FirstToken = Literal["full", "kept", "removed"]


class ScanSection(Section):
    """Which layers may be bidirectional, in which form, untrained (python -m ubmoe.scan)."""

    pairs: str = score_key(
        "tiny",
        "pairs to compare on: an mteb STS task, a file as evaluation.sts, or tiny",
    )
    max_pairs: Annotated[int, Field(ge=3)] | None = score_key(
        500, "use at most this many, evenly spaced; null: all", "pairs"
    )
    patterns: list[Literal["from", "to", "only", "every"]] = score_key(
        ["from", "to", "every"],
        "beside all and none: all layers from each one on, up to each one, each one alone, every "
        "second and so on",
    )
    every: Annotated[int, Field(ge=2)] = score_key(4, "the largest step of every", "layers")
    layers: list[Layers] = score_key([], "further patterns, each as bi.layers")
    first_token: list[FirstToken] = score_key(
        [],
        "how bidirectional patterns read the first token: full (it sees all), kept (it sees itself "
        "alone, as with bi.keep_sink) or removed (no other token sees it); empty: as bi says",
    )
    forms: list[Form] = score_key(
        [], "forms that the texts are read in, as bi.form; empty: in that of bi alone"
    )
    centre: bool = score_key(
        False,
        "also score the vectors without their mean and their first principal component, both of "
        "these very texts; all vectors are then in memory, and in what an interrupted scan leaves",
    )
    batch_tokens: Positive = running_key(4096, "padded tokens of one forward", "tokens")


class SwapSection(Section):
    """Which layers' tuning costs the language model (python -m ubmoe.swap)."""

    max_chats: Positive | None = score_key(
        50, "use at most this many of ubmoe.held_out, evenly spaced; null: all", "chats"
    )
    batch_tokens: Positive = running_key(4096, "padded tokens of one forward", "tokens")


class ShiftSection(Section):
    """Whether the attention sink's fall costs the language model (python -m ubmoe.shift)."""

    max_chats: Positive | None = score_key(
        100, "use at most this many of ubmoe.held_out, evenly spaced; null: all", "chats"
    )
    matched: Positive = score_key(
        50, "the first token's shares are matched over so many of these, evenly spaced", "chats"
    )


# BIOSSES ... STSBenchmark: the ten of the paper's Table 2, in mteb's first versions.
TABLE2 = [
    *("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STS22"),
    "STSBenchmark",
]


TABLE4 = ["mmlu", "winogrande", "truthfulqa_mc2"]  # of the paper


class EvaluationSection(Section):
    """Scoring (inside the training scripts, and python -m ubmoe.evaluate)."""

    sts: list[str] = score_key(
        TABLE2,
        "mteb's STS tasks, local files (columns score, sentence1, sentence2), tiny, or a benchmark "
        "of mteb for its STS tasks; eng: those of MTEB(eng, v2)",
    )
    mteb: list[str] = score_key(
        [],
        "python -m ubmoe.evaluate: mteb's tasks of any type, or benchmarks; eng: MTEB(eng, v2)",
    )
    generation: list[str] = score_key(
        TABLE4, "lm-eval task names, task YAMLs, or tiny (our own, of the embedded language)"
    )
    data: str = score_key(
        "",
        "folder of local benchmark files, {data} in the task YAMLs of configs/tasks/",
    )
    language_model: bool = score_key(
        False, "python -m ubmoe.evaluate: also score the model as a causal language model"
    )
    perplexity: list[str] = score_key(
        [], "with it, further chats whose answers' perplexity is scored; as many as ubmoe.held_out"
    )
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = score_key(
        None, "shots of every generation task; null: the task's own", "examples"
    )
    limit: Positive | None = score_key(None, "score at most this many examples a task", "examples")
    apply_chat_template: bool = score_key(
        False, "generation tasks as chats; likelihood tasks want none"
    )
    batch_size: Positive = running_key(64, "texts of one forward", "texts")
    bf16: Bf16 = score_key("auto", "score under bfloat16 autocast; auto: where it pays")


Table2Row = Literal[
    "base",
    "ffn",
    "attention",
    "embedding",
    "ffn+attention",
    "ffn+embedding",
    "attention+embedding",
    "all",
    "ffn causal",
]


Measured = Literal["dependence", "evaluation", "scan", "swap", "shift", "probing"]


class RowSection(Section):
    """A row of a study of one's own."""

    name: Annotated[str, Field(min_length=1)] = running_key(..., "what tables call it")
    program: Literal["train_bi", "train_ubmoe", "bitune"] = running_key("train_bi", "what runs")
    of: str | None = running_key(None, "the row whose encoder train_ubmoe joins to the model")
    keys: list[str] = running_key([], "key=value of its runs, as on their command lines")
    seeds: list[Seed] | None = running_key(None, "of this row; null: results.seeds")
    measured: list[Measured] | None = running_key(
        None, "of its model, beside STS; null: what results.table shows"
    )


StudyRow = Annotated[
    Annotated[Table2Row, Tag("word")] | Annotated[RowSection, Tag("row")],
    Discriminator(lambda given: "row" if isinstance(given, dict | RowSection) else "word"),
]


class ResultsSection(Section):
    """Recorded runs, and the study of the paper's tables (python -m ubmoe.results)."""

    table: Literal[2, 3, 4, "all"] | None = running_key(
        None, "of the paper: 2 STS, 3 dependence, 4 generation; null: `table` shows the run's own"
    )
    row: str = running_key("", "what tables call this run; empty: what it trained")
    seeds: Annotated[list[Seed], Some] = running_key([0, 1, 2], "of the study's runs")
    rows: Annotated[list[StudyRow], Some] = running_key(
        list(get_args(Table2Row)),
        "of the study: what is trained (ffn causal is a control), or rows of your own",
    )
    keep_models: bool = running_key(
        True, "run: false removes a model once no run that is missing reads it"
    )
    timed_steps: Positive | None = running_key(
        None, "plan: run this many steps of each row to estimate its hours and memory; null: none"
    )
    directory: str = running_key(
        "results",
        "folder of the recorded runs; behind a checkout's own `results`: those in studies/, too",
    )


class TrajectorySection(Section):
    """An encoder scored while it trains (train_bi.py): similarity gained, language lost."""

    steps: list[Positive] = score_key(
        [],
        "score the encoder before each contrastive stage and after so many of its steps; "
        "none: not at all",
        "steps",
    )
    sts: list[str] = score_key(["tiny"], "as evaluation.sts")
    perplexity: list[str] = score_key(
        [], "chats (the loss of their answers) or texts (of every token), read causally"
    )
    max_texts: Positive | None = score_key(
        100, "of each of them, evenly spaced; a text is a chunk of max_tokens", "texts"
    )
    max_tokens: Positive = score_key(512, "longer chats are cut", "tokens")
    dependence: bool = score_key(False, "also measure attention dependence, as `dependence` says")


class HubSection(Section):
    """Where models go when a run ends, and what their cards say."""

    push: str | None = running_key(
        None,
        "org/name on the hub: bi/ is put there, and modes/, adapter/ and ubmoe/ to org/name-modes "
        "and so on; null: nowhere",
    )
    private: bool = running_key(True, "a repository that is made is private")
    license: str | None = running_key(
        None, "of the base model, for the cards; null: what the card of a local model says"
    )
    language: list[str] = running_key(["en"], "of the texts, for the cards")

    @field_validator("push")
    @classmethod
    def _is_a_repository(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            raise ValueError("expected org/name")
        return name


class Config(Section):
    """Every key of every program."""

    output_dir: str = running_key("", "where a run writes; default runs/<name of the config file>")
    seed: Seed = key(42, "seed of whatever a run draws")
    resume: Literal["never", "auto"] = running_key(
        "never", "auto: go on from what an interrupted run left in output_dir"
    )
    distributed: Literal["ddp", "fsdp2"] = running_key(
        "ddp",
        "how several processes share what trains: each has all of it (ddp), or a part of the "
        "weights, gradients and optimiser state (fsdp2; adapters stay whole)",
    )
    dry_run: bool | Positive = running_key(
        False,
        "of the three scripts and bitune: say parameters, steps, memory and files, and run "
        "nothing; a number: on each of so many devices",
    )
    model: ModelSection = key(ModelSection(), "")
    data: DataSection = key(DataSection(), "")
    dependence: DependenceSection = key(DependenceSection(), "")
    bi: BiSection = key(BiSection(), "")
    ubmoe: MoeSection = key(MoeSection(), "")
    bitune: BituneSection = key(BituneSection(), "")
    probing: ProbingSection = key(ProbingSection(), "")
    scan: ScanSection = key(ScanSection(), "")
    swap: SwapSection = key(SwapSection(), "")
    shift: ShiftSection = key(ShiftSection(), "")
    trajectory: TrajectorySection = key(TrajectorySection(), "")
    evaluation: EvaluationSection = key(EvaluationSection(), "")
    results: ResultsSection = key(ResultsSection(), "")
    hub: HubSection = key(HubSection(), "")


# --- every key ------------------------------------------------------------------------------------


def section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _inner(field: FieldInfo) -> tuple[type[Section] | None, str]:
    """The section inside a list of sections or an optional one, and how its keys are reached."""
    for kind in _parts(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind, "" if type(None) in get_args(field.annotation) else "N."
    return None, ""


def _parts(kind: Any) -> Iterator[Any]:
    """The item type of a list type, through unions."""
    for part in get_args(kind):
        yield part
        yield from _parts(part)


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in the order of the tree; N numbers an item."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield prefix + name, field
            item, step = _inner(field)
            if item is not None:
                yield from keys(item, f"{prefix}{name}.{step}")
        else:
            yield from keys(inner, f"{prefix}{name}.")


def affects(field: FieldInfo) -> Affects:
    """What a key can change, as declared at the key."""
    return field.json_schema_extra["affects"]  # type: ignore[index, return-value]


def numbered(name: str) -> str:
    """A dotted name with N in place of the numbers of list items, as the schema says it."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name, flags=re.ASCII)
