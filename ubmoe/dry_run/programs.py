"""The dry run of each program: parameters, steps, memory and files. Data are read as it reads them.

Memory is of `model.device`; `cuda` may be asked about where no GPU is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ubmoe.bitune.examples import read_examples
from ubmoe.bitune.model import VARIANTS
from ubmoe.config import (
    BituneSection,
    Config,
    DependenceSection,
    MoeSection,
    StageSection,
    TrainingSection,
    UserError,
    with_keys,
)
from ubmoe.data.bad_rows import dropping
from ubmoe.data.chats import Chat, read_chats
from ubmoe.data.prompts import Example
from ubmoe.data.rows import held_out, read_texts, training_rows
from ubmoe.data.templates import dated
from ubmoe.data.tokens import sentences_of
from ubmoe.dependence.texts import tokenize
from ubmoe.dry_run import batches, memory
from ubmoe.dry_run.memory import Batch, shapes
from ubmoe.dry_run.shipped import COUNTED, Unread, is_shape, read_or_count, without_hub
from ubmoe.encoder import whitening
from ubmoe.encoder.stages import read_data
from ubmoe.models.loading import best_device
from ubmoe.models.precision import uses_bfloat16
from ubmoe.models.source import ModelSource
from ubmoe.moe import joining, routers, routes
from ubmoe.report.tables import aligned
from ubmoe.training.modules import MODULES, named_by, train_only

MEASURED = "measured: 0.9 to 1.1 times that on a CPU (docs/costs.md); on a GPU: not run"
# glibc's heap is left with holes by mini-batches of many shapes.
CACHED = (
    "measured: up to 1.8 times that on a CPU with `cached`, as C's allocator keeps freed memory"
)
PROMPT = 512  # tokens of a benchmark's prompts, which are not read here


@dataclass(frozen=True)
class Plan:
    """A program's dry run, on a model of shapes alone."""

    model: Any
    trained: list[str]
    work: list[str]
    memory: dict[str, int]
    files: list[str]
    measured: str = MEASURED


Planner = Callable[[Config], Plan]


def reading(said: Callable[[Config], str]) -> Callable[[Config], str]:
    """Bad rows are dropped where the program drops them, chats have its date, no hub is needed."""

    @wraps(said)
    def wrapped(config: Config) -> str:
        dropped, day = dropping(config.data.skip_bad_rows), dated(config.data.template_date)
        with dropped, day, without_hub(config) as here:
            text = said(here)
        return text.replace(here.model.name, config.model.name)

    return wrapped


@reading
def calculate_dp(config: Config) -> str:
    """Texts and tokens, and the memory of one forward."""
    source = ModelSource.of(config.model)
    config = source.within_context(config, "dependence")
    settings = config.dependence
    lengths = read_or_count(
        *(config.model, settings.dataset, settings.max_texts),
        lambda: _measured_lengths(settings, source.tokenizer),
        read_texts,
    )
    if isinstance(lengths, Unread):
        lengths = [settings.max_tokens] * len(lengths)

    def plan(config: Config) -> Plan:
        device, at_once = device_of(config), config.dependence.batch_tokens
        with shapes():
            model = memory.fake(config, device)
            states = memory.of_states(model, max(at_once, max(lengths)))
        work = f"{len(lengths)} texts, {sum(lengths)} tokens, at most {at_once} at once"
        memory_of = {"weights": memory.size(model), "one layer's states": states}
        memory_of |= memory.baseline(device)
        return Plan(model, [], [work], memory_of, ["dependence.json", "dependence_*.png"])

    return _said(config, plan, [f"dependence.batch_tokens={max(lengths)}"])


