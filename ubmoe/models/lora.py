"""Low-rank adapters: trained in place of the modules, saved with their attention mode, merged.

An adapter does not say whether it was trained under the causal or the bidirectional mask, nor on
which weights, and read under the wrong mask (cosine 0.5 to 0.6) or on another model of the same
shape it is silently wrong: ubmoe.json beside it says both.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ubmoe.bidirectional import Attention, attention_name
from ubmoe.config import LoraSection, UserError
from ubmoe.files import replace_directory, write_json
from ubmoe.models.digests import fingerprint

MODE = "ubmoe.json"


def attach(model: PreTrainedModel, parameters: Sequence[str], settings: LoraSection) -> PeftModel:
    """Put adapters on the linear layers that own the named parameters, in place; only they train.

    Raises UserError where none of the parameters is a linear layer's weight.
    """
    if hasattr(model.config, "num_experts"):
        raise UserError(
            "bi.stages.N.lora: on a mixture, adapters would reach the shared expert only; expected "
            "lora: null, or the dense model to be tuned before it is joined"
        )
    targets = _targets(model, parameters)
    if not targets:
        raise UserError(
            f"bi.stages.N.lora: {type(model).__name__} has no linear layers in these modules; "
            "expected lora: null"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works, and saves
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(model, config)
    return wrapped


def _targets(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """The linear layers that own the named parameters; by short names, as people write them, where
    these mean no others.
    """
    linear = {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    targets = {name.rpartition(".")[0] for name in parameters} & linear
    leaves = {name.rpartition(".")[2] for name in targets}
    alike = {name for name in linear if name.rpartition(".")[2] in leaves}
    return sorted(leaves if alike == targets else targets)


@torch.no_grad()
def save_difference(
    base: PreTrainedModel, tuned: PreTrainedModel, rank: int, directory: Path
) -> dict[str, float]:
    """What tuning changed in linear layers, as an adapter of that rank for the headless base.

    Of each difference the nearest matrix of the rank (Eckart and Young), which is the difference
    itself where it was trained as an adapter of at most that rank. Returns the rank, the number of
    parameters, and `kept`: the share of the differences' squared norm that the adapter has. Raises
    UserError for a rank that a matrix cannot have, and for models that do not differ.
    """
    before, inner = base.base_model.state_dict(), tuned.base_model
    tensors: dict[str, Tensor] = {}
    kept = total = 0.0
    for name, weight in inner.named_parameters():
        change = weight.double() - before[name].double()
        if not change.any():
            continue
        if rank > min(change.shape):
            raise UserError(f"ubmoe.rank: got {rank}; expected at most {min(change.shape)}")
        out, into = nearest(change, rank)
        kept += float((out @ into).square().sum())
        total += float(change.square().sum())
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        for word, factor in (("lora_A", into), ("lora_B", out)):
            tensors[f"{layer}.{word}.weight"] = factor.to(base.dtype).cpu().contiguous()
    if not tensors:
        raise UserError("ubmoe.export: adapter: the encoder has the weights of model.name")
    names = [name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors]
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(inner, [f"{name}.weight" for name in names]),
        task_type="FEATURE_EXTRACTION",
        base_model_name_or_path=base.name_or_path,
        inference_mode=True,
    ).save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    count = sum(value.numel() for value in tensors.values())
    return {"rank": rank, "parameters": count, "kept": kept / total}


def nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(m, n) -> (m, r) and (r, n), whose product is the nearest of that rank.

    One of them holds singular vectors, of the smaller Gram matrix, the other what they project to.
    """
    if change.shape[0] > change.shape[1]:
        into, out = nearest(change.T, rank)
        return out.T, into.T
    basis = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]
    return basis, basis.T @ change


def save(wrapped: PeftModel, directory: Path, stages_before: int) -> None:
    """The adapter as peft saves it, and ubmoe.json, which says how it was trained."""

    def write(folder: Path) -> None:
        wrapped.save_pretrained(str(folder))
        write_mode(folder, wrapped, attention_name(wrapped.config), stages_before)

    replace_directory(directory, write)


def write_mode(folder: Path, wrapped: nn.Module, attention: str, stages_before: int = 0) -> None:
    """The mask, how many stages an adapter sits on, and what tells its base apart."""
    metadata = {"attention": attention, "stages_before": stages_before}
    write_json(folder / MODE, metadata | {"base": fingerprint(wrapped)})


def check_base(model: nn.Module, adapter: Path) -> None:
    """Raises ValueError for an adapter that says that it was trained on other weights."""
    base = json.loads((adapter / MODE).read_text()).get("base")
    if base is not None and base != fingerprint(model):
        raise ValueError("it was trained on other weights of the same shape")


@torch.no_grad()
def merge(wrapped: PeftModel) -> None:
    """Add the adapters to the weights below them, in fp32 and then cast, and take them out."""
    wrapped.merge_and_unload()


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in a dtype; buffers stay: rotary frequencies are float32."""
    for value in model.parameters():
        value.data = value.data.to(dtype)
    return model


def adapter_attention(adapter: str) -> str:
    """The mask that an adapter was trained under: causal or bidirectional. Raises UserError."""
    path = Path(adapter) / MODE
    expected = 'expected {"attention": "causal"} or {"attention": "bidirectional"} in it'
    try:
        mode = json.loads(path.read_text())
        attention, before = mode["attention"], mode.get("stages_before", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.adapter: {path} does not say how the adapter was trained "
            f"({type(error).__name__}); {expected}"
        ) from error
    if attention not in get_args(Attention):
        raise UserError(f"model.adapter: {path}: got {attention!r}; {expected}")
    if before:
        raise UserError(
            f"model.adapter: {adapter} was trained on top of {before} earlier stages; expected the "
            "merged encoder (its run's bi/) as model.name"
        )
    return attention


def merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with a saved adapter merged in, be it of the whole LM or of its headless inside.

    Raises UserError for what is no LoRA adapter, or another model's.
    """
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"model.adapter: {adapter} has no adapter_model.safetensors; expected a LoRA "
            "directory as peft saves it"
        )
    adapter_attention(adapter)
    try:
        check_base(model, Path(adapter))
        with strict():
            wrapped, headed = _wrapped(model, adapter, weights)
        inside: Any = wrapped.merge_and_unload()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.adapter: {adapter} does not fit {model.name_or_path}: {reason}"
        ) from error
    if headed:
        return inside
    setattr(model, model.base_model_prefix, inside)
    model.tie_weights()
    return model


@contextmanager
def strict() -> Iterator[None]:
    """peft only warns of tensors that it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def _wrapped(model: PreTrainedModel, adapter: str, weights: Path) -> tuple[PeftModel, bool]:
    """The model under its adapter, and whether the adapter is of the LM with its head."""
    kind = json.loads((Path(adapter) / "adapter_config.json").read_text())["peft_type"]
    if kind != "LORA":
        raise ValueError(f"it is {kind}, expected LORA")
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    inside = f"base_model.model.{model.base_model_prefix}."
    headed = any(name.startswith((inside, "base_model.model.lm_head.")) for name in names)
    wrapped = PeftModel.from_pretrained(model if headed else model.base_model, adapter)
    if len(get_peft_model_state_dict(wrapped)) != len(names):
        raise ValueError("it has tensors for modules that the model lacks")
    return wrapped, headed
