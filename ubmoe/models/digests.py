"""Digests of contents that identify a model, a tokenizer or rows of data.

Whether work is the same is asked of every byte; a path, a count or a date says nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.models.tensors import Stream

ADAPTERS = ("lora_", "ia3_")  # how peft calls what it adds
SAMPLED = 1024  # numbers of each weight that identify a model
# Of a config: where it was read and by what, and what training switches off for its own time.
ELSEWHERE = {"_name_or_path", "transformers_version", "use_cache"}


def fingerprint(model: nn.Module) -> str:
    """sha256 of evenly spaced numbers of each weight, adapters and head left out.

    It pairs records, and adapters with their bases; it may miss an edit of a few rows, so no work
    is taken for done by it. In bfloat16: it is the same for a bfloat16 and a float32 copy.
    """
    below: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return fingerprint_of(
        Stream.from_tensor(value.flatten())  # some have no dimension
        for name, value in below.base_model.named_parameters()
        if not any(part in name for part in ADAPTERS)
    )


def fingerprint_of(tensors: Iterable[Stream]) -> str:
    """As `fingerprint`, of the tensors of a headless model in the order of its class."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        step, seen = max(1, tensor.shape.numel() // SAMPLED), 0
        for block in tensor.blocks():
            flat = block.flatten()
            some = flat[-seen % step :: step].to("cpu", torch.bfloat16)
            some = some.clone(memory_format=torch.contiguous_format)  # a single one has any stride
            hashed.update(some.view(torch.uint8).numpy().tobytes())
            seen += len(flat)
    return hashed.hexdigest()


def resume_key(model: PreTrainedModel, weights: str | None = None) -> dict[str, Any]:
    """A model's part of a resume key: its weights to the byte, and its config without paths.

    weights: their digest, where it is not of all that the model holds.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in ELSEWHERE}
    return {
        "weights": weights or digest(model.named_parameters()),
        "config": json.loads(json.dumps(config, default=str)),
        "attn_implementation": model.config._attn_implementation,
    }


def digest_of_frozen(model: nn.Module) -> str:
    """sha256 of the weights that do not train: what a checkpoint stands on."""
    return digest((n, value) for n, value in model.named_parameters() if not value.requires_grad)


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of tensors with their names."""
    hashed = hashlib.sha256()
    for name, value in tensors:
        hashed.update(f"{name} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest_of_rows(rows: Iterable[object]) -> str:
    """sha256 of rows of texts and numbers in their order, one held at a time."""
    hashed = hashlib.sha256()
    for row in rows:
        text = repr(row).encode("utf-8", "backslashreplace")
        hashed.update(b"%d " % len(text) + text)
    return hashed.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a text's tokens, the chat template with it."""
    parts: list[object] = [sorted(tokenizer.get_vocab().items())]
    if tokenizer.is_fast:
        parts = [json.loads(tokenizer.backend_tokenizer.to_str())]
        for state in ("truncation", "padding"):  # of the call before
            parts[0].pop(state, None)  # type: ignore[attr-defined]
    return digest_of_rows([*parts, tokenizer.special_tokens_map, tokenizer.chat_template])
