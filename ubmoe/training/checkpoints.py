"""Checkpoints of a training run: the trainable weights by name, and the run's resume key.

What is frozen is already on disk where it came from, so it is in no checkpoint. A manifest, written
last, has a digest of every file: a run resumes from a checkpoint only if every file is unchanged.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState

from ubmoe import owned
from ubmoe.bounds import read_json
from ubmoe.config import (
    StageSection,
    TrainingSection,
    UserError,
    deciding_weights,
    error_reason,
    listed,
    unlike,
)
from ubmoe.files import digest_of_file, write_json
from ubmoe.models.tensors import DTYPES
from ubmoe.training.sharding import alike, whole

log = logging.getLogger(__name__)
WEIGHTS, STATE, MANIFEST = "trainable.safetensors", "trainer_state.json", "manifest.json"
NEEDED = (WEIGHTS, "optimizer.pt", "scheduler.pt", STATE)
FILES = (*NEEDED, "rng_state*.pth", MANIFEST, f".{MANIFEST}*")
BROKEN = (
    "PytorchStreamReader",
    "mmap can only be used",
    "RNG state",
)  # torch's messages for its own damaged files
KEYS = {key.name for key in fields(TrainerState)}
STAGE, CHECKPOINT = "stage.json", "checkpoint-"
NAME = re.compile(rf"{CHECKPOINT}(\d+)", re.ASCII)


@dataclass(frozen=True)
class StageRun:
    """Where a stage keeps its checkpoints, its seed, and the stages that it stands on.

    given: settings besides the stage's own that its weights depend on. distributed: the key.
    """

    directory: Path
    seed: int
    resume: bool = False
    before: Sequence[StageSection] = ()
    given: dict[str, Any] = field(default_factory=dict)
    distributed: str = "ddp"


def begin(stage: TrainingSection, stage_run: StageRun, model: nn.Module, **key: Any) -> Path | None:
    """The checkpoint to go on from: of the same run, stage, data and earlier stages, or none.

    key: digests of the data and of the weights that the stage starts from, and whatever else
    distinguishes its run. Checkpoints of another run are removed, so that nothing later can take
    them for this one's; the log names the keys that differ. Raises UserError for what is
    not ours and would be removed.
    """
    directory, state = stage_run.directory, PartialState()
    stages = [deciding_weights(settings) for settings in (*stage_run.before, stage)]
    key |= {"stages": stages, "seed": stage_run.seed, "given": stage_run.given}
    path, text = directory / STAGE, json.dumps(key, indent=1)
    owned.check_within(directory, STAGE, f"{CHECKPOINT}[0-9]*")
    before = _resume_key_in(path)
    other = None if before is None else unlike(before, json.loads(text))
    state.wait_for_everyone()
    if not (stage_run.resume and other == []) and state.is_main_process:
        path.unlink(missing_ok=True)  # first: half a checkpoint must not have a resume key
        owned.remove(*_checkpoints(directory))
        owned.claim(directory, STAGE)
        path.write_text(text)
    state.wait_for_everyone()
    if stage_run.resume and other == []:
        return newest_checkpoint(directory, model)
    if stage_run.resume and other is None:
        log.info("%s: no checkpoint of this run; starting afresh", directory)
    elif stage_run.resume and other:
        log.info("%s: of another run (other %s); starting afresh", directory, listed(other))
    return None


def withdraw(directory: Path) -> None:
    """Undo what `begin` has made for a stage of which nothing was trained."""
    (directory / STAGE).unlink(missing_ok=True)
    if [file.name for file in directory.iterdir()] == [owned.MARK]:
        owned.remove(directory)
        with suppress(OSError):  # other stages are in it
            directory.parent.rmdir()


def _resume_key_in(path: Path) -> dict[str, Any] | None:
    """The resume key of an earlier run; None where there is none, or only half of one."""
    try:
        key = read_json(path)
    except (OSError, ValueError):
        return None
    return key if isinstance(key, dict) else None


def _checkpoints(directory: Path) -> list[Path]:
    """Those that this program has made, or begun to, the latest last."""
    names = owned.claimed(directory) or []
    steps = sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))
    every = (directory / f"{CHECKPOINT}{step}" for step in steps)
    return [path for path in every if path.is_dir() and not path.is_symlink()]


def newest_checkpoint(directory: Path, model: nn.Module) -> Path | None:
    """The latest checkpoint that is as it was written, and fits the model.

    The log says what is wrong with later ones. Raises UserError for one of so many processes that
    none of now has its random state.
    """
    for path in reversed(_checkpoints(directory)):
        flaw = _flaw(path, model)
        if flaw is None:
            log.info("%s: going on from it", path)
            return path
        log.info("%s: %s; not used", path, flaw)
    log.info("%s: no whole checkpoint of this run; starting afresh", directory)
    return None


def _flaw(checkpoint: Path, model: nn.Module) -> str | None:
    """The reason why a checkpoint cannot be used; None if it can."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = {str(name): str(digest) for name, digest in manifest["files"].items()}
        run, made_at, processes = (manifest[name] for name in ("run", "step", "processes"))
        if not (isinstance(processes, int) and 0 < processes <= len(files)):
            raise ValueError("no number of processes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "no whole manifest.json, so it is incomplete or of an older version"
    step = int(checkpoint.name.removeprefix(CHECKPOINT))
    if (run, made_at) != (digest_of_file(checkpoint.parent / STAGE), step):
        return "of another run or step"
    states = [f"rng_state_{number}.pth" for number in range(processes)]
    if processes == 1:
        states = ["rng_state.pth"]
    for name in dict.fromkeys((*NEEDED, *states, *files)):
        path = checkpoint / name
        if name not in files or Path(name).name != name or path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if digest_of_file(path) != files[name]:
            return f"{name} is not as it was written"
    with readable(checkpoint), safe_open(checkpoint / WEIGHTS, "pt") as saved:
        if flaw := _misfit(model, saved):
            return flaw
        state = read_json(checkpoint / STATE)
        if not state.keys() <= KEYS:  # or the library fails on it
            return f"{STATE} is of another version of transformers"
        asked = read_json(checkpoint.parent / STAGE)["stages"][-1].get("max_steps", -1)
        is_of_run = asked in (-1, state["max_steps"]) and type(state["global_step"]) is int
        if not is_of_run or not step == state["global_step"] <= state["max_steps"]:
            return f"{STATE} is of another step"
    count = PartialState().num_processes
    if processes != count and step < state["max_steps"]:
        raise UserError(
            f"{checkpoint}: of a run of {processes} processes, and this is one of {count}, which "
            "would go on to other weights; expected as many, or resume=never"
        )
    return None


def _misfit(model: nn.Module, saved: Any) -> str | None:
    """How the saved weights differ from the model's trainable ones; None if they do not."""
    expected = {name: (list(value.shape), value.dtype) for name, value in trainable(model).items()}
    there = {name: saved.get_slice(name) for name in saved.keys()}  # noqa: SIM118
    if expected.keys() != there.keys():
        return "of other modules"
    for name, (shape, dtype) in expected.items():
        tensor = there[name]
        if (tensor.get_shape(), DTYPES.get(tensor.get_dtype())) != (shape, dtype):
            return f"{name} has another shape or dtype than in the model"
    return None


def start_checkpoint(path: Path) -> None:
    """The folder of a new checkpoint, empty but for its mark; half a one gives way."""
    owned.claim(path.parent, path.name)
    owned.remove(path)
    owned.claim(path, *FILES)


def finish_checkpoint(path: Path, kept: int) -> None:
    """Write its manifest, from which on it counts; then remove older ones, so that `kept` stay."""
    step = int(path.name.removeprefix(CHECKPOINT))
    files = {file.name: digest_of_file(file) for file in sorted(path.iterdir()) if file.suffix}
    manifest = {"run": digest_of_file(path.parent / STAGE), "step": step}
    write_json(
        path / MANIFEST, manifest | {"processes": PartialState().num_processes, "files": files}
    )
    every = _checkpoints(path.parent)
    for old in every[: every.index(path)][: 1 - kept or None]:
        if any(owned.strangers(old)):
            log.info("%s: kept, for what is not ours in it", old)
        else:
            owned.remove(old)


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
    """Around reading one: the libraries' errors, for damage or code in it, as one line.

    They read with `weights_only`, so that nothing in it is called.
    """
    odd = (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError)
    try:
        yield
    except UserError:
        raise
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError, *odd) as error:
        broken = isinstance(error, RecursionError) or any(
            message in str(error) for message in BROKEN
        )
        if isinstance(error, RuntimeError) and not broken:
            raise
        raise UserError(
            f"{checkpoint}: cannot be read ({error_reason(error)}); remove it, and the run goes on "
            "from the one before"
        ) from error


