"""bfloat16 where the processor has it: autocast over weights that stay as they are loaded.

A CPU without avx512_bf16 or amx_bf16 computes bfloat16 many times slower than float32; with them a
training step is many times faster. `auto` asks the device.
"""

import logging
from contextlib import AbstractContextManager
from typing import Literal

import torch

log = logging.getLogger(__name__)
Setting = Literal["auto"] | bool  # of the keys called bf16
CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return any(known.get(flag, False) for flag in CPU_FLAGS)
    return False


def uses_bfloat16(setting: Setting, device: torch.device) -> bool:
    """What a key bf16 means on a device."""
    return has_bfloat16(device) if setting == "auto" else setting


def autocast(setting: Setting, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass under a key bf16; said once where `auto` switched it on."""
    chosen = uses_bfloat16(setting, device)
    if chosen and setting == "auto":
        log.info("bfloat16 autocast, which %s has in hardware (bf16: auto)", device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen)