@reading
def train_bi(config: Config) -> str:
    """A stage after the other; the memory is the largest of theirs."""
    source = ModelSource.of(config.model)
    config = source.within_context(config, "bi")
    tokenizer: Any = None if is_shape(config.model) else source.tokenizer
    training = [number for number, stage in enumerate(config.bi.stages) if stage.max_steps != 0]
    data = {number: _stage_rows(config, number, tokenizer) for number in training}
    if tokenizer is not None:
        whitening.read_sentences(config.bi.whiten, tokenizer)

    def plan(config: Config) -> Plan:
        device, trained, work = device_of(config), [], []
        with shapes():
            model = memory.fake(config, device)
        most = {"weights": memory.size(model)}
        for number, rows in data.items():
            stage = config.bi.stages[number]
            step = batches.of_stage(stage, rows, tokenizer, config.bi.prompt)
            with shapes():
                tuned = memory.fake(config, device)  # anew: checkpointing leaves its hooks
                said = _trainable(tuned, stage)
                dropout = stage.dropout * (stage.objective == "simcse")
                casts = uses_bfloat16(stage.bf16, device)
                shards = _shards(config, stage.lora is None)
                needed = memory.of_training(tuned, stage, step, dropout, casts, shards)
            trained.append(f"stage {number} ({stage.objective}) trains {said}")
            work.append(f"stage {number}: {_steps(config, stage, len(rows))}")
            most = max(most, needed, key=lambda parts: sum(parts.values()))
        # a trainer's first step imports torch's compiler
        most |= memory.baseline(device, "ubmoe.evaluate.sts", "torch._dynamo")
        files = ["bi/", "sts.json", *(["stages/", "training.png"] if training else [])]
        caches = device.type == "cpu" and any(config.bi.stages[number].cached for number in data)
        return Plan(model, trained, work, most, files, CACHED if caches else MEASURED)

    savings = []
    for number in training:
        keys = ["activation_checkpointing=true", "optim=adamw_8bit", "lora={rank: 8}"]
        if config.bi.stages[number].objective != "mntp":
            keys.insert(1, "cached=true")
        savings += [f"bi.stages.{number}.{key}" for key in keys]
    return _said(config, plan, savings)


@reading
def train_ubmoe(config: Config) -> str:
    """The mixture's routers; it is joined tensor by tensor, and loaded once.

    For an adapter alone nothing is joined and nothing trains.
    """
    source = ModelSource.of(config.model)
    config = source.within_context(config, "bi", "ubmoe")
    joining.check_joins(source.settings.model_type, config.ubmoe)
    settings, joins = config.ubmoe, config.ubmoe.mixes
    chats = _training_rows(config, settings, lambda: _training_chats(settings, source.tokenizer))
    distilled = joins and settings.objective == "both"
    lengths = _sentence_lengths(config, source) if distilled else []

    def plan(config: Config) -> Plan:
        settings, device = config.ubmoe, device_of(config)
        casts = uses_bfloat16(settings.bf16, device)
        step = batches.of_chats(settings, chats, settings.max_tokens)
        if lengths:
            step.append(Batch(settings.per_device_train_batch_size, max(lengths)))
        with shapes():
            mixture = _mixture(config, device) if joins else memory.fake(config, device)
            training = memory.of_training(mixture, settings, step, 0.0, casts) if joins else {}
            scoring = _scoring(mixture, config)
        most = max(training, scoring, key=lambda parts: sum(parts.values()))
        most |= memory.baseline(device, "ubmoe.evaluate.sts", "lm_eval.models.huggingface")
        count = sum(value.numel() for value in routers.router_weights(mixture).values())
        saved = {"mixture": "ubmoe/", "modes": "modes/", "adapter": "adapter/"}
        files = [saved[name] for name in settings.export]
        files += ["routers/", "generation.json", "routing.png"] if joins else ["generation.json"]
        work = f"routers: {_steps(config, settings, len(chats))}" if joins else "no routers"
        trained = [f"trains routers {count:,}"] if joins else []
        return Plan(mixture, trained, [work], most, files)

    return _said(config, plan, ["ubmoe.activation_checkpointing=true", *_halves(config, "ubmoe")])


@reading
def bitune(config: Config) -> str:
    """Two passes over each prompt, and one over the answer."""
    source = ModelSource.of(config.model)
    config = source.within_context(config, "bitune")
    settings = config.bitune
    examples = _training_rows(
        config, settings, lambda: _training_examples(settings, source.tokenizer)
    )

    def plan(config: Config) -> Plan:
        settings, device = config.bitune, device_of(config)
        casts = uses_bfloat16(settings.bf16, device)
        with shapes():
            model = memory.fake(config, device)
            scoring = _scoring(model, config)
            names = [name for name, _ in model.named_parameters() if "lm_head" not in name]
            count = memory.adapt(model, names, settings.rank)
            forwards = _readings(settings, examples)
            training = memory.of_training(model, settings, forwards, 0.0, casts)
        most = max(training, scoring, key=lambda parts: sum(parts.values()))
        most |= memory.baseline(device, "lm_eval.models.huggingface")
        said = f"{settings.variant} trains adapters {count:,}, of each pass that has its own"
        files = ["bitune/", "adapters/", "bitune.json"]
        return Plan(model, [said], [_steps(config, settings, len(examples))], most, files)

    return _said(config, plan, _halves(config, "bitune"))


