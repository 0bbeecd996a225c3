"""Tiny random models of the families that we promise, and the embedded model, made once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it, and for child processes too

# ruff: noqa: E402
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """A two-layer random model in eval mode, with weights large enough that attention has
    preferences.
    """
    settings = SIZES | FAMILIES.get(family, {}) | changes
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """The embedded model's directory, built where the cache has none."""
    from ubmoe.tiny.model import tiny_directory

    return tiny_directory()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory of a random Qwen2, untied."""
    random_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class KilledError(Exception):
    """What a trainer dies of in `dying`."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, int], list[int]]:
    """(trainer class, n) -> the steps that begin from now on; its n-th one raises KilledError."""

    def die(trainer: Any, last: int) -> list[int]:
        real, steps = trainer.training_step, []

        def step(self: Any, *arguments: Any, **named: Any) -> Any:
            steps.append(1)
            if len(steps) == last:
                raise KilledError
            return real(self, *arguments, **named)

        monkeypatch.setattr(trainer, "training_step", step)
        return steps

    return die


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
