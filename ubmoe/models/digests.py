"""What tells a model from another: digests of weights."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

ADAPTERS = ("lora_", "ia3_")  # how peft calls what it adds
SAMPLED = 1024  # numbers of each weight that tell a model from another


def fingerprint(model: nn.Module) -> str:
    """sha256 of evenly spaced numbers of each weight, adapters and head left out.

    In bfloat16, so that it is the same for a bfloat16 and a float32 copy of one model.
    """
    found = hashlib.sha256()
    below: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, value in below.base_model.named_parameters():
        if not any(part in name for part in ADAPTERS):
            step = max(1, value.numel() // SAMPLED)
            some = value.detach().flatten()[::step].to("cpu", torch.bfloat16)
            found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_frozen(model: nn.Module) -> str:
    """sha256 of the weights that do not train: what a checkpoint stands on."""
    return digest((n, value) for n, value in model.named_parameters() if not value.requires_grad)


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of tensors with their names."""
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
