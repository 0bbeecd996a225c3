"""The two-expert mixture: the original ("uni") and the bidirectionally tuned ("bi") FFN.

It is a stock Qwen2-MoE (of Qwen2, Llama and Mistral) or Qwen3-MoE (of Qwen3): expert 0 is uni,
expert 1 is bi, `mlp.gate` is the router of each layer. The shared expert, which Qwen2-MoE demands,
is small and adds exactly zero. With x the input of a layer's FFN and p = softmax(W x) over the two
experts, the layer gives p_uni FFN_uni(x) + p_bi FFN_bi(x) at top_k 2.

It is written from the two models' tensors as they are read, and no dense model is built.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from ubmoe import layered
from ubmoe.bidirectional import attending, attention_name, prove_attention
from ubmoe.config import ModelSection, MoeSection, UserError, listed
from ubmoe.files import replace
from ubmoe.models.loading import is_finite, load_model, refuse_not_finite
from ubmoe.models.source import ModelSource
from ubmoe.models.streams import Weights, of_model, shaped
from ubmoe.models.tensors import SHARD, Stream, write_file, write_model
from ubmoe.moe.routers import router_weights
from ubmoe.moe.routes import BI, UNI, blocks, route_of, set_route

log = logging.getLogger(__name__)
ROUTERS = "routers"  # the files of a mixture's routers
SHARED_SIZE = 16  # of the zero expert; size 0 loads in transformers, but not in other engines
# What may differ between uni and bi.
FREE = (
    *("dtype", "transformers_version", "_name_or_path", "architectures", "is_causal", "use_cache"),
    layered.KEY,
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The mixture's class, by the dense model's type: what is not here would lose something.
MIXTURES: dict[str, type] = {
    "qwen2": Qwen2MoeConfig,
    "llama": Qwen2MoeConfig,
    "mistral": Qwen2MoeConfig,
    "qwen3": Qwen3MoeConfig,
}


def write_mixture(
    uni: Weights,
    bi: Weights,
    folder: Path,
    top_k: int = 2,
    norm_topk_prob: bool = False,
    shard: str = SHARD,
) -> None:
    """The mixture's configs and tensors into a folder; its routers are zero, in a file of theirs.

    The routers are float32 whatever the dtype of the rest.
    """
    config = mixture_config(uni.config, top_k)
    config.norm_topk_prob = norm_topk_prob
    save_configs(uni, bi, config, folder)
    rest = _parted(uni.tensors)[1]
    groups = {
        "uni": rest | expert(uni, UNI),
        "bi": expert(bi, BI) | zero_expert(uni, config),
        ROUTERS: zero_routers(uni, 2, torch.float32),
    }
    write_model(groups, folder, shard)


def save_configs(uni: Weights, bi: Weights, config: Any, folder: Path) -> None:
    """config.json with the encoder's mask where it is one of ours, generation_config.json."""
    share_mask(bi.config, config)
    config.dtype = uni.dtype
    config.save_pretrained(folder)
    if uni.model.generation_config is not None:
        uni.model.generation_config.save_pretrained(folder)


def expert(dense: Weights, number: int) -> dict[str, Stream]:
    """The FFNs of a dense model, named as an expert of its mixture."""
    ffn = _parted(dense.tensors)[0]
    return {
        name.replace(".mlp.", f".mlp.experts.{number}."): tensor for name, tensor in ffn.items()
    }


def zero_routers(dense: Weights, rows: int, dtype: torch.dtype) -> dict[str, Stream]:
    """Routers to so many experts."""
    still = Stream.from_tensor(torch.zeros(rows, dense.config.hidden_size, dtype=dtype))
    return {f"{layer}.gate.weight": still for layer in _layers(dense)}


def zero_expert(dense: Weights, config: Any) -> dict[str, Stream]:
    """The shared expert that adds zero, where the mixture's class has one."""
    size, width = getattr(config, "shared_expert_intermediate_size", None), config.hidden_size
    if size is None:
        return {}
    still = partial(torch.zeros, dtype=dense.dtype)
    parts = {f"shared_expert.{name}": still(size, width) for name in PROJECTIONS}
    parts |= {"shared_expert.down_proj": still(width, size), "shared_expert_gate": still(1, width)}
    return {
        f"{layer}.{name}.weight": Stream.from_tensor(value)
        for layer in _layers(dense)
        for name, value in parts.items()
    }


