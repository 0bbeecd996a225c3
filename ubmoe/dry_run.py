"""What a script would do, without doing it: parameters, steps, memory and files.

Models are built as shapes alone (torch's fake tensors), so a 7B model takes seconds and no memory;
what the backward pass would keep is counted in a forward pass of such a model on the configured
batch. Data and tokenizer are read as the script reads them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from ubmoe.config import Config, StageSection, TrainingSection
from ubmoe.data.bad_rows import dropping
from ubmoe.data.chats import read_chats
from ubmoe.data.rows import held_out, read_texts
from ubmoe.data.tokens import sentences_of
from ubmoe.dependence.texts import tokenize
from ubmoe.encoder.contrastive import attention_dropout
from ubmoe.encoder.stages import read_data
from ubmoe.models.loading import (
    best_device,
    explained,
    keywords,
    load_tokenizer,
    source,
    within_context,
)
from ubmoe.models.precision import uses_bfloat16
from ubmoe.moe import joining, routers, routes
from ubmoe.recording import peak_memory_bytes
from ubmoe.report.tables import aligned
from ubmoe.training.modules import MODULES, train_only

SAMPLE = 1000  # texts whose lengths are looked at
# Of the three scripts on two small models; the numbers are in README.md.
MEASURED = "counts tensors: on a CPU the measured peaks were 0.9 to 2.2 times it; on a GPU: not run"
GRADIENT = 4  # bytes of an adapter's number; adapters are float32 whatever the model is
# Bytes of the optimiser's state per number that trains; of the others two moments in its dtype.
MOMENTS = {"adamw_8bit": 2, "paged_adamw_8bit": 0, "adafactor": 0}


@dataclass(frozen=True)
class Batch:
    """The largest batch of a step: texts, tokens of each, and how many of these are predicted."""

    texts: int
    tokens: int
    predicted: int = 0


def reading(said: Callable[[Config], str]) -> Callable[[Config], str]:
    """Bad rows are dropped where the program drops them."""

    @wraps(said)
    def wrapped(config: Config) -> str:
        with dropping(config.data.skip_bad_rows):
            return said(config)

    return wrapped


@reading
def calculate_dp(config: Config) -> str:
    """Texts and tokens, and the memory of one forward."""
    config = within_context(config, "dependence")
    tokenizer = load_tokenizer(config.model)
    settings = config.dependence
    texts = read_texts(settings.dataset, settings.max_texts)
    ids = tokenize(tokenizer, texts, settings.chat_template)
    lengths = [min(len(each), settings.max_tokens) for each in ids]
    with shapes():
        model = fake(config)
        memory = {"weights": size(model)} | baseline()
        memory["one layer's states"] = _states(model, max(settings.batch_tokens, max(lengths)))
    work = f"{len(lengths)} texts, {sum(lengths)} tokens, at most {settings.batch_tokens} at once"
    return _said(config, model, [], [work], memory, ["dependence.json", "dependence_*.png"])


@reading
def train_bi(config: Config) -> str:
    """A stage after the other; the memory is the largest of theirs."""
    config = within_context(config, "bi")
    tokenizer, work, trained = load_tokenizer(config.model), [], []
    most: dict[str, int] = {}
    with shapes():
        model = fake(config)
    training = [stage for stage in config.bi.stages if stage.max_steps != 0]
    for number, stage in enumerate(training):
        data = read_data(stage, tokenizer).rows  # outside of the shapes: it is real
        batch = _batch_of_stage(stage, data, tokenizer, config.bi.prompt)
        with shapes():
            model = fake(config)  # anew: checkpointing leaves its hooks
            counts = train_only(model, stage.train)
            found = training_memory(
                model,
                stage,
                batch,
                stage.dropout * (stage.objective == "simcse"),
                _casts(stage, config),
            )
        if stage.lora is not None:
            adapters = _adapters(model, stage)
            counts = {"adapters": adapters}
            found |= {
                "gradients": GRADIENT * adapters,
                "Adam": _moments(stage, adapters, GRADIENT * adapters),
            }
        named = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        trained.append(f"stage {number} ({stage.objective}) trains {named}")
        work.append(f"stage {number}: {_steps(stage, len(data))}")
        most = max(most, found, key=lambda each: sum(each.values()))
    memory = {"weights": size(model)} | most | baseline("ubmoe.evaluate")
    files = ["bi/", "sts.json", *(["stages/", "training.png"] if training else [])]
    return _said(config, model, trained, work, memory, files)


@reading
def train_ubmoe(config: Config) -> str:
    """The mixture's routers; it is joined block by block, which takes less than to load it."""
    config = within_context(config, "bi", "ubmoe")
    settings, tokenizer = config.ubmoe, load_tokenizer(config.model)
    found = read_chats(settings.dataset, tokenizer, settings.max_tokens, settings.max_rows)
    chats, _ = held_out(found.chats, settings.held_out, "ubmoe.held_out")
    longest = max(chats, key=lambda chat: len(chat.ids))
    texts = settings.per_device_train_batch_size
    batch = Batch(texts, len(longest.ids), texts * max(sum(chat.answer) for chat in chats))
    sentences = []
    if settings.objective == "both":
        sentences = sentences_of(settings.sentences, tokenizer, SAMPLE)
    with shapes():
        dense = fake(config)
        # every token to both experts, whatever top_k: which it would choose is not known
        settled = joining.mixture_config(dense.config, 2)
        mixture: Any = AutoModelForCausalLM.from_config(settled, dtype=dense.dtype)
        routes.set_route(mixture, "learned")
        mixture.requires_grad_(False)
        for value in routers.router_weights(mixture).values():
            value.requires_grad = True
        training = training_memory(mixture, settings, batch, 0.0, _casts(settings, config))
    if sentences:  # real, so not made among shapes
        tokens = _mean_tokens(sentences, tokenizer, config.bi.prompt, config.bi.max_tokens)
        with shapes():
            kept = kept_for_backward(mixture, Batch(texts, tokens), _casts(settings, config))
        training[f"activations of {texts} sentences of {tokens} tokens"] = kept
    memory = {"weights": size(mixture)} | training
    memory |= baseline("ubmoe.evaluate", "lm_eval.models.huggingface")
    count = sum(value.numel() for value in routers.router_weights(mixture).values())
    work = [f"routers: {_steps(settings, len(chats))}"]
    saved = {"mixture": "ubmoe/", "modes": "modes/", "adapter": "adapter/"}
    files = [saved[name] for name in settings.export]
    files += ["routers/", "generation.json", "routing.png"]
    return _said(config, mixture, [f"trains routers {count:,}"], work, memory, files)