# --- parts ----------------------------------------------------------------------------------------


def device_of(config: Config) -> torch.device:
    """The device that is asked about: `cuda` may be one that is not here. Raises UserError."""
    if config.model.device == "cuda":
        return torch.device("cuda")
    return best_device(config.model.device)


def _measured_lengths(settings: DependenceSection, tokenizer: Any) -> list[int]:
    texts = read_texts(settings.dataset, settings.max_texts)
    ids = tokenize(tokenizer, texts, settings.chat_template)
    return [min(len(row), settings.max_tokens) for row in ids]


def _stage_rows(config: Config, number: int, tokenizer: Any) -> Any:
    stage = config.bi.stages[number]
    rows = read_or_count(
        *(config.model, stage.dataset, stage.max_rows),
        lambda: read_data(stage, tokenizer).rows,
        training_rows,
    )
    if isinstance(rows, Unread) and stage.objective == "mntp":
        raise UserError(
            f"bi.stages.{number}.dataset: {stage.dataset}, or a tokenizer, is not on this machine, "
            "and a masked stage's rows are counted in tokens; expected both: python -m "
            "ubmoe.results prefetch fetches them"
        )
    return rows


def _training_rows(
    config: Config, settings: MoeSection | BituneSection, read: Callable[[], Any]
) -> Any:
    """A section's rows without the held-out ones; or their number, if counted."""
    rows = read_or_count(config.model, settings.dataset, settings.max_rows, read, read_texts)
    return Unread(max(1, len(rows) - settings.held_out)) if isinstance(rows, Unread) else rows


def _training_chats(settings: MoeSection, tokenizer: Any) -> list[Chat]:
    chats = read_chats(settings.dataset, tokenizer, settings.max_tokens, settings.max_rows)
    return chats.held_out(settings.held_out, "ubmoe.held_out")[0]


def _training_examples(settings: BituneSection, tokenizer: Any) -> list[Example]:
    given = (settings.template, settings.max_tokens, settings.max_rows)
    read = read_examples(settings.dataset, tokenizer, *given)
    chats, _ = held_out(read.chats, settings.held_out, "bitune.held_out")
    return [example for chat in chats for example in chat]


def _sentence_lengths(config: Config, source: ModelSource) -> list[int]:
    """The lengths of a second objective's sentences."""
    if is_shape(config.model):
        return [config.bi.max_tokens]
    texts = sentences_of(config.ubmoe.sentences, source.tokenizer, batches.SAMPLE)
    return batches.token_counts(texts, source.tokenizer, config.bi.prompt, config.bi.max_tokens)


def _shards(config: Config, splits: bool) -> int:
    """Over how many devices lies what trains."""
    return _devices(config) if splits and config.distributed == "fsdp2" else 1


def _devices(config: Config) -> int:
    return 1 if isinstance(config.dry_run, bool) else config.dry_run


def _trainable(model: Any, stage: StageSection) -> str:
    """Let the stage's modules train, or adapters on them; what trains, in words."""
    counts = train_only(model, stage.train)
    if stage.lora is not None:
        names = [name for module in stage.train for name in named_by(model, module)]
        counts = {"adapters": memory.adapt(model, names, stage.lora.rank, stage.lora.dropout)}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _mixture(config: Config, device: torch.device) -> Any:
    """Every token goes to both experts, whatever top_k: which it would choose is not known."""
    dense = memory.fake(config, device)
    settled = joining.mixture_config(dense.config, 2)
    mixture = memory.shaped(settled, dense.dtype)
    routes.set_route(mixture, "learned")
    mixture.requires_grad_(False)
    for value in routers.router_weights(mixture).values():
        value.requires_grad = True
    return mixture


