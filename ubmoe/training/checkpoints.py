"""Checkpoints of a training run: what trains, by name, and the marks that say of which run.

What is frozen is already on disk where it came from, so it is in no checkpoint.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ubmoe.config import (
    StageSection,
    TrainingSection,
    UserError,
    deciding_weights,
    error_reason,
    listed,
    unlike,
)
from ubmoe.training.sharding import alike, whole

log = logging.getLogger(__name__)
WEIGHTS = "trainable.safetensors"


@dataclass(frozen=True)
class Work:
    """Where a stage keeps its checkpoints, its seed, and the stages that it stands on.

    given: settings besides the stage's own that its weights depend on. distributed: the key.
    """

    directory: Path
    seed: int
    resume: bool = False
    before: Sequence[StageSection] = ()
    given: dict[str, Any] = field(default_factory=dict)
    distributed: str = "ddp"


def begin(stage: TrainingSection, work: Work, **mark: Any) -> Path | None:
    """The checkpoint to go on from: of the same run, stage, data and earlier stages, or none.

    mark: digests of the data and of the weights that the stage starts from, and what else tells
    its run from others. Checkpoints of another run are removed, so that nothing later can take
    them for this one's; the log says in what that run was another.
    """
    directory, state = work.directory, PartialState()
    stages = [deciding_weights(each) for each in (*work.before, stage)]
    mark |= {"stages": stages, "seed": work.seed, "given": work.given}
    path, text = directory / "stage.json", json.dumps(mark, indent=1)
    before = _mark_in(path)
    other = None if before is None else unlike(before, json.loads(text))
    state.wait_for_everyone()
    if not (work.resume and other == []) and state.is_main_process:
        path.unlink(missing_ok=True)  # first: what is left of a checkpoint must not have a mark
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    state.wait_for_everyone()
    if work.resume and other is None:
        log.info("%s: no checkpoint of this run; starting afresh", directory)
    elif work.resume and other:
        log.info("%s: of another run (other %s); starting afresh", directory, listed(other))
    return newest_checkpoint(directory) if work.resume and other == [] else None


def _mark_in(path: Path) -> dict[str, Any] | None:
    """The mark of an earlier run; none where there is none, or only half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def newest_checkpoint(directory: Path) -> Path | None:
    """The latest checkpoint whose trainer_state.json parses: it is written last."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            log.info("%s: incomplete, not used", path)
            continue
        return path
    return None


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_trainable(model: nn.Module, folder: Path) -> None:
    """The first process writes; weights in parts are gathered, so every process has to call it."""
    main, values = PartialState().is_main_process, {}
    for name, value in trainable(model).items():
        full = whole(value.detach())
        if main:
            values[name] = full.cpu().contiguous()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def readable(checkpoint: Path | str | None) -> Iterator[None]:
    """Around reading one: what the libraries say of it, damaged or with code in it, as one line.

    They read with `weights_only`, so that nothing in it is called.
    """
    try:
        yield
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        zipped = "PytorchStreamReader" in str(error)  # of torch's own files
        if isinstance(error, RuntimeError) and not zipped:
            raise
        raise UserError(
            f"{checkpoint}: cannot be read ({error_reason(error)}); remove it, and the run goes on "
            "from the one before"
        ) from error


@torch.no_grad()
def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint of other modules."""
    own = trainable(model)
    with readable(checkpoint), safe_open(checkpoint / WEIGHTS, "pt") as saved:
        if own.keys() != set(saved.keys()):
            raise UserError(f"{checkpoint}: of other modules; remove it")
        for name, value in own.items():  # one at a time: all of them would be all on each process
            value.copy_(alike(saved.get_tensor(name), value))