# --- shapes ---------------------------------------------------------------------------------------


@contextmanager
def shapes() -> Iterator[None]:
    """Inside, every tensor that is made is a shape without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake(config: Config) -> Any:
    """The causal language model of `config.model`, as shapes. Raises UserError."""
    path = source(config.model)
    keys = {"attn_implementation": config.model.attn_implementation}
    dtype = getattr(torch, config.model.dtype)
    with explained(config.model):
        settings = AutoConfig.from_pretrained(path, **keywords(config.model))
        return AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=False, **keys
        )


def size(model: nn.Module) -> int:
    """Bytes of the parameters, a tied one once."""
    return sum(value.nbytes for value in model.parameters())


def kept_for_backward(
    model: Any, batch: Batch, bf16: bool = False, checkpointing: bool = False
) -> int:
    """Bytes that a forward pass in training keeps for the backward pass, weights left out."""
    weights = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = value  # held, so that no other tensor takes its place
        return value

    ids = torch.zeros(batch.texts, batch.tokens, dtype=torch.long)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    cast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with saved_tensors_hooks(keep, lambda value: value), cast:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        loss = states.sum()
        if batch.predicted:
            labels = torch.zeros(batch.predicted, dtype=torch.long)
            chosen = states.flatten(0, 1)[torch.zeros_like(labels)]
            loss = cross_entropy(model.get_output_embeddings()(chosen).float(), labels)
    del loss
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def training_memory(
    model: Any, section: TrainingSection, batch: Batch, dropout: float, bf16: bool
) -> dict[str, int]:
    training = [value for value in model.parameters() if value.requires_grad]
    trainable = sum(value.nbytes for value in training)
    moments = _moments(section, sum(value.numel() for value in training), trainable)
    with attention_dropout(model, dropout) if dropout else nullcontext():
        kept = kept_for_backward(model.train(), batch, bf16, section.activation_checkpointing)
    name = f"activations of {batch.texts} x {batch.tokens} tokens"
    return {"gradients": trainable, "Adam": moments, name: kept}


def _moments(section: TrainingSection, count: int, size: int) -> int:
    """Bytes on the device of the optimiser's state for so many numbers of so many bytes.

    AdamW has two moments in the weights' dtype, or in 8 bits; paged ones may leave the device, and
    Adafactor keeps a row and a column of each matrix.
    """
    return MOMENTS[section.optim] * count if section.optim in MOMENTS else 2 * size


def _casts(section: TrainingSection, config: Config) -> bool:
    return uses_bfloat16(section.bf16, best_device(config.model.device))


def _states(model: Any, tokens: int) -> int:
    """Of one layer's forward: its input, norm and output, and the three of the FFN."""
    config = model.config.get_text_config()
    width = 4 * config.hidden_size + 3 * config.intermediate_size
    return tokens * width * torch.finfo(model.dtype).bits // 8