@torch.no_grad()
def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Copies none, and raises UserError, for a checkpoint of other modules, shapes or dtypes."""
    with readable(checkpoint), safe_open(checkpoint / WEIGHTS, "pt") as saved:
        if flaw := _misfit(model, saved):
            raise UserError(f"{checkpoint}: {flaw}; remove it")
        for name, value in trainable(model).items():  # one at a time: each process has all
            value.copy_(alike(saved.get_tensor(name), value))


def check_states(checkpoint: Path, saved: Any, optimizer: Optimizer) -> None:
    """Raises UserError for an optimiser's states of other weights, over which kernels may crash.

    saved: what `optimizer.state_dict` gave. Of other optimisers than Adam only the groups are
    looked at.
    """

    def groups(state: dict[str, Any]) -> list[dict[str, Any]]:  # a schedule has the rate
        return [group | {"lr": type(group["lr"])} for group in state["param_groups"]]

    weights = [value for group in optimizer.param_groups for value in group["params"]]
    adam = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam)
    with readable(checkpoint):
        fits = groups(saved) == groups(optimizer.state_dict())
        fits &= not adam or saved["state"].keys() == set(range(len(weights)))
        for number, state in saved["state"].items() if fits and adam else ():
            value = weights[number]
            moments = [(state[name].shape, state[name].dtype) for name in ("exp_avg", "exp_avg_sq")]
            fits &= moments == [(value.shape, value.dtype)] * 2
            fits &= state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"].ndim == 0
    if not fits:
        raise UserError(
            f"{checkpoint}: its optimizer.pt is of other weights than these; remove it, and the "
            "run goes on from the one before"
        )


def check_schedule(checkpoint: Path, saved: Any, optimizer: Any, scheduler: Any) -> None:
    """Raises UserError for a schedule of other rates or of a later step.

    saved, optimizer: what the `state_dict` of the scheduler and of the optimizer gave.
    """
    ours = scheduler.state_dict()
    most = int(checkpoint.name.removeprefix(CHECKPOINT)) * PartialState().num_processes
    with readable(checkpoint):
        rates = [group["lr"] for group in optimizer["param_groups"]]
        fits = saved.keys() == ours.keys() and saved.get("base_lrs") == ours.get("base_lrs")
        fits &= type(saved["last_epoch"]) is int and 0 <= saved["last_epoch"] <= most
        fits &= saved.get("_last_lr", rates) == rates
    if not fits:
        raise UserError(
            f"{checkpoint}: its scheduler.pt is of other rates than these; remove it, and the run "
            "goes on from the one before"
        )