def _readings(settings: BituneSection, examples: Sequence[Example] | Unread) -> list[Batch]:
    """The forwards of the longest examples: of the prompts in each pass, and of the answers."""
    variant = VARIANTS[settings.variant]
    passes = 2 if variant.mixed and variant.second else 1
    if isinstance(examples, Unread):
        texts, most = settings.per_device_train_batch_size, settings.max_tokens
        return [Batch(texts, most)] * passes + [Batch(texts, most, texts * most)]
    some = sorted(examples, key=len)[-settings.per_device_train_batch_size :]
    prompt, answer = (
        max(len(example.prompt) for example in some),
        max(len(example.answer) for example in some),
    )
    predicted = sum(len(example.answer) for example in some)
    return [Batch(len(some), prompt)] * passes + [Batch(len(some), answer, predicted)]


def _scoring(model: Any, config: Config) -> dict[str, int]:
    """The bytes of lm-eval: the logits of a batch of prompts, and their logarithms in float32."""
    if not (config.evaluation.generation or config.bitune.generation):
        return {"weights": memory.size(model)}
    texts = config.evaluation.batch_size
    vocabulary = model.get_output_embeddings().weight.shape[0]
    number_bytes = model.dtype.itemsize + memory.FLOAT
    logits = texts * PROMPT * vocabulary * number_bytes
    return {"weights": memory.size(model), f"logits of {texts} x {PROMPT} tokens": logits}


def _halves(config: Config, section: str) -> list[str]:
    """Keys for half of the rows at once, in a section's training and in scoring."""
    keys = {section: "per_device_train_batch_size", "evaluation": "batch_size"}
    return [
        f"{name}.{key}={max(1, getattr(getattr(config, name), key) // 2)}"
        for name, key in keys.items()
    ]


def _steps(config: Config, section: TrainingSection, rows: int) -> str:
    batch, devices = section.per_device_train_batch_size, _devices(config)
    where = "on one device" if devices == 1 else f"on each of {devices} devices"
    return f"{section.steps(rows // devices)} steps of {batch} {where}, {rows} rows"


# --- what is said ---------------------------------------------------------------------------------


def parameters(model: Any) -> dict[str, int]:
    """By module; a tied head is the embedding's."""
    embedding = model.get_input_embeddings().weight
    counts: dict[str, int] = {}
    for name, value in model.named_parameters():
        words = [
            word for word in ("ffn", "attention") if any(part in name for part in MODULES[word])
        ]
        module = "embedding" if value is embedding else next(iter(words), "lm_head and norms")
        counts[module] = counts.get(module, 0) + value.numel()
    return counts


def _said(config: Config, planner: Planner, savings: Sequence[str]) -> str:
    """savings: keys that may bring the memory down, each tried alone, as is model.dtype=auto."""
    plan = planner(config)
    sizes = parameters(plan.model)
    rows = [[name, f"{count:,}"] for name, count in sizes.items()]
    rows.append(["parameters", f"{sum(sizes.values()):,}"])
    total = sum(plan.memory.values())
    parts = [[name, _gigabytes(value)] for name, value in plan.memory.items()]
    parts.append(["peak memory, estimated", _gigabytes(total)])
    written = [str(Path(config.output_dir) / name) for name in plan.files]
    dtype = str(plan.model.dtype).removeprefix("torch.")
    lines = [f"{config.model.name}: {type(plan.model).__name__}, {dtype}", aligned(rows)]
    lines += [*plan.trained, *plan.work, aligned(parts), plan.measured]
    if is_shape(config.model):
        lines.append(f"{config.model.name} {COUNTED}")
    if smaller := _smaller(config, planner, ["model.dtype=auto", *savings], total):
        lines += ["less, with one of", aligned([[key, _gigabytes(n)] for key, n in smaller])]
    return "\n".join([*lines, "writes:", *written, "nothing was run"])


def _smaller(
    config: Config, planner: Planner, savings: Sequence[str], total: int
) -> list[tuple[str, int]]:
    """(key, peak memory) of those that save a percent at least."""
    advice = []
    for key in savings:
        try:
            changed = sum(planner(with_keys(config, [key])).memory.values())
        except UserError:  # it does not go with the others
            continue
        if changed < 0.99 * total:
            advice.append((key, changed))
    return advice


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB"
