"""What every training stage shares: which modules train, the trainer's arguments, checkpoints.

A checkpoint holds the weights that train, by name, and the optimizer's state: what is frozen is
already on disk where it came from.
"""

import hashlib
import json
import logging
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ubmoe.config import WITHOUT_EFFECT, StageSection, TrainingSection, UserError
from ubmoe.models import lora

log = logging.getLogger(__name__)
WEIGHTS = "trainable.safetensors"

# Parts of parameter names, by the words of the paper's Table 2 (ffn_up_down: FNN_GATE in its code).
MODULES = {
    "ffn": (".mlp.",),
    "attention": (".self_attn.",),
    "ffn_up_down": (".mlp.up_proj.", ".mlp.down_proj."),
}


def named_by(model: PreTrainedModel, module: str) -> list[str]:
    """Names of the parameters that a word of `train` means; a tied lm_head belongs to `embedding`.

    `all` is everything but an untied lm_head. Raises UserError where the model has no such module.
    """
    names = [name for name, _ in model.named_parameters()]
    embedding = model.get_input_embeddings().weight
    if module == "all":
        head = model.get_output_embeddings()
        untied = head is not None and head.weight is not embedding
        found = [name for name in names if not (untied and name.startswith("lm_head."))]
    elif module == "embedding":
        found = [name for name, value in model.named_parameters() if value is embedding]
    else:
        found = [name for name in names if any(part in name for part in MODULES[module])]
    if not found:
        known = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
        raise UserError(
            f"train: {type(model).__name__} has no {module} module; it has {', '.join(known)[:300]}"
        )
    return found


def train_only(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, int]:
    """Freeze everything but the named modules; returns the trainable parameters by module."""
    counts, chosen = {}, set()
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    for module in modules:
        names = named_by(model, module)
        counts[module] = sum(sizes[name] for name in names)
        chosen |= set(names)
    for name, value in model.named_parameters():
        value.requires_grad = name in chosen
    return counts


@dataclass(frozen=True)
class Work:
    """Where a stage keeps its checkpoints, its seed, and the stages that it stands on.

    given: settings besides the stage's own that its weights depend on.
    """

    directory: Path
    seed: int
    resume: bool = False
    before: Sequence[StageSection] = ()
    given: dict[str, Any] = field(default_factory=dict)


@contextmanager
def tuning(model: PreTrainedModel, stage: StageSection, work: Work) -> Iterator[dict[str, int]]:
    """Let the stage's modules train, or adapters on them; yields trainable parameters by module.

    Adapters are saved to `<directory>/adapter` and merged when the body has ended well. Afterwards
    everything is frozen, in eval mode.
    """
    counts = train_only(model, stage.train)
    wrapped = None
    if stage.lora is not None:
        set_seed(work.seed)  # a resumed run draws the same first adapters
        names = [name for module in stage.train for name in named_by(model, module)]
        wrapped = lora.attach(model, names, stage.lora)
        counts = {module: _trainable(model, MODULES[module]) for module in stage.train}
    yield counts
    if wrapped is not None:
        if PartialState().is_main_process:
            lora.save(wrapped, work.directory / "adapter", len(work.before))
        lora.merge(wrapped)
    model.requires_grad_(False).eval()


def _trainable(model: nn.Module, parts: Sequence[str]) -> int:
    return sum(
        value.numel()
        for name, value in model.named_parameters()
        if value.requires_grad and any(part in name for part in parts)
    )


