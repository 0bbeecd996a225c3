"""What every training stage shares: which modules train, the trainer's arguments, checkpoints."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ubmoe.config import TrainingSection, UserError

log = logging.getLogger(__name__)

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


def arguments(
    section: TrainingSection, directory: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of transformers' TrainingArguments, the same for every trainer of ours."""
    flat = {name: getattr(section, name) for name in TrainingSection.model_fields}
    flat["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    return flat | {
        "output_dir": str(directory),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "dataloader_drop_last": True,
        "disable_tqdm": not PartialState().is_main_process,
    }


def begin(directory: Path, mark: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from: of the same run, which `mark` tells, or none.

    Checkpoints of another run are removed, so that nothing later can take them for this one's.
    """
    state, path, text = PartialState(), directory / "stage.json", json.dumps(mark, indent=1)
    same = path.exists() and path.read_text() == text
    state.wait_for_everyone()
    if not (resume and same) and state.is_main_process:
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    state.wait_for_everyone()
    if resume and not same:
        log.info("%s: no checkpoint of this run; starting afresh", directory)
    return newest_checkpoint(directory) if resume and same else None


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