def _layers(dense: Weights) -> list[str]:
    return [f"model.layers.{number}.mlp" for number in range(dense.config.num_hidden_layers)]


def save_routers(model: PreTrainedModel, folder: Path) -> None:
    """The routers of a mixture anew, beside its other tensors, which are as `write_mixture` left
    them.
    """
    tensors = {name: Stream.from_tensor(value) for name, value in router_weights(model).items()}
    replace(folder / f"model-{ROUTERS}.safetensors", lambda path: write_file(tensors, path))


def load_mixture(given: ModelSection | ModelSource, attention: str) -> PreTrainedModel:
    """A mixture to be trained: its routers float32, and its masks proved by both routes.

    attention: of the route bi, causal or bidirectional; uni is causal. Raises UserError.
    """
    model = load_model(given)
    for block in blocks(model):
        block.gate.float()
        block.gate.register_forward_pre_hook(_in_its_dtype)
    set_route(model, "learned")
    for route, mask in (("uni", "causal"), ("bi", attention)):
        bidirectional = mask == "bidirectional"
        with route_of(model, route), attending(model, bidirectional):  # type: ignore[arg-type]
            log.info("route %s: %s", route, prove_attention(model, bidirectional))
    return model


def join_models(
    uni: PreTrainedModel, bi: PreTrainedModel | SentenceTransformer, top_k: int = 2
) -> PreTrainedModel:
    """The mixture of two models in memory, with routers of zero, as `ubmoe.join` documents it."""
    one = of_model(uni, "model.name")
    inner: Any = bi[0].model if isinstance(bi, SentenceTransformer) else bi
    other = _with_head(inner, one) if inner.base_model is inner else of_model(inner, "ubmoe.bi")
    check_alike(one, other)
    dtype: Any = str(uni.dtype).removeprefix("torch.")
    with TemporaryDirectory() as folder:
        write_mixture(one, other, Path(folder), top_k)
        section = ModelSection(name=folder, dtype=dtype, device=str(uni.device))
        mixture = load_mixture(section, attention_name(inner.config))
    mixture.name_or_path = uni.name_or_path  # the folder is gone
    return mixture


def _with_head(inner: Any, dense: Weights) -> Weights:
    """A headless model's tensors under the names of its causal language model, whose head it has
    from `dense`.
    """
    prefix = dense.model.base_model_prefix
    tensors = {
        f"{prefix}.{name}": Stream.from_tensor(value) for name, value in inner.state_dict().items()
    }
    tensors = {name: tensors.get(name, tensor) for name, tensor in dense.tensors.items()}
    return Weights("ubmoe.bi", shaped(inner.config), dense.dtype, tensors)


def share_mask(bi: Any, mixture: Any) -> None:
    """The mixture reads as the encoder does: its layers, and its first token."""
    for key in (layered.KEY, layered.SINK):
        if (value := getattr(bi, key, None)) is not None:
            setattr(mixture, key, value)


