"""bfloat16 where the processor has it: of the weights, and of what is computed with them.

A CPU without avx512_bf16 or amx_bf16 computes bfloat16 many times slower than float32; with them a
training step is many times faster. `auto` asks the device.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Literal

import torch
from transformers import PreTrainedModel

log = logging.getLogger(__name__)
Setting = Literal["auto"] | bool  # of the keys called bf16
CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    Of a GPU that is not here, about which a dry run is asked: yes.
    """
    if device.type == "cuda":
        here = torch.cuda.is_available()
        return not here or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return any(known.get(flag, False) for flag in CPU_FLAGS)
    return False


def uses_bfloat16(setting: Setting, device: torch.device) -> bool:
    """Whether a key bf16 means bfloat16 autocast on a device."""
    return has_bfloat16(device) if setting == "auto" else setting


def autocast(setting: Setting, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass under a key bf16; said once where `auto` switched it on."""
    chosen = uses_bfloat16(setting, device)
    if chosen and setting == "auto":
        _say_once(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen)


@cache
def _say_once(device: str) -> None:
    log.info("bfloat16 autocast, which %s has in hardware (bf16: auto)", device)


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `model.dtype` on a device; of `auto`, bfloat16 where the device has it."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def training_dtypes(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    """Inside, what trains is float32, and so is the rest, unless autocast would round it anyway.

    bf16: whether the forward passes run under autocast. It casts every matrix to bfloat16 wherever
    it is used, so a frozen one that is kept in bfloat16 changes no number; the embedding's rows
    are the states to which the layers add, and go on in float32. Afterwards each weight is again
    in the dtype that it came in, what was trained with it.
    """
    dtype = model.dtype
    for value in model.parameters():
        if value.requires_grad or not bf16:
            value.data = value.data.float()
    hook = model.get_input_embeddings().register_forward_hook(_in_float32)  # type: ignore[union-attr]
    try:
        yield
    finally:
        hook.remove()
    cast(model, dtype)


def _in_float32(_: object, __: object, states: torch.Tensor) -> torch.Tensor:
    return states.float()


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in a dtype; buffers stay: rotary frequencies are float32."""
    for value in model.parameters():
        value.data = value.data.to(dtype)
    return model
