"""Load a decoder: explicit dtype, no hub code, nothing missing or NaN."""

import logging
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ubmoe.bidirectional import prove_attention, set_attention, set_layers
from ubmoe.config import Config, Layers, ModelSection, UserError, error_reason, listed
from ubmoe.models import gguf, lora, precision
from ubmoe.models.source import ModelSource, as_user_error

log = logging.getLogger(__name__)
# How long processes wait for the first one, which may write a large model; the default is minutes.
PATIENCE = timedelta(hours=6)


def best_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is (under torchrun, this process's own).

    Raises UserError for one that is not here.
    """
    # accelerate counts processes without an accelerator only where the CPU is asked for
    cpu = name == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if name is None:
        return state.device
    expected = "expected cpu, cuda, cuda:1, mps or xpu"
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", name, re.ASCII):
        raise UserError(f"model.device: got {name!r}, {expected}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = error_reason(error)
        raise UserError(f"model.device: {name} is not here ({reason}); {expected}") from error
    return device


def load_model(
    given: ModelSection | ModelSource,
    bidirectional: bool = False,
    layers: Layers = "all",
    keep_sink: bool = False,
) -> PreTrainedModel:
    """The causal LM in eval mode on its device, its attention as asked and proved by a leak test.

    layers: the bidirectional ones; keep_sink: the first token sees itself alone. `all` and false
    leave what a saved encoder says of itself.

    Raises UserError for a missing or broken checkpoint, a model that is not a decoder, tensors that
    the checkpoint lacks (they would be random), and weights that are not finite.
    """
    source = ModelSource.of(given)
    config, settings = source.section, source.decoder_settings()
    device = best_device(config.device)
    dtype = precision.weights_dtype(config.dtype, device)
    # an adapter is merged in fp32, then cast
    keys: dict[str, Any] = {
        "dtype": torch.float32 if config.adapters else dtype,
        "attn_implementation": config.attn_implementation,
    }
    with as_user_error(config):
        if source.file is not None:
            model, report = gguf.model_of(source.file, settings, **keys)
        else:
            keys |= source.keywords | {"config": settings, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.path, **keys)
            model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.name: {config.name} lacks {listed(missing)}; expected a whole causal "
            "language model"
        )
    check_layers(model.config, report["unexpected_keys"], config.name)
    if source.file is None:
        _refuse_whole_numbers(model, Path(source.path))
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        lora.tie_where_equal(model)  # the library keeps a head of its own, and the config's word
    model = lora.merged(model, config.adapters, dtype)
    broken = [key for key, value in model.named_parameters() if not is_finite(value)]
    refuse_not_finite(broken, config.name)
    asked = (layers, keep_sink) if bidirectional else ("all", False)
    set_layers(model.eval().to(device), *asked)
    set_attention(model, bidirectional)
    with as_user_error(config):  # a config may fit the weights and no forward
        proof = prove_attention(model, bidirectional)
    log.info("%s: %s", config.name, proof)
    return model


def load_with_encoder(
    config: Config, source: ModelSource
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model, and its encoder read causally. Raises UserError where they are not alike."""
    path = config.ubmoe.bi or f"{config.output_dir}/bi"
    base = load_model(source)
    encoder = load_model(config.model.model_copy(update={"name": path, "revision": None}))
    one, other = (
        {name: value.shape for name, value in model.named_parameters()} for model in (base, encoder)
    )
    if one != other:
        raise UserError(
            f"ubmoe.bi: {path} has other weights than {config.model.name}; expected what was tuned "
            "from it"
        )
    return base, encoder


def _refuse_whole_numbers(model: PreTrainedModel, folder: Path) -> None:
    """The library casts them without a word. Raises UserError, naming file and tensor."""
    names = {name for name, value in model.named_parameters() if value.is_floating_point()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        for key, kind in kinds.items():
            ours = key in names or f"{model.base_model_prefix}.{key}" in names
            if ours and not kind.startswith(("F", "BF")):
                raise UserError(
                    f"model.name: {path}: {key} is stored as {kind}; expected floating point"
                )


def check_layers(settings: PreTrainedConfig, unexpected: Iterable[str], name: str) -> None:
    """A config that names fewer layers than the file holds would drop the rest in silence."""
    layers = settings.get_text_config().num_hidden_layers
    numbers = (re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", key) for key in unexpected)
    if max((int(number[1]) + 1 for number in numbers if number), default=0) > layers:
        raise UserError(
            f"model.name: {name} has weights of more layers than the {layers} that its "
            "config.json names"
        )


def is_finite(value: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, as its smallest and largest say: both take on NaN.

    40 times faster than to ask each number of a large tensor in bfloat16.
    """
    return not value.numel() or all(bool(end.isfinite()) for end in torch.aminmax(value))


def refuse_not_finite(broken: list[str], name: str) -> None:
    """Raises UserError where any tensor of a model has NaN or infinity."""
    if broken:
        raise UserError(
            f"model.name: {name} has NaN or infinite weights in {listed(broken)}; expected "
            "finite weights"
        )


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """The record's environment of the loaded model."""
    return {
        "model_class": type(model).__name__,
        "parameters": model.num_parameters(),
        "weights": lora.fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else str(model.device),
        "attn_implementation": model.config._attn_implementation,
        "bfloat16": precision.has_bfloat16(model.device),  # what bf16: auto means here
        # sums on a CPU depend on it in their last digits
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
    }