def _in_its_dtype(gate: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A float32 router reads bfloat16 states; a loader casts it, and needs no help."""
    return tuple(input.to(gate.weight.dtype) for input in inputs)


def mixture_config(dense: Any, top_k: int, experts: int = 2) -> Any:
    """The config of a dense model's mixture, every layer sparse, causal. Raises UserError."""
    kind = MIXTURES[dense.model_type]
    known = kind().to_dict().keys() | {"head_dim"}
    same = {key: value for key, value in dense.to_dict().items() if key in known}
    moe = {
        "model_type": kind.model_type,  # type: ignore[attr-defined]
        "architectures": [f"{kind.__name__.removesuffix('Config')}ForCausalLM"],
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "is_causal": True,
        "use_cache": True,
    }
    if kind is Qwen2MoeConfig:
        bias = dense.model_type == "qwen2" or getattr(dense, "attention_bias", False)
        moe |= {"qkv_bias": bias, "shared_expert_intermediate_size": SHARED_SIZE}
    return kind(**same | moe | _window(dense, kind))


def _window(dense: Any, kind: type) -> dict[str, Any]:
    """How the mixture's class says which layers see a window. Raises UserError where it cannot."""
    window = getattr(dense, "sliding_window", None)
    types = getattr(dense, "layer_types", None)
    if types is None:  # Mistral slides everywhere or nowhere
        types = ["sliding_attention" if window else "full_attention"] * dense.num_hidden_layers
    slides = "sliding_attention" in types
    if kind is Qwen2MoeConfig:
        return {"layer_types": types, "sliding_window": window, "use_sliding_window": slides}
    if slides and "full_attention" in types:
        raise UserError(
            f"model.name: its layer_types mix sliding and full attention, which "
            f"{kind.__name__.removesuffix('Config')} cannot say; expected one of them"
        )
    return {"sliding_window": window if slides else None, "use_sliding_window": slides}


def check_joins(model_type: str, settings: MoeSection) -> None:
    """Raises UserError where a mixture is made of a type of model that has none.

    Of Gemma's types Gemma 4 alone has a sparse class, and it normalises values, too.
    """
    if settings.mixes and model_type not in MIXTURES:
        raise UserError(
            f"ubmoe.export: {model_type} has no stock mixture of experts, as {', '.join(MIXTURES)} "
            f"have; got {', '.join(settings.export)}, expected [adapter]"
        )


def check_pair(uni: Weights, bi: Weights) -> None:
    """As `check_alike`, of two models for which no mixture is known."""
    _check_same(uni, bi, lambda config: config.to_dict())
    _check_numbers(uni, bi)


def check_alike(uni: Weights, bi: Weights) -> None:
    """Raises UserError unless both can be joined, are finite, and equal outside the FFN by tensor.

    Their numbers are read once, block by block.
    """
    for word, side in (("model.name", uni), ("ubmoe.bi", bi)):
        if side.config.model_type not in MIXTURES:
            raise UserError(
                f"{word}: {side.model.name_or_path} is {side.config.model_type}; expected one of "
                f"{', '.join(MIXTURES)}, of which a stock mixture of experts is known"
            )
    _check_same(uni, bi, lambda config: mixture_config(config, 1).to_dict())
    if lost := _lost(uni):
        raise UserError(
            f"model.name: {uni.model.name_or_path} has {listed(lost)}, which the class of its "
            "mixture does not know; expected a model without"
        )
    _check_numbers(uni, bi)


def _check_same(uni: Weights, bi: Weights, settings: Callable[[Any], dict[str, Any]]) -> None:
    """Raises UserError for other types, shapes or settings of their configs."""
    if uni.config.model_type != bi.config.model_type:
        raise UserError(
            f"ubmoe.bi: {bi.model.name_or_path} is {bi.config.model_type}, and model.name is "
            f"{uni.config.model_type}; expected the same"
        )
    ours, theirs = uni.shapes(), bi.shapes()
    shapes = [name for name, shape in ours.items() if theirs.get(name) != shape]
    shapes += [name for name in theirs if name not in ours]
    if shapes:
        raise UserError(f"ubmoe.bi: other shapes than model.name in {listed(shapes)}")
    given = settings(bi.config)
    other = [key for key, value in settings(uni.config).items() if value != given.get(key)]
    if extra := [key for key in other if key not in FREE]:
        raise UserError(f"ubmoe.bi: another {listed(extra)} than model.name; expected the same")


def _check_numbers(uni: Weights, bi: Weights) -> None:
    """Raises UserError for what is not finite, or differs outside the FFN."""
    broken: dict[str, set[str]] = {uni.name: set(), bi.name: set()}
    differ = set()
    for name, stream in uni.tensors.items():
        for ours, theirs in zip(stream.blocks(), bi.tensors[name].blocks(), strict=True):
            for model, block in ((uni, ours), (bi, theirs)):
                if not is_finite(block):
                    broken[model.name].add(name)
            if ".mlp." not in name and not torch.equal(ours, theirs):
                differ.add(name)
    for where, names in broken.items():
        refuse_not_finite([name for name in uni.tensors if name in names], where)
    if differ:
        raise UserError(
            f"ubmoe.bi: differs from model.name outside the FFN, in "
            f"{listed([name for name in uni.tensors if name in differ])}; the mixture "
            "would drop that; expected an encoder tuned with train: [ffn]"
        )


def _lost(dense: Weights) -> list[str]:
    """Tensors that the mixture would drop, or would have and the dense model lacks."""
    mixture = shaped(mixture_config(dense.config, 1))
    rest = set(_parted(mixture.state_dict())[1])
    ffn, others = _parted(dense.shapes())
    names = tuple(f".mlp.{name}.weight" for name in PROJECTIONS)
    return sorted((rest ^ set(others)) | {name for name in ffn if not name.endswith(names)})


def _parted(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the FFNs, and the rest."""
    ffn = {name: value for name, value in weights.items() if ".mlp." in name}
    return ffn, {name: value for name, value in weights.items() if name not in ffn}