def announce(stage: StageSection, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """What a stage is about to do, once, for the people who watch it."""
    kind = "full" if stage.lora is None else f"LoRA, rank {stage.lora.rank}"
    tensors = [value for value in model.parameters() if value.requires_grad]
    dtypes = {str(each.dtype).removeprefix("torch.") for each in tensors}
    counts = ", ".join(f"{name} {count:,}" for name, count in report["trainable"].items())
    log.info(
        "stage %s (%s): %d tensors train, %s parameters, %s%s",
        *(stage.objective, kind, len(tensors), counts, "/".join(sorted(dtypes))),
        " under bfloat16 autocast" if stage.bf16 else "",
    )
    rest = {name: value for name, value in report.items() if name != "trainable"}
    log.info("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in rest.items()))


def arguments(section: TrainingSection, work: Work, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments, the same for every trainer of ours.

    Raises UserError for a report_to that is not installed.
    """
    reporters = ["none", *get_available_reporting_integrations()]
    if section.report_to not in reporters:
        raise UserError(
            f"report_to: {section.report_to!r} is not known or not installed; expected one of "
            f"{', '.join(reporters)}"
        )
    flat = {name: getattr(section, name) for name in TrainingSection.model_fields}
    flat["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    return flat | {
        "output_dir": str(work.directory),
        "seed": work.seed,
        "data_seed": work.seed,
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "logging_first_step": True,  # a run shorter than logging_steps has a loss, too
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "dataloader_drop_last": True,
        "disable_tqdm": not PartialState().is_main_process,
    }


def begin(stage: TrainingSection, work: Work, **mark: Any) -> Path | None:
    """The checkpoint to go on from: of the same run, stage, data and earlier stages, or none.

    Checkpoints of another run are removed, so that nothing later can take them for this one's.
    """
    directory, state = work.directory, PartialState()
    stages = [each.model_dump(exclude=WITHOUT_EFFECT) for each in (*work.before, stage)]
    mark |= {"stages": stages, "seed": work.seed, "given": work.given}
    path, text = directory / "stage.json", json.dumps(mark, indent=1)
    same = path.exists() and path.read_text() == text
    state.wait_for_everyone()
    if not (work.resume and same) and state.is_main_process:
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    state.wait_for_everyone()
    if work.resume and not same:
        log.info("%s: no checkpoint of this run; starting afresh", directory)
    return newest_checkpoint(directory) if work.resume and same else None


def enough_rows(rows: int, section: TrainingSection, key: str) -> None:
    """Raises UserError where the data do not fill one batch of all devices: nothing would train."""
    batch = section.per_device_train_batch_size * PartialState().num_processes
    if rows < batch:
        raise UserError(
            f"{key}: {rows} rows to train on, and a step takes {batch}; lower "
            "per_device_train_batch_size, or add rows"
        )


def fit(trainer: Trainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train, or go on from a checkpoint, or only load one that is the end; returns the log.

    Raises UserError where nothing was trained, or what was is not finite.
    """
    model: Any = trainer.model
    state = None
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if checkpoint is not None and state is not None and state.global_step >= state.max_steps:
        load_trainable(model, checkpoint)
        log.info("%s: trained to the end before", checkpoint.parent)
        return state.log_history
    pace = Pace()
    trainer.add_callback(pace)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    for name, value in model.named_parameters():
        if value.requires_grad and not torch.isfinite(value).all():
            raise UserError(f"the last step made {name} infinite; lower learning_rate")
    if not pace.seconds:  # transformers only warns of it
        size = trainer.args.train_batch_size
        raise UserError(
            f"nothing was trained: the rows make no batch of {size}; lower "
            "per_device_train_batch_size, or add rows (a contrastive batch holds no text twice)"
        )
    trainer.state.log_history[-1] |= {"seconds_per_step": pace.seconds_per_step()}
    return trainer.state.log_history


class Pace(TrainerCallback):
    """Seconds of a step, once the first one has warmed everything up; no checkpoint is in them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)

    def seconds_per_step(self) -> float:
        return statistics.mean(self.seconds[1:] or self.seconds)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint of other modules."""
    own, saved = trainable(model), load_file(checkpoint / WEIGHTS)
    if own.keys() != saved.keys():
        raise UserError(f"{checkpoint}: of other modules; remove it")
    for name, value in own.items():
        value.copy_(saved[name])


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


class StopOnBadLoss(TrainerCallback):
    """Ends a run at the first step whose gradient or loss is not finite, before it is saved."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        model: nn.Module = keys["model"]
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        if nn.utils.get_total_norm(gradients).isfinite():  # one look at the device, not one each
            return
        for name, value in model.named_parameters():
            if value.grad is not None and not torch.isfinite(value.grad).all():
                raise UserError(
                    f"step {state.global_step + 1}: the gradient of {name} is not finite; "
                    "lower learning_rate or raise temperature (the last checkpoint is kept)"
                )


class Careful(Trainer):
    """Saves and loads only what trains, and stops at a loss that is not finite.

    Mixed into the trainers of the stages, in front of the library's own.
    """

    announced = False

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        for each in (*arguments, *keys.values()):
            if isinstance(each, TrainingArguments):  # many GPUs are for torchrun, not DataParallel
                each._n_gpu = min(each.n_gpu, 1)
        super().__init__(*arguments, **keys)

    def training_step(self, model: nn.Module, *arguments: Any, **keys: Any) -> torch.Tensor:
        if not self.announced:
            log.info("model wrapped in %s", type(model).__name__)
            self.announced = True
        loss = super().training_step(model, *arguments, **keys)
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower "
                "learning_rate or raise temperature (the last checkpoint is kept)"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        own = trainable(self.accelerator.unwrap_model(self.model))
        values = {name: value.detach().contiguous() for name, value in own.items()}
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own = self.accelerator.unwrap_model(self.model)
        load_trainable(own, Path(resume_from_checkpoint))