def _adapters(model: Any, stage: StageSection) -> int:
    """Parameters of LoRA adapters on the matrices that train."""
    assert stage.lora is not None
    rank = stage.lora.rank
    shapes = [value.shape for value in model.parameters() if value.requires_grad]
    return sum(rank * (shape[0] + shape[1]) for shape in shapes if len(shape) == 2)


# --- batches and steps ----------------------------------------------------------------------------


def _batch_of_stage(stage: StageSection, data: Any, tokenizer: Any, prompt: str | None) -> Batch:
    """Contrastive: texts of the mean length, since a batch is sorted into mini-batches of like
    lengths; cached, one mini-batch. mntp: chunks, all of one length.
    """
    texts = stage.per_device_train_batch_size
    if stage.objective == "mntp":
        tokens = data.shape[1]
        return Batch(texts, tokens, math.ceil(texts * tokens * stage.mlm_probability))
    sample = [text for column in data.column_names for text in data[column][:SAMPLE]]
    tokens = _mean_tokens(sample, tokenizer, prompt, stage.max_tokens)
    texts *= len(data.column_names)
    return Batch(min(texts, stage.mini_batch_tokens // tokens) if stage.cached else texts, tokens)


def _mean_tokens(texts: Sequence[str], tokenizer: Any, prompt: str | None, most: int) -> int:
    """Of texts in their prompt."""
    prompted = [(prompt or "{text}").replace("{text}", text) for text in texts]
    ids = tokenizer(prompted, truncation=True, max_length=most)["input_ids"]
    return math.ceil(statistics.mean(map(len, ids)))


def _steps(section: TrainingSection, rows: int) -> str:
    batch = section.per_device_train_batch_size
    return f"{section.steps(rows)} steps of {batch} on one device, {rows} rows"


# --- what is said ---------------------------------------------------------------------------------


def baseline(*libraries: str) -> dict[str, int]:
    """What Python and the script's libraries take of this process; nothing of an accelerator's."""
    if torch.cuda.is_available():
        return {}
    for name in libraries:
        import_module(name)
    return {"Python and libraries": peak_memory_bytes()}


def parameters(model: Any) -> dict[str, int]:
    """By module; a tied head is the embedding's."""
    embedding = model.get_input_embeddings().weight
    found: dict[str, int] = {}
    for name, value in model.named_parameters():
        words = [
            word for word in ("ffn", "attention") if any(part in name for part in MODULES[word])
        ]
        module = "embedding" if value is embedding else next(iter(words), "lm_head and norms")
        found[module] = found.get(module, 0) + value.numel()
    return found


def _said(
    config: Config,
    model: Any,
    trained: Sequence[str],
    work: Sequence[str],
    memory: dict[str, int],
    files: Sequence[str],
) -> str:
    sizes = parameters(model)
    rows = [[name, f"{count:,}"] for name, count in sizes.items()]
    rows.append(["parameters", f"{sum(sizes.values()):,}"])
    parts = [[name, f"{value / 1e9:.2f} GB"] for name, value in memory.items()]
    parts.append(["peak memory, estimated", f"{sum(memory.values()) / 1e9:.2f} GB"])
    written = [str(Path(config.output_dir) / name) for name in files]
    head = f"{config.model.name}: {type(model).__name__}, {config.model.dtype}"
    return "\n".join(
        [
            head,
            aligned(rows),
            *trained,
            *work,
            aligned(parts),
            MEASURED,
            "writes:",
            *written,
            "nothing was run",
        ]
    )
