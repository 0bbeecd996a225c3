"""Memory of a program, counted on models that are shapes alone.

Models are torch's fake tensors, so a 7B model takes seconds and no memory; what the backward pass
would keep is counted in a forward pass of such a model on the run's own batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from ubmoe.config import Config, TrainingSection
from ubmoe.encoder.contrastive import attention_dropout
from ubmoe.models.gguf import shaped
from ubmoe.models.precision import training_dtypes, weights_dtype
from ubmoe.models.source import ModelSource, as_user_error
from ubmoe.recording import peak_memory_bytes

FLOAT, HALF = 4, 2  # bytes of a float32 and of a bfloat16 number
# Bytes of the optimiser's state per number that trains; paged ones may leave the device, and
# Adafactor keeps a row and a column of each matrix.
MOMENTS = {"adamw_8bit": 2, "paged_adamw_8bit": 0, "adafactor": 0}
ADAM = 2 * FLOAT
# What an allocator takes for activations of many shapes, by the bytes in them: 1.19 as measured
# for tiny-english's four mini-batches on a CPU.
ALLOCATOR = 1.2


@dataclass(frozen=True)
class Batch:
    """One forward of a step: texts, tokens of each, and how many of these are predicted."""

    texts: int
    tokens: int
    predicted: int = 0

    @property
    def padded(self) -> int:
        return self.texts * self.tokens


@contextmanager
def shapes() -> Iterator[None]:
    """Inside, every tensor that is made is a shape without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake(config: Config, device: torch.device) -> Any:
    """The causal language model of `config.model`, as shapes, in the dtype of a device.

    Raises UserError.
    """
    keys = {"attn_implementation": config.model.attn_implementation}
    settings = ModelSource.of(config.model).settings
    with as_user_error(config.model):
        return shaped(settings, weights_dtype(config.model.dtype, device), **keys)


def size(model: nn.Module) -> int:
    """Bytes of the parameters, a tied one once."""
    return sum(value.nbytes for value in model.parameters())


def kept_for_backward(
    model: Any, batches: Sequence[Batch], bf16: bool = False, checkpointing: bool = False
) -> int:
    """Bytes that forward passes in training keep for the backward pass, weights left out.

    Under autocast the copies in bfloat16 of what trains are among them. Where every layer trains
    alike, two and three of them are run, and the rest counted as the third.
    """
    layers = getattr(model.base_model, "layers", [])
    if len(layers) < 4 or len({_trains(layer) for layer in layers}) > 1:
        return _kept(model, batches, bf16, checkpointing)
    tensors = []
    for count in (2, 3):
        model.base_model.layers = layers[:count]
        tensors.append(_kept(model, batches, bf16, checkpointing))
    model.base_model.layers = layers
    return tensors[0] + (len(layers) - 2) * (tensors[1] - tensors[0])


def _trains(layer: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, value in layer.named_parameters() if value.requires_grad)


def _kept(model: Any, batches: Sequence[Batch], bf16: bool, checkpointing: bool) -> int:
    weights = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = value  # held, so that no other tensor takes its place
        return value

    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with saved_tensors_hooks(keep, lambda value: value), autocast:
        losses = [_loss(model, batch) for batch in batches]
    del losses
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    ids = torch.zeros(batch.texts, batch.tokens, dtype=torch.long)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not batch.predicted:
        return states.sum()
    labels = torch.zeros(batch.predicted, dtype=torch.long)
    chosen = states.flatten(0, 1)[torch.zeros_like(labels)]
    return cross_entropy(model.get_output_embeddings()(chosen).float(), labels)


def of_training(
    model: Any,
    section: TrainingSection,
    batches: Sequence[Batch],
    dropout: float,
    bf16: bool,
    shards: int = 1,
) -> dict[str, int]:
    """The bytes of a training step: weights, gradients, the optimiser's states, activations.

    bf16: whether the forward passes run under autocast. shards: over how many devices lies what
    trains, as FSDP2 has it; two layers of it are whole at a time, one just being fetched.
    """
    with training_dtypes(model, bf16):
        numbers = sum(value.numel() for value in model.parameters() if value.requires_grad)
        copies = HALF * numbers if bf16 else 0  # autocast's, as long as the forward pass
        kept = _activations(model, section, batches, dropout, bf16, copies)
        weights = size(model)
    if shards > 1:
        layers = model.config.get_text_config().num_hidden_layers
        weights -= FLOAT * (numbers - numbers // shards)
        copies = 2 * (HALF if bf16 else FLOAT) * numbers // layers
    vocabulary = model.get_output_embeddings().weight.shape[0]
    kept += FLOAT * vocabulary * sum(batch.predicted for batch in batches)  # the logits' gradient
    texts, tokens = sum(batch.texts for batch in batches), sum(batch.padded for batch in batches)
    return {
        "weights": weights,
        "gradients": FLOAT * numbers // shards,
        "optimiser": _optimiser(section.optim, numbers // shards),
        **({"weights as they are used": copies} if copies else {}),
        f"activations of {texts} texts, {tokens} tokens": kept,
    }


def _activations(
    model: Any,
    section: TrainingSection,
    batches: Sequence[Batch],
    dropout: float,
    bf16: bool,
    copies: int,
) -> int:
    model.train()
    with attention_dropout(model, dropout) if dropout else nullcontext():
        kept = max(0, kept_for_backward(model, batches, bf16) - copies)
        if section.activation_checkpointing:  # and one layer's are there while it is recomputed
            layers = model.config.get_text_config().num_hidden_layers
            kept = kept_for_backward(model, batches, bf16, checkpointing=True) + kept // layers
    return int(ALLOCATOR * kept)


def _optimiser(name: str, numbers: int) -> int:
    """State for so many numbers; `adamw_torch` makes a temporary of the size of one moment."""
    return numbers * (MOMENTS.get(name, ADAM) + (FLOAT if name == "adamw_torch" else 0))


def of_states(model: Any, tokens: int) -> int:
    """The bytes of one layer's forward: its input, norm and output, and the FFN's three."""
    config = model.config.get_text_config()
    width = 4 * config.hidden_size + 3 * config.intermediate_size
    return tokens * width * FLOAT


def baseline(device: torch.device, *libraries: str) -> dict[str, int]:
    """The memory of Python and the program's libraries in this process; none on an accelerator."""
    if device.type != "cpu":
        return {}
    for name in libraries:
        import_module(name)
    return {"Python and libraries": peak_memory_bytes()}


class _Adapted(nn.Module):
    """A frozen linear layer under a low-rank adapter; peft's cannot be made of shapes."""

    def __init__(self, linear: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        more: torch.Tensor = self.lora_B(self.lora_A(self.dropout(states)))
        return self.linear(states) + more


def adapt(model: nn.Module, parameters: Sequence[str], rank: int, dropout: float = 0.0) -> int:
    """Put adapters on the linear layers that own the parameters; the numbers that train now."""
    model.requires_grad_(False)
    count = 0
    for name in sorted({parameter.rpartition(".")[0] for parameter in parameters}):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, _Adapted(layer, rank, dropout))
            count += rank * (layer.in_features + layer.out_features)
    return count
