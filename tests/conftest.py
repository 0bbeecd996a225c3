"""The libraries offline, the embedded model made once, and trainers that die."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it, and for child processes too

# ruff: noqa: E402
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import transformers
from builders import KilledError, random_model

from ubmoe.config import Config, load_config
from ubmoe.models import precision
from ubmoe.tiny import sizes

# What `make test` draws repeats; `make fuzz` draws anew, and more.
hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=3000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeat")


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


@pytest.fixture(autouse=True, scope="session")
def less_to_score() -> Iterator[None]:
    """Of the embedded language: a test of what is done with scores needs few of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "STS_PAIRS", 300)
        patch.setattr(sizes, "GRAMMAR_SENTENCES", 60)
        patch.setattr(sizes, "PROBING_ITEMS", 600)
        yield


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bf16: auto` means false: tests are of the reference mode, whatever the processor has."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run of the embedded model in a folder of its own."""
    return load_config(None, [f"output_dir={tmp_path}/runs/some", "seed=5"])
