"""The two-expert mixture: the original ("uni") and the bidirectionally tuned ("bi") FFN.

It is a stock Qwen2-MoE (of Qwen2, Llama and Mistral) or Qwen3-MoE (of Qwen3): expert 0 is uni,
expert 1 is bi, `mlp.gate` is the router of each layer. The shared expert, which Qwen2-MoE demands,
is small and adds exactly zero. With x the input of a layer's FFN and p = softmax(W x) over the two
experts, the layer gives p_uni FFN_uni(x) + p_bi FFN_bi(x) at top_k 2.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.initialization import no_init_weights

from ubmoe import layered
from ubmoe.config import UserError, listed
from ubmoe.models.precision import cast
from ubmoe.moe.routes import BI, UNI, blocks, set_route

SHARED_SIZE = 16  # of the zero expert; size 0 loads in transformers, but not in other engines
FREE = (
    "dtype",
    "use_cache",
    "transformers_version",
    "_name_or_path",
)  # may differ between uni and bi
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The mixture's class, by the dense model's type: what is not here would lose something.
MIXTURES: dict[str, type] = {
    "qwen2": Qwen2MoeConfig,
    "llama": Qwen2MoeConfig,
    "mistral": Qwen2MoeConfig,
    "qwen3": Qwen3MoeConfig,
}


def join(uni: PreTrainedModel, bi: PreTrainedModel, top_k: int = 2) -> PreTrainedModel:
    """The mixture of two dense models that differ in their FFNs only; its routers are zero.

    The routers are float32 whatever the dtype of the rest. Raises UserError for models of other
    families, whose shapes differ, or that differ outside the FFN: the mixture would drop that.
    """
    check_alike(uni, bi)
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(mixture_config(uni.config, top_k))
    cast(model, uni.dtype)
    ffn, rest = _parted(uni.state_dict())
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    model.load_state_dict(rest, strict=False)
    model.tie_weights()
    for number, weights in ((UNI, ffn), (BI, _parted(bi.state_dict())[0])):
        _put_expert(model, number, weights)
    for block in blocks(model):
        block.gate.float()
        block.gate.register_forward_pre_hook(_in_its_dtype)
    model.generation_config = uni.generation_config
    share_layers(bi.config, model.config)
    set_route(model, "learned")
    return model.to(uni.device).eval()


def share_layers(bi: Any, mixture: Any) -> None:
    """The mixture looks both ways in the layers in which the encoder does."""
    if (layers := layered.partial_layers(bi)) is not None:
        setattr(mixture, layered.KEY, layers)


def _in_its_dtype(gate: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A float32 router reads bfloat16 states; a loader casts it, and needs no help."""
    return tuple(each.to(gate.weight.dtype) for each in inputs)


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


def check_alike(uni: PreTrainedModel, bi: PreTrainedModel) -> None:
    """Raises UserError unless both can be joined, and are equal outside the FFN by tensor."""
    for word, model in (("model.name", uni), ("ubmoe.bi", bi)):
        if model.config.model_type not in MIXTURES:
            raise UserError(
                f"{word}: {model.name_or_path} is {model.config.model_type}; expected one of "
                f"{', '.join(MIXTURES)}, of which a stock mixture of experts is known"
            )
    if uni.config.model_type != bi.config.model_type:
        raise UserError(
            f"ubmoe.bi: {bi.name_or_path} is {bi.config.model_type}, and model.name is "
            f"{uni.config.model_type}; expected the same"
        )
    ours, theirs = uni.state_dict(), bi.state_dict()
    shapes = [name for name, value in ours.items() if _shape(theirs.get(name)) != value.shape]
    shapes += [name for name in theirs if name not in ours]
    if shapes:
        raise UserError(f"ubmoe.bi: other shapes than model.name in {listed(shapes)}")
    configs = [mixture_config(model.config, 1).to_dict() for model in (uni, bi)]
    other = [key for key, value in configs[0].items() if value != configs[1][key]]
    if own := [key for key in other if key not in FREE]:
        raise UserError(f"ubmoe.bi: another {listed(own)} than model.name; expected the same")
    if lost := _lost(uni):
        raise UserError(
            f"model.name: {uni.name_or_path} has {listed(lost)}, which the class of its mixture "
            "does not know; expected a model without"
        )
    differ = [
        name
        for name, value in ours.items()
        if ".mlp." not in name and not torch.equal(value, theirs[name].to(value))
    ]
    if differ:
        raise UserError(
            f"ubmoe.bi: differs from model.name outside the FFN, in {listed(differ)}; the mixture "
            "would drop that; expected an encoder tuned with train: [ffn]"
        )


def _lost(dense: PreTrainedModel) -> list[str]:
    """Tensors that the mixture would drop, or would have and the dense model lacks."""
    with torch.device("meta"), no_init_weights():
        mixture = AutoModelForCausalLM.from_config(mixture_config(dense.config, 1))
    rest = set(_parted(mixture.state_dict())[1])
    ffn, own = _parted(dense.state_dict())
    names = tuple(f".mlp.{name}.weight" for name in PROJECTIONS)
    return sorted((rest ^ set(own)) | {name for name in ffn if not name.endswith(names)})


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _parted(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the FFNs, and the rest."""
    ffn = {name: value for name, value in weights.items() if ".mlp." in name}
    return ffn, {name: value for name, value in weights.items() if name not in ffn}


@torch.no_grad()
def _put_expert(model: PreTrainedModel, number: int, ffn: dict[str, Tensor]) -> None:
    for layer, block in enumerate(blocks(model)):
        gate, up, down = (ffn[f"model.layers.{layer}.mlp.{name}.weight"] for name in PROJECTIONS)
        block.experts.gate_up_proj[number].copy_(torch.cat((gate, up)))
        block.experts.down_proj[number].copy_(down)
