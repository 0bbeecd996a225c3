"""The whole configuration: one strict tree, read from YAML and `key=value`, printed by --help.

Nothing heavy is imported here, so that --help and every complaint about a key come before torch is
loaded.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

DEFAULT_CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny.yaml"


class UserError(ValueError):
    """Something the user can mend, said in one line: what, where, and what would be right."""


def _exponent_float(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text; everybody means the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


Float = Annotated[float, BeforeValidator(_exponent_float)]
Positive = Annotated[int, Field(ge=1)]


def key(default: Any, meaning: str, unit: str = "") -> Any:
    """A key of the schema: its default, its meaning, and its unit where it has one."""
    if isinstance(default, list | dict):
        return Field(
            default_factory=lambda: type(default)(default),
            description=meaning,
            json_schema_extra={"unit": unit},
        )
    return Field(default, description=meaning, json_schema_extra={"unit": unit})


def _not_empty(value: Any) -> Any:
    if value == []:
        raise ValueError("expected one at least")
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """Which model, and how it is loaded."""

    name: str = key("tiny", "hub id, local directory, or the word tiny (the embedded model)")
    revision: str | None = key(None, "branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "dtype of the loaded weights")
    device: str | None = key(None, "cpu, cuda, cuda:1, mps, ...; null: the best there is")
    attn_implementation: (
        Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None
    ) = key(None, "attention backend; null: the model's own default")
    adapter: str | None = key(None, "directory of a LoRA adapter, merged on load")
    cache: str | None = key(
        None, "folder for the embedded model; null: UBMOE_CACHE or the user's cache folder"
    )


class DependenceSection(Section):
    """Attention dependence DP (calculate_dp.py)."""

    dataset: str = key(
        "tiny",
        "chats or texts: hub id[:config[:split]], local .json/.jsonl/.csv/.tsv/.txt, or tiny",
    )
    chat_template: str | None = key(
        None, "Jinja file or string for a tokenizer that has no chat template"
    )
    max_texts: Positive | None = key(
        1000, "measure at most this many, spaced evenly over the data; null: all", "texts"
    )
    max_tokens: Positive = key(
        2048, "cut longer texts here (or at the model's context), and count them", "tokens"
    )
    buckets: list[int] = key(
        [0, 256, 512, 1024, 2048], "edges; a text of length T is in (low, high]", "tokens"
    )
    flow: Literal["causal", "bidirectional"] = key(
        "causal", "mask of the states; the observation is always unmasked"
    )
    batch_tokens: Positive = key(
        8192, "padded tokens of one forward; a longer text goes alone", "tokens"
    )

    @field_validator("buckets")
    @classmethod
    def _ascend(cls, edges: list[int]) -> list[int]:
        if len(edges) < 2 or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError("expected at least two ascending edges from 0 up, as [0, 256, 512]")
        return edges


Share = Annotated[Float, Field(ge=0, lt=1)]
Above = Annotated[Float, Field(gt=0)]
Module = Literal["ffn", "attention", "embedding", "all", "ffn_up_down"]
PROMPT = 'The representative word for sentence {text} is:"'  # the paper's, its quote included


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
    weight_decay: Annotated[Float, Field(ge=0)] = key(0.0, "of AdamW")
    adam_beta1: Share = key(0.9, "of AdamW")
    adam_beta2: Share = key(0.999, "of AdamW")
    adam_epsilon: Above = key(1e-8, "of AdamW (the paper's code has 1e-3)")
    max_grad_norm: Above = key(1.0, "gradients are clipped at this norm")
    bf16: bool = key(False, "autocast to bfloat16 over float32 master weights")
    activation_checkpointing: bool = key(
        False, "recompute activations: less memory, a third slower"
    )
    logging_steps: Positive = key(10, "between two rows of the log", "steps")
    save_steps: Positive = key(200, "between two checkpoints", "steps")
    save_total_limit: Positive = key(2, "checkpoints kept")
    report_to: str = key("none", "none, wandb, tensorboard, ...")

    def steps(self, rows: int) -> int:
        """Optimiser steps over `rows` rows on one device; the last batch of an epoch is dropped."""
        if self.max_steps >= 0:
            return self.max_steps
        return math.ceil(rows // self.per_device_train_batch_size * self.num_train_epochs)


class LoraSection(Section):
    """Low-rank adapters in place of full fine-tuning; the defaults are the paper's code's."""

    rank: Positive = key(8, "rank of the adapters")
    alpha: Above = key(16.0, "their scale is alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: Share = key(0.05, "dropout in front of the adapters")
    rslora: bool = key(True, "rank-stabilised scale")


class StageSection(TrainingSection):
    """One stage of bidirectional fine-tuning.

    Keys of the contrastive objectives mean nothing to mntp, and the other way round.
    """

    objective: Literal["simcse", "supervised", "mntp"] = key("simcse", "what the stage learns")
    train: list[Module] = key(["ffn"], "modules that train; everything else is frozen")
    lora: LoraSection | None = key(None, "null: the modules themselves train; else their adapters")
    dataset: str = key(
        "tiny",
        "sentences, (anchor, positive[, negative]) rows, or raw text (mntp): hub id, local file, "
        "or tiny",
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
    mini_batch_tokens: Positive = key(
        2048, "most padded tokens of one forward; the batch is sorted by length into such", "tokens"
    )
    cached: bool = key(False, "GradCache: memory of one mini-batch, for one more forward")
    mlm_probability: Annotated[Float, Field(gt=0, le=1)] = key(
        0.2, "share of tokens that mntp chooses, anew in every epoch"
    )
    masking: Literal["bert", "all"] = key(
        "bert", "bert: 80 % masked, 10 % random, 10 % as they were; all: every chosen one masked"
    )
    mask_token: str = key("_", "what stands for a masked token: one token of the vocabulary")

    @model_validator(mode="before")
    @classmethod
    def _of_the_objective(cls, said: Any) -> Any:
        if isinstance(said, dict) and said.get("objective") == "mntp":
            return MNTP | said
        return said

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


class BiSection(Section):
    """Bidirectional fine-tuning (train_bi.py)."""

    attention: Literal["bidirectional", "causal"] = key("bidirectional", "mask of the encoder")
    prompt: str | None = key(PROMPT, "every text stands in it, at {text}; null: the text alone")
    pooling: Literal["mean", "last"] = key("mean", "of the last states: all tokens, or the last")
    prompt_in_mean: bool = key(
        True, "false: the mean is of the text's own tokens; for prompts that end in {text}"
    )
    max_tokens: Positive = key(512, "the saved encoder cuts longer texts here", "tokens")
    stages: list[StageSection] = key([], "run in order; none: the untouched base is scored")

    @field_validator("prompt")
    @classmethod
    def _holds_the_text(cls, prompt: str | None) -> str | None:
        if prompt is not None and prompt.count("{text}") != 1:
            raise ValueError("expected {text} once, as in " + PROMPT)
        return prompt

    @model_validator(mode="after")
    def _out_of_the_mean(self) -> "BiSection":
        ends = self.prompt is not None and self.prompt.endswith("{text}")
        if not self.prompt_in_mean and not (ends and self.pooling == "mean"):
            raise ValueError(
                "prompt_in_mean false is for pooling mean and a prompt that ends in {text}; "
                "expected prompt_in_mean: true"
            )
        return self


Route = Literal["learned", "uni", "bi", "half", "average", "mode"]


class MixtureSection(TrainingSection):
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
    route: Route = key("learned", "who decides in the result: the routers, or a forced route")
    routes: list[Route] = key(
        ["learned"], "further routes that are scored beside it, as half, average, uni, bi"
    )
    export: list[Literal["mixture", "modes"]] = key(
        ["mixture", "modes"], "what is saved: to <output_dir>/ubmoe, and to <output_dir>/modes"
    )

    @model_validator(mode="after")
    def _routers_can_learn(self) -> "MixtureSection":
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
    rank: Positive = key(8, "of lora and dora")
    alpha: Above = key(1.0, "of lora and dora; their scale is alpha / rank")
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
    generation: list[str] = key(TASKS_OF_BITUNE, "as evaluation.generation, for this program alone")

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

    label: str = key("", "its name in tables and figures; empty: name, attention and route")
    name: str = key(..., "hub id, local directory, or tiny")
    attention: Literal["causal", "bidirectional"] | None = key(
        None, "mask that it reads with; null: the one that its config.json names"
    )
    route: Route | None = key(None, "of a mixture: who decides")
    revision: str | None = key(None, "as model.revision")
    adapter: str | None = key(None, "as model.adapter")


Probed = Literal["context", "aspect", "concreteness", "sensorimotor", "wic"]


class ProbingSection(Section):
    """What word vectors know (python -m ubmoe.probing), after Feng et al."""

    models: list[ProbedModel] = key(
        [], "models to compare, with the first one; empty: model.name under both masks"
    )
    data: str = key("tiny", "folder that holds the five tasks' folders, or tiny")
    tasks: list[Probed] = key(
        ["context", "aspect", "concreteness", "sensorimotor", "wic"], "which of the five"
    )
    positions: list[Literal["same", "previous"]] = key(
        ["same", "previous"],
        "a word's own tokens, or the ones before, which mntp predicts from; tables and controls "
        "are of the first one",
    )
    layers: list[int] | None = key(
        [-1], "layers that are probed, -1: the last; null: all; tables show the first one"
    )
    probes: list[Literal["linear", "mlp"]] = key(["linear", "mlp"], "kinds of probes")
    seeds: list[int] = key([0, 1, 2], "of the splits and of the MLPs")
    jobs: Positive | None = key(None, "tasks that are probed at once; null: one a core")
    controls: bool = key(True, "also probe random labels, and words without their sentence")
    max_tokens: Positive = key(512, "longer sentences are cut; words behind are counted", "tokens")
    batch_tokens: Positive = key(8192, "padded tokens of one forward", "tokens")

    @field_validator("tasks", "positions", "layers", "probes", "seeds")
    @classmethod
    def _is_not_empty(cls, value: list[Any] | None) -> list[Any] | None:
        return _not_empty(value)


# BIOSSES ... STSBenchmark: the ten of the paper's Table 2, in mteb's first versions.
TABLE2 = [
    *("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STS22"),
    "STSBenchmark",
]


TABLE4 = ["mmlu", "winogrande", "truthfulqa_mc2"]  # of the paper


class EvaluationSection(Section):
    """Scoring (inside the training scripts, and python -m ubmoe.evaluate)."""

    sts: list[str] = key(
        TABLE2, "mteb task names, local STS files (.tsv: score sentence1 sentence2), or tiny"
    )
    generation: list[str] = key(
        TABLE4, "lm-eval task names, task YAMLs, or tiny (our own, of the embedded language)"
    )
    language_model: bool = key(
        False, "python -m ubmoe.evaluate: also score the model as a causal language model"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = key(
        None, "shots of every generation task; null: the task's own", "examples"
    )
    limit: Positive | None = key(None, "score at most this many examples a task", "examples")
    apply_chat_template: bool = key(False, "generation tasks as chats; likelihood tasks want none")
    batch_size: Positive = key(64, "texts of one forward", "texts")


Row = Literal[
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


class ResultsSection(Section):
    """Recorded runs, and the study of the paper's tables (python -m ubmoe.results)."""

    action: Literal["plan", "run", "table", "figure", "record", "readme", "prefetch"] = key(
        "table",
        "plan: print the study's runs as commands; run: run and record what is not there yet; "
        "table and figure: show it; record: copy the results of output_dir to the records; readme: "
        "renew README.md's tables; prefetch: download what the config names",
    )
    table: Literal[2, 3, 4, "all"] | None = key(
        None, "of the paper: 2 STS, 3 dependence, 4 generation; null, of table: the run's own"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = key([0, 1, 2], "of the study's runs")
    rows: list[Row] = key(list(get_args(Row)), "what is trained; ffn causal is a control")
    timed_steps: Positive | None = key(
        None, "plan: run this many steps of each row to estimate its hours and memory; null: none"
    )
    directory: str = key("results", "folder of the recorded runs")

    @field_validator("seeds", "rows")
    @classmethod
    def _is_not_empty(cls, value: list[Any]) -> list[Any]:
        return _not_empty(value)


class Config(Section):
    """Every key of every program."""

    output_dir: str = key("", "where a run writes; default runs/<name of the config file>")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(42, "seed of whatever a run draws")
    resume: Literal["never", "auto"] = key(
        "never", "auto: go on from what an interrupted run left in output_dir"
    )
    dry_run: bool = key(
        False,
        "of the three scripts alone: say parameters, steps, memory and files, and run nothing",
    )
    model: ModelSection = key(ModelSection(), "")
    dependence: DependenceSection = key(DependenceSection(), "")
    bi: BiSection = key(BiSection(), "")
    ubmoe: MixtureSection = key(MixtureSection(), "")
    bitune: BituneSection = key(BituneSection(), "")
    probing: ProbingSection = key(ProbingSection(), "")
    evaluation: EvaluationSection = key(EvaluationSection(), "")
    results: ResultsSection = key(ResultsSection(), "")


# --- what results depend on -----------------------------------------------------------------------

FORM = tuple(f"bi.{name}" for name in BiSection.model_fields if name != "stages")
CHATS = tuple(f"ubmoe.{name}" for name in ("dataset", "max_rows", "held_out", "max_tokens"))
ASKED = tuple(f"evaluation.{name}" for name in ("num_fewshot", "limit", "apply_chat_template"))
# Sections and keys of how a model is scored, by the result that says it; and of how it was made.
SCORED = {
    "evaluation": ("model", *FORM, "evaluation", *CHATS),
    "generation": ("model", *FORM, "evaluation", *CHATS),
    "sts": ("model", *FORM, "evaluation.sts"),
    "dependence": ("model", "dependence"),
    "bitune": ("model", "bitune", *ASKED),
}
MADE = {"sts": ("model", *FORM, "bi.stages"), "generation": ("model", "ubmoe")}
WATCHING = {"save_steps", "save_total_limit", "logging_steps", "report_to"}
# Keys that change nothing of what is trained: an interrupted run goes on whatever they are now.
WITHOUT_EFFECT = WATCHING | {"route", "routes", "export", "generation"}
# Keys that change no number of a result.
ASIDE = WATCHING | {"device", "cache", "batch_size"}
MISSING = object()


def leaves(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{dotted key: value as text} below some sections and keys of a dumped configuration.

    0.0 is 0; what is in no number (`ASIDE`) is left out, and so is what the configuration lacks.
    """
    found: dict[str, str] = {}
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
        found |= {} if value is MISSING else _leaves(value, name)
    return found


def _leaves(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(place): each for place, each in enumerate(value)}
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for part, each in value.items():
            if part not in ASIDE:
                found |= _leaves(each, f"{name}.{part}")
        return found
    whole = isinstance(value, float) and value.is_integer()
    return {name: json.dumps(int(value) if whole else value)}


# --- reading --------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} twice", key_node.start_mark
                )
            seen.add(name if isinstance(name, str) else id(key_node))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and `key=value` overrides into one frozen, resolved configuration.

    Raises UserError, in one line, with every problem of the file (or else of the command line).
    """
    path = Path(path or DEFAULT_CONFIG)
    tree = _read_yaml(path)
    config = _validated(tree, str(path))
    problems = [problem for text in overrides or [] if (problem := _override(tree, text))]
    if problems:
        raise UserError("command line: " + "; ".join(problems))
    config = _validated(tree, "command line")
    if config.output_dir:
        return config
    return config.model_copy(update={"output_dir": f"runs/{path.stem}"})


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected a YAML file such as "
            f"{DEFAULT_CONFIG.name}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); expected a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(tree, dict | None):
        raise UserError(
            f"{path}: got {type(tree).__name__}, expected sections such as model: and dependence:"
        )
    sections = {name for name, field in Config.model_fields.items() if _section(field)}
    # A section whose keys are all commented out reads as null and means: the defaults.
    return {
        name: {} if value is None and name in sections else value
        for name, value in (tree or {}).items()
    }


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Set one dotted `key=value` in the file's tree; return what is wrong with it, if anything.

    The tree holds only what was said, so that what was not keeps the default of its stage.
    """
    name, equals, raw = text.partition("=")
    if not equals or name.startswith("-"):
        return f"{text!r} is not key=value, such as dependence.max_texts=100"
    try:
        value = yaml.load(raw, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError):
        value = raw  # a Jinja template is no YAML
    *parents, last = name.split(".")
    known = _names()
    node: Any = tree
    default: Any = Config().model_dump()
    shape = re.sub(r"\.\d+(?=\.|$)", ".N", name, flags=re.ASCII)
    for part in parents:
        default = default.get(part) if isinstance(default, dict) else None
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = default if isinstance(default, list) else {}
        slot = _slot(node, part)
        node = None if slot is None else node[slot]
    slot = _slot(node, last) if isinstance(node, list) else last
    if slot is None or node is None or shape.removesuffix(".N") not in known:
        return f"{name}: unknown key; {_nearest(name)}"
    node[slot] = value
    return None


def _names() -> set[str]:
    """Every dotted name: of sections, of keys, and of the keys of a list's items."""
    names = [dotted.split(".") for dotted, _ in keys()]
    return {".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)}


def _slot(node: Any, part: str) -> str | int | None:
    """Where `part` of a dotted name stands in a mapping or a list; None where there is no place."""
    if isinstance(node, list) and part.isdecimal() and part.isascii() and int(part) < len(node):
        return int(part)
    return part if isinstance(node, dict) and part in node else None


def _validated(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{source}: " + "; ".join(_problem(dict(each)) for each in error.errors())
        ) from None


def _problem(error: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_nearest(name)}"
    expected = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "model_type":
        expected = "expected a section of keys"
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return f"{name}: {expected}"  # of keys that do not go together
    return f"{name}: got {error['input']!r}, {expected}"


def _nearest(name: str) -> str:
    known = [dotted for dotted, _ in keys()]
    close = get_close_matches(name, known, 1, 0.75) if "." in name else []
    if not close:
        lasts = {dotted.rpartition(".")[2] for dotted in known}
        found = get_close_matches(name.rpartition(".")[2], sorted(lasts), 1, 0.6)
        close = [dotted for dotted in known if dotted.rpartition(".")[2] in found]
    return f"did you mean {' or '.join(close)}?" if close else "see --help for all keys"


# --- help -----------------------------------------------------------------------------------------


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _inner(field: FieldInfo) -> tuple[type[Section] | None, str]:
    """The section inside a list of sections or an optional one, and how its keys are reached."""
    for kind in get_args(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind, "" if type(None) in get_args(field.annotation) else "N."
    return None, ""


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in the order of the tree; N numbers an item."""
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is None:
            yield prefix + name, field
            item, step = _inner(field)
            if item is not None:
                yield from keys(item, f"{prefix}{name}.{step}")
        else:
            yield from keys(inner, f"{prefix}{name}.")


def _kind(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if args := get_args(annotation):
        if getattr(annotation, "__origin__", None) is list:
            return f"list of {_kind(args[0])}".replace("section", "sections")
        if getattr(annotation, "__metadata__", None):
            return _kind(args[0])
        return " | ".join(str(arg) if isinstance(arg, str | int) else _kind(arg) for arg in args)
    return "text" if annotation is str else annotation.__name__


def help_text(program: str, purpose: str) -> str:
    """Usage, then every key with its type, default, unit and meaning."""
    lines = [f"usage: {program} [CONFIG] [key=value ...]", "", purpose, ""]
    lines += [
        f"CONFIG is a YAML file (default configs/{DEFAULT_CONFIG.name}); keys, with defaults:",
        "",
    ]
    for name, field in keys():
        default = field.get_default(call_default_factory=True)
        shown = "null" if default is None else default if default != "" else "''"
        unit = (field.json_schema_extra or {}).get("unit", "")  # type: ignore[union-attr]
        measured = f" [{unit}]" if unit else ""
        lines += [
            f"  {name}: {_kind(field.annotation)} = {shown}{measured}",
            f"      {field.description}",
        ]
    return "\n".join(
        [
            *lines,
            "",
            "Exit status: 0, 2 with one line on stderr for what you can mend, 130 after Ctrl-C.",
        ]
    )
