"""Low-rank adapters: trained in place of the modules, saved with their attention mode, merged.

An adapter does not say whether it was trained under the causal or the bidirectional mask, nor on
which weights, and read under the wrong mask (cosine 0.5 to 0.6) or on another model of the same
shape it is silently wrong: ubmoe.json beside it says both.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ubmoe import owned
from ubmoe.bidirectional import Attention, attention_name
from ubmoe.bounds import limited, read_json
from ubmoe.config import LoraSection, UserError, error_reason
from ubmoe.files import replace_directory, write_json
from ubmoe.models.cards import is_hub_id
from ubmoe.models.digests import fingerprint
from ubmoe.models.precision import cast
from ubmoe.models.tensors import Stream

log = logging.getLogger(__name__)
MODE, WEIGHTS = "ubmoe.json", "adapter_model.safetensors"
SECONDS, MEMORY = 10.0, 2**30  # in which all names of modules are matched
PROOF_TOKENS = 16  # on which a merged adapter is compared with itself before
# Ways to begin (init_lora_weights) that set the adapter's weights alone.
STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
TOLERANCE = 1e-3  # of the largest logit; rounding in float32 is far below


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
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = {name.rpartition(".")[0] for name in parameters} & linear
    leaves = {name.rpartition(".")[2] for name in targets}
    alike = {name for name in linear if name.rpartition(".")[2] in leaves}
    return sorted(leaves if alike == targets else targets)


@torch.no_grad()
def save_difference(
    base: PreTrainedModel,
    before: Mapping[str, Stream],
    after: Mapping[str, Stream],
    rank: int,
    directory: Path,
) -> dict[str, float]:
    """The change of linear layers by tuning, as an adapter of that rank for the headless base.

    base: its class, with numbers or without. before, after: the tensors that may differ, named as
    in the headless base, of which two are held at once. Of each difference the nearest matrix of
    the rank (Eckart and Young), which is the difference itself where it was trained as an adapter
    of at most that rank. Returns the rank, the number of parameters, and `kept`: the share of the
    differences' squared norm that the adapter has. Raises UserError for a rank that a matrix cannot
    have, and for models that do not differ.
    """
    tensors: dict[str, Tensor] = {}
    changed: list[str] = []
    kept = total = 0.0
    for name, weight in after.items():
        change = weight.whole().double()
        change -= before[name].whole()
        if not change.any():
            continue
        if rank > min(change.shape):
            raise UserError(f"ubmoe.rank: got {rank}; expected at most {min(change.shape)}")
        out, into = nearest(change, rank)
        kept += float((out @ into).square_().sum())
        total += float(change.square_().sum())
        changed.append(name)
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        for word, factor in (("lora_A", into), ("lora_B", out)):
            tensors[f"{layer}.{word}.weight"] = factor.to(weight.dtype).contiguous()
    if not changed:
        raise UserError("ubmoe.export: adapter: the encoder has the weights of model.name")
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(base.base_model, changed),
        task_type="FEATURE_EXTRACTION",
        base_model_name_or_path=base.name_or_path if is_hub_id(base.name_or_path or "") else None,
        inference_mode=True,
    ).save_pretrained(str(directory))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
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
    owned.claim(directory.parent, directory.name)  # or a later run would find a stranger's folder

    def write(folder: Path) -> None:
        wrapped.save_pretrained(str(folder))
        attention = attention_name(wrapped.config)
        write_mode(folder, fingerprint(wrapped), attention, stages_before)

    replace_directory(directory, write)


def write_mode(folder: Path, base: str, attention: str, stages_before: int = 0) -> None:
    """The mask, how many stages an adapter sits on, and its base's fingerprint."""
    metadata = {"attention": attention, "stages_before": stages_before}
    write_json(folder / MODE, metadata | {"base": base})


def check_base(model: nn.Module, adapter: Path) -> None:
    """Raises ValueError for an adapter that says that it was trained on other weights."""
    base = read_json(adapter / MODE).get("base")
    if base is not None and base != fingerprint(model):
        raise ValueError("it was trained on other weights of the same shape")


@torch.no_grad()
def merge(wrapped: PeftModel) -> None:
    """Add the adapters to the weights below them, in fp32 and then cast, and take them out."""
    wrapped.merge_and_unload()


def adapter_attention(adapter: str, merged_before: int = 0) -> str:
    """The mask that an adapter was trained under: causal or bidirectional.

    merged_before: adapters that are merged before it, as many as the stages that it sits on. Raises
    UserError.
    """
    if not (Path(adapter) / WEIGHTS).is_file():
        raise UserError(
            f"model.adapter: {adapter} has no {WEIGHTS}; expected a LoRA directory as peft saves it"
        )
    path = Path(adapter) / MODE
    expected = 'expected {"attention": "causal"} or {"attention": "bidirectional"} in it'
    try:
        mode = read_json(path)
        attention, before = mode["attention"], mode.get("stages_before", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.adapter: {path} does not say how the adapter was trained "
            f"({error_reason(error)}); {expected}"
        ) from error
    if attention not in get_args(Attention):
        raise UserError(f"model.adapter: {path}: got {attention!r}; {expected}")
    if before not in (0, merged_before):
        raise UserError(
            f"model.adapter: {adapter} was trained on top of {before} earlier stages; expected the "
            "merged encoder (its run's bi/) as model.name, or the adapters of all of them in order"
        )
    return attention


def last_attention(adapters: Sequence[str]) -> str | None:
    """The mask of the last of stacked adapters, under which the model is to be read; None: none."""
    masks = [adapter_attention(adapter, place) for place, adapter in enumerate(adapters)]
    return masks[-1] if masks else None


