"""Which modules of a model train, in full or through adapters."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, set_seed

from ubmoe.config import StageSection, UserError
from ubmoe.models import lora
from ubmoe.models.precision import training_dtypes, uses_bfloat16
from ubmoe.training.checkpoints import StageRun
from ubmoe.training.sharding import sharding

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
        chosen = [name for name in names if not (untied and name.startswith("lm_head."))]
    elif module == "embedding":
        chosen = [name for name, value in model.named_parameters() if value is embedding]
    else:
        module, _, layers = module.partition("@")
        depth = model.config.get_text_config().num_hidden_layers
        if layers and int(layers.rpartition("-")[2]) >= depth:
            raise UserError(
                f"train: {module}@{layers}: expected some of the layers 0 to {depth - 1}"
            )
        chosen = [name for name in names if any(part in name for part in MODULES[module])]
        chosen = [name for name in chosen if _is_in(name, layers)]
    if not chosen:
        known = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
        raise UserError(
            f"train: {type(model).__name__} has no {module} module; it has {', '.join(known)[:300]}"
        )
    return chosen


def _is_in(name: str, layers: str) -> bool:
    """Whether a parameter is in the layers `3-29` or `7`; empty: in any."""
    if not layers:
        return True
    low, _, high = layers.partition("-")
    number = re.search(r"\.(\d+)\.", name)
    return number is not None and int(low) <= int(number[1]) <= int(high or low)


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


@contextmanager
def tuning(
    model: PreTrainedModel, stage: StageSection, stage_run: StageRun
) -> Iterator[dict[str, int]]:
    """Let the stage's modules train, or adapters on them; yields trainable parameters by module.

    Adapters are saved to `<directory>/adapter` and merged when the body has ended well. Afterwards
    everything is frozen, in eval mode, in the dtype that it came in.
    """
    counts = train_only(model, stage.train)
    wrapped = None
    if stage.lora is not None:
        set_seed(stage_run.seed)  # a resumed run draws the same first adapters
        names = [name for module in stage.train for name in named_by(model, module)]
        wrapped = lora.attach(model, names, stage.lora)
        counts = {
            module: _trainable(model, MODULES[module.partition("@")[0]]) for module in stage.train
        }
    bf16 = uses_bfloat16(stage.bf16, model.device)
    distributed = "ddp" if stage.lora is not None else stage_run.distributed  # adapters are small
    with sharding(model, stage, distributed, bf16), training_dtypes(model, bf16):
        yield counts
        if wrapped is not None:
            if PartialState().is_main_process:
                lora.save(wrapped, stage_run.directory / "adapter", len(stage_run.before))
            lora.merge(wrapped)
    model.requires_grad_(False).eval()


def _trainable(model: nn.Module, parts: Sequence[str]) -> int:
    return sum(
        value.numel()
        for name, value in model.named_parameters()
        if value.requires_grad and any(part in name for part in parts)
    )


def announce(stage: StageSection, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Log what a stage is about to train."""
    kind = "full" if stage.lora is None else f"LoRA, rank {stage.lora.rank}"
    tensors = [value for value in model.parameters() if value.requires_grad]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    counts = ", ".join(f"{name} {count:,}" for name, count in report["trainable"].items())
    log.info(
        "stage %s (%s): %d tensors train, %s parameters, %s%s",
        *(stage.objective, kind, len(tensors), counts, "/".join(sorted(dtypes))),
        " under bfloat16 autocast" if uses_bfloat16(stage.bf16, model.device) else "",
    )
    rest = {name: value for name, value in report.items() if name != "trainable"}
    log.info("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in rest.items()))
