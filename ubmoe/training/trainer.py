"""The shared parts of our trainers: their arguments, guards, and the run itself."""

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import is_bitsandbytes_available

from ubmoe.config import TrainingSection, UserError
from ubmoe.models.precision import uses_bfloat16
from ubmoe.training.checkpoints import (
    CHECKPOINT,
    StageRun,
    begin,
    check_schedule,
    check_states,
    finish_checkpoint,
    load_trainable,
    readable,
    save_trainable,
    start_checkpoint,
    withdraw,
)
from ubmoe.training.sharding import gathered, is_sharded, scattered, whole

log = logging.getLogger(__name__)


def arguments(
    section: TrainingSection, stage_run: StageRun, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments, the same for every trainer of ours.

    Raises UserError for a report_to or an optim that is not installed.
    """
    reporters = ["none", *get_available_reporting_integrations()]
    if section.report_to not in reporters:
        raise UserError(
            f"report_to: {section.report_to!r} is not known or not installed; expected one of "
            f"{', '.join(reporters)}"
        )
    if "8bit" in section.optim and not is_bitsandbytes_available():
        raise UserError(
            f"optim: {section.optim} needs the package bitsandbytes; expected "
            "pip install 'ubmoe[8bit]', or adamw_torch_fused"
        )
    flat = {name: getattr(section, name) for name in TrainingSection.model_fields}
    flat["bf16"] = uses_bfloat16(section.bf16, device)
    flat["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    flat["save_total_limit"] = None  # the library would remove whatever is called checkpoint-
    return flat | {
        "output_dir": str(stage_run.directory),
        "seed": stage_run.seed,
        "data_seed": stage_run.seed,
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "logging_first_step": True,  # a run shorter than logging_steps has a loss, too
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "dataloader_drop_last": True,
        "disable_tqdm": not PartialState().is_main_process,
    }


def check_enough_rows(rows: int, section: TrainingSection, key: str) -> None:
    """Raises UserError where the data do not fill one batch of all devices: nothing would train."""
    batch = section.per_device_train_batch_size * PartialState().num_processes
    if rows < batch:
        raise UserError(
            f"{key}: {rows} rows to train on, and a step takes {batch}; lower "
            "per_device_train_batch_size, or add rows"
        )


def run_trainer(
    build: Callable[..., "GuardedTrainer"],
    section: TrainingSection,
    stage_run: StageRun,
    data: Any,
    device: torch.device,
    key: dict[str, Any],
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> list[dict[str, Any]]:
    """Build a trainer on rows of data and run it; returns its log.

    build: the trainer's class with its own arguments. key: of resumption, beside the section:
    digests of its `data`, of the `weights` that it started from, and the like. kind and more: its
    training arguments.
    """
    # A trainer prints its log; stdout is for the path of the result.
    with redirect_stdout(sys.stderr):
        trainer = build(
            args=kind(**arguments(section, stage_run, device), **more),
            train_dataset=data,
        )
        trainer.kept = section.save_total_limit
        bf16 = uses_bfloat16(section.bf16, device)  # what auto was, when the checkpoint was made
        model: Any = trainer.model
        return fit(trainer, begin(section, stage_run, model, rows=len(data), bf16=bf16, **key))


def fit(trainer: Trainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train, resume from a checkpoint, or load a final one; returns the log.

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
    pace = StepTimer()
    trainer.add_callback(pace)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # accelerate's autocast stays in the model's forward, and whatever is scored next would have it
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for name, value in model.named_parameters():
        if value.requires_grad and not torch.isfinite(whole(value.detach())).all():
            raise UserError(f"the last step made {name} infinite; lower learning_rate")
    if not pace.seconds:  # transformers only warns of it
        withdraw(Path(str(trainer.args.output_dir)))
        size = trainer.args.train_batch_size
        raise UserError(
            f"nothing was trained: the rows make no batch of {size}; lower "
            "per_device_train_batch_size, or add rows (a contrastive batch holds no text twice)"
        )
    # transformers' mean loss is of the steps since the last start alone
    trainer.state.log_history[-1].pop("train_loss", None)
    trainer.state.log_history[-1] |= {"seconds_per_step": pace.seconds_per_step()}
    return trainer.state.log_history


class StepTimer(TrainerCallback):
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


class StopOnBadLoss(TrainerCallback):
    """Ends a run at the first step whose gradient or loss is not finite, before it is saved."""

    loss: torch.Tensor | float = 0.0  # of the step, the sum over its batches

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        model: nn.Module = keys["model"]
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        loss, self.loss = self.loss, 0.0
        if (norm + loss).isfinite():  # one look at the device a step, not one each
            return
        if not math.isfinite(loss):
            raise UserError(
                f"step {state.global_step + 1}: the loss is {float(loss)}; lower learning_rate or "
                "raise temperature (the last checkpoint is kept)"
            )
        for name, value in model.named_parameters():
            if value.grad is not None and not torch.isfinite(whole(value.grad)).all():
                raise UserError(
                    f"step {state.global_step + 1}: the gradient of {name} is not finite; "
                    "lower learning_rate or raise temperature (the last checkpoint is kept)"
                )


class GuardedTrainer(Trainer):
    """Saves and loads only what trains, and stops at a loss that is not finite.

    Mixed into the trainers of the stages, in front of the library's own.
    """

    announced = False
    kept = 1  # checkpoints

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        for argument in (*arguments, *keys.values()):
            if isinstance(argument, TrainingArguments):
                # many GPUs are for torchrun, not DataParallel
                argument._n_gpu = min(argument.n_gpu, 1)
        super().__init__(*arguments, **keys)
        self.guard = StopOnBadLoss()
        self.add_callback(self.guard)
        model: Any = self.model
        # transformers' name for a sharded model, which must not be wrapped
        self.sharded = self.is_distributed_loading_by_transformers = is_sharded(model)

    def _build_accelerator_args(self, **keys: Any) -> dict[str, Any]:
        built: dict[str, Any] = super()._build_accelerator_args(**keys)
        for handler in built["kwargs_handlers"]:  # of DDP: each gradient would be there twice
            handler.gradient_as_bucket_view = True
        return built

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def training_step(self, model: nn.Module, *arguments: Any, **keys: Any) -> torch.Tensor:
        if not self.announced:
            log.info("model wrapped in %s", type(model).__name__)
            self.announced = True
        loss = super().training_step(model, *arguments, **keys)
        self.guard.loss = self.guard.loss + loss.detach()
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        path = Path(str(self.args.output_dir)) / f"{CHECKPOINT}{self.state.global_step}"
        if self.args.should_save:
            start_checkpoint(path)
        PartialState().wait_for_everyone()  # each process writes its random state into it
        super()._save_checkpoint(model, trial)
        PartialState().wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(path, self.kept)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save_trainable(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model_to_load = self.accelerator.unwrap_model(self.model)
        load_trainable(model_to_load, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = gathered(optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with readable(checkpoint):
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            read = partial(torch.load, map_location="cpu", weights_only=True)
            saved = read(Path(checkpoint) / OPTIMIZER_NAME, mmap=True)
            check_states(Path(checkpoint), saved, optimizer)
            schedule = read(Path(checkpoint) / SCHEDULER_NAME)
            check_schedule(Path(checkpoint), schedule, saved, scheduler)
            if not self.sharded:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer.load_state_dict(scattered(saved, optimizer))
            scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)