def merged(model: PreTrainedModel, adapters: Sequence[str], dtype: torch.dtype) -> PreTrainedModel:
    """The model with saved adapters merged in, in order, each in float32 and then cast to `dtype`.

    Each may be of the whole LM or of its headless inside. Raises UserError for what is no LoRA
    adapter, or another model's, and for one whose merging would change what it computes.
    """
    last_attention(adapters)
    for adapter in adapters:
        cast(model, torch.float32)
        try:
            model = _merged(model, adapter)
        except Exception as error:
            reason = error_reason(error)
            raise UserError(
                f"model.adapter: {adapter} does not fit {model.name_or_path}: {reason}"
            ) from error
        cast(model, dtype)
    return model


@torch.no_grad()
def _merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with one adapter merged in, proved on a few tokens to compute what it did apart.

    An adapter beside tied weights moves the embedding or the head, and they part: the head gets
    weights of its own before, and is tied again where the two are still equal.
    """
    check_base(model, Path(adapter))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    embedding: Any = model.get_input_embeddings()
    ids = torch.linspace(0, len(embedding.weight) - 1, PROOF_TOKENS).long()[None].to(model.device)
    with strict():
        wrapped, headed = _wrapped(model, adapter)
    apart = model(input_ids=ids, use_cache=False).logits
    tied = _untie(model, embedding.weight)
    inside: Any = wrapped.merge_and_unload()
    if headed:
        model = inside
    else:
        setattr(model, model.base_model_prefix, inside)
    if tied:
        tie_where_equal(model)
    changed = model(input_ids=ids, use_cache=False).logits - apart
    if not changed.abs().max() <= TOLERANCE * apart.abs().max():
        raise ValueError("merged it would compute something else than apart; expected plain LoRA")
    after = {name: value.shape for name, value in model.named_parameters()}
    if {name: after.get(name) for name in shapes} != shapes or len(after) > len(shapes) + tied:
        raise ValueError(
            "it changes the model's layers or shapes; expected the merged model as model.name"
        )
    return model


def _untie(model: PreTrainedModel, shared: Tensor) -> bool:
    """Give linear layers that share the embedding's weight one of their own, and say if any did."""
    sharing = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight is shared
    ]
    for module in sharing:
        module.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    return bool(sharing)


def tie_where_equal(model: PreTrainedModel) -> None:
    """Tie the head to the embedding, or say in the config that they have parted."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None:
        return
    equal = head.weight is embedding.weight or torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    else:
        log.info("the head is not the embedding, though tied: both are kept, and saved apart")
    for config in (model.config, model.config.get_text_config()):  # peft may have changed it
        config.tie_word_embeddings = equal
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _check_whole_weights(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Raises ValueError where an adapter brings a weight of another shape: a grown vocabulary's."""
    sizes = {name: list(value.shape) for name, value in model.named_parameters()}
    for name, shape in shapes.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if sizes.get(name, shape) != shape:
            raise ValueError(
                f"it was trained with {name} of {shape}, and the model has {sizes[name]}; expected "
                "the model that it was trained on"
            )


def check_patterns(model: nn.Module, adapter: Path) -> None:
    """Raises ValueError for regular expressions that would match the modules' names for ever."""
    settings = read_json(adapter / "adapter_config.json")
    whole = [settings.get(name) for name in ("target_modules", "exclude_modules")]
    ends = [*(settings.get("rank_pattern") or ()), *(settings.get("alpha_pattern") or ())]
    layers = settings.get("layers_pattern") or ()
    patterns = [
        *(name for name in whole if isinstance(name, str)),
        *(rf"(.*\.)?({end})$" for end in ends),
        *(
            rf".*\.{pattern}\.(\d+)\."
            for pattern in ([layers] if isinstance(layers, str) else layers)
        ),
    ]
    try:
        with limited(SECONDS, MEMORY):
            for pattern in patterns:
                for name, _ in model.named_modules():
                    for match in (re.match, re.fullmatch):
                        match(pattern, name)
    except TimeoutError as error:
        raise ValueError(
            f"its adapter_config.json has a regular expression that takes more than {SECONDS:g} s"
        ) from error


def _check_start(said: dict[str, Any]) -> None:
    """Raises ValueError where an adapter began by changing the base's weights: ours are others.

    peft would change them again when it loads, at random, by data that are not there, or in another
    precision.
    """
    start = said.get("init_lora_weights", True)
    changing = "kasa_config" if said.get("kasa_config") else f"init_lora_weights={start}"
    if said.get("kasa_config") or str(start).lower() not in STARTS:
        raise ValueError(
            f"{changing} changes the base's weights, too; expected it as plain LoRA, as peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        )


@contextmanager
def strict() -> Iterator[None]:
    """peft only warns of tensors that it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def _wrapped(model: PreTrainedModel, adapter: str) -> tuple[PeftModel, bool]:
    """The model under its adapter, and whether the adapter is of the LM with its head."""
    settings = read_json(Path(adapter) / "adapter_config.json")
    if settings["peft_type"] != "LORA":
        raise ValueError(f"it is {settings['peft_type']}, expected LORA")
    _check_start(settings)
    with safe_open(Path(adapter) / WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    inside = f"base_model.model.{model.base_model_prefix}."
    headed = any(name.startswith((inside, "base_model.model.lm_head.")) for name in shapes)
    below = model if headed else model.base_model
    _check_whole_weights(below, shapes)
    check_patterns(below, Path(adapter))
    wrapped = PeftModel.from_pretrained(below, adapter)
    if shapes.keys() - get_peft_model_state_dict(wrapped, save_embedding_layers=True).keys():
        raise ValueError("it has tensors for modules that the model lacks")
    return wrapped, headed
