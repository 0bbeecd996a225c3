"""One directory that generates and embeds in stock libraries: the mixture, or the two modes.

A directory has two readers. transformers reads config.json: causal. sentence-transformers reads the
same file with the `config_kwargs` of sentence_bert_config.json over it: bidirectional; and its
`model_kwargs`, which can name an adapter in a folder within, where transformers does not look.
"""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, zeros
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ubmoe.bidirectional import attention_name
from ubmoe.config import UserError
from ubmoe.files import replace_directory
from ubmoe.models import lora
from ubmoe.moe.joining import (
    PROJECTIONS,
    SHARED_SIZE,
    check_alike,
    mixture_config,
    share_layers,
)

FORM_FILES = ("modules.json", "config_sentence_transformers.json", "1_Pooling")
FORM = "sentence_bert_config.json"
ADAPTER = "bi"  # the adapter's folder within
SHARD = "5GB"


def encoder_attention(directory: Path) -> str:
    """The mask of a saved encoder, causal or bidirectional.

    Raises UserError for what is not an encoder as train_bi.py saves it.
    """
    needed = (*FORM_FILES, FORM, "config.json")
    if missing := [name for name in needed if not (directory / name).exists()]:
        raise UserError(
            f"ubmoe.bi: {directory} has no {missing[0]}; run train_bi.py with the same config "
            "first, or name an encoder that it saved"
        )
    read = {}
    for name in ("config.json", FORM, "modules.json"):
        try:
            read[name] = json.loads((directory / name).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"ubmoe.bi: {directory / name}: no JSON ({error})") from error
    if not isinstance(read["config.json"], dict) or not isinstance(read[FORM], dict):
        raise UserError(f"ubmoe.bi: {directory}: config.json and {FORM} must hold an object each")
    if "adapter_kwargs" in (read[FORM].get("model_kwargs") or {}):
        raise UserError(
            f"ubmoe.bi: {directory} is a language model with an adapter as its encoder; expected "
            "the encoder that it was made from"
        )
    # sentence-transformers reads config.json with these over it
    return attention_name(read["config.json"] | read[FORM].get("config_kwargs", {}))


def save_mixture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
) -> None:
    """The joined model, causal for transformers, with the encoder's mask for sentence-transformers.

    encoder: the bi directory, whose prompt, pooling, length and mask are taken over. made: how the
    model was made, for its card.
    """

    def write(folder: Path) -> None:
        model.config.use_cache = True
        model.save_pretrained(folder)
        _finish(folder, tokenizer, encoder, {}, MIXTURE_CARD + made)

    replace_directory(directory, write)


def save_modes(
    uni: PreTrainedModel,
    bi: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
    shard: str = SHARD,
) -> None:
    """Both dense models in one checkpoint, nothing stored twice: each reader gets its own exactly.

    A mixture's class with one expert a layer. Its config names every layer dense, so transformers
    reads the uni FFN under the dense names; sentence-transformers' names none, so it reads the bi
    FFN as the only expert, of weight 1. The bi tensors are in files of their own. Raises UserError
    for models that differ outside the FFN.
    """
    check_alike(uni, bi)
    layers = list(range(uni.config.num_hidden_layers))

    def write(folder: Path) -> None:
        config = mixture_config(uni.config, top_k=1, experts=1)
        config.norm_topk_prob = True
        config.mlp_only_layers = layers
        share_layers(bi.config, config)
        config.use_cache = True
        config.save_pretrained(folder)
        if uni.generation_config is not None:
            uni.generation_config.save_pretrained(folder)
        shared = hasattr(config, "shared_expert_intermediate_size")
        groups = {"uni": _uni_tensors(uni), "bi": _bi_tensors(bi, shared)}
        _save_weights(folder, groups, shard)
        _finish(folder, tokenizer, encoder, {"mlp_only_layers": []}, MODES_CARD + made)

    replace_directory(directory, write)


def save_adapter(
    uni: PreTrainedModel,
    bi: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
    rank: int,
) -> dict[str, float]:
    """The dense base model as it is, and the bi FFNs as a low-rank adapter for the other reader.

    transformers finds a model of its own class, to the bit, and nothing else; sentence-transformers
    loads the adapter over it by peft. Returns what `lora.save_difference` says. Raises UserError
    for models that differ outside the FFN.
    """
    check_alike(uni, bi)
    report: dict[str, float] = {}

    def write(folder: Path) -> None:
        uni.save_pretrained(folder)
        config = copy.deepcopy(uni.config)
        share_layers(bi.config, config)
        config.is_causal = True  # what is not in config.json cannot be switched
        config.save_pretrained(folder)
        report.update(lora.save_difference(uni, bi, rank, folder / ADAPTER))
        lora.write_mode(folder / ADAPTER, uni, encoder_attention(encoder))
        adapter = {"adapter_kwargs": {"subfolder": ADAPTER}}
        _finish(folder, tokenizer, encoder, {}, ADAPTER_CARD + made, {"model_kwargs": adapter})

    replace_directory(directory, write)
    return report


def _uni_tensors(uni: PreTrainedModel) -> dict[str, Tensor]:
    tensors = dict(uni.state_dict())
    if uni.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _bi_tensors(bi: PreTrainedModel, shared: bool) -> dict[str, Tensor]:
    """The bi FFNs as expert 0, with a router of one row and, where the class has one, the shared
    expert that adds zero.
    """
    width = bi.config.hidden_size
    still = partial(zeros, dtype=bi.dtype)
    tensors: dict[str, Tensor] = {}
    inner: Any = bi.base_model
    for layer, block in enumerate(inner.layers):
        prefix = f"model.layers.{layer}.mlp"
        for name in PROJECTIONS:
            tensors[f"{prefix}.experts.0.{name}.weight"] = getattr(block.mlp, name).weight
        tensors[f"{prefix}.gate.weight"] = still((1, width))
        if not shared:
            continue
        for name in PROJECTIONS:
            shape = (width, SHARED_SIZE) if name == "down_proj" else (SHARED_SIZE, width)
            tensors[f"{prefix}.shared_expert.{name}.weight"] = still(shape)
        tensors[f"{prefix}.shared_expert_gate.weight"] = still((1, width))
    return tensors


def _save_weights(folder: Path, groups: dict[str, dict[str, Tensor]], shard: str) -> None:
    """Each group in files of its own, and one index over all of them."""
    places: dict[str, str] = {}
    for group, tensors in groups.items():
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern=f"model-{group}{{suffix}}.safetensors", max_shard_size=shard
        )
        for file, names in split.filename_to_tensors.items():
            part = {name: tensors[name].detach().cpu().contiguous() for name in names}
            save_file(part, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
    size = sum(value.nbytes for tensors in groups.values() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _finish(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    switch: dict[str, Any],
    card: str,
    more: dict[str, Any] | None = None,
) -> None:
    """What is beside the weights: tokenizer, the encoder's form with its switch, the card."""
    tokenizer.save_pretrained(folder)
    for name in FORM_FILES:
        put = shutil.copytree if (encoder / name).is_dir() else shutil.copy
        put(encoder / name, folder / name)  # type: ignore[operator]
    own = {"is_causal": encoder_attention(encoder) == "causal"}
    form = json.loads((encoder / FORM).read_text(encoding="utf-8"))
    form |= {"config_kwargs": own | switch} | (more or {})
    (folder / FORM).write_text(json.dumps(form, indent=4, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


USE = """
```python
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

language_model = AutoModelForCausalLM.from_pretrained(directory)  # causal
tokenizer = AutoTokenizer.from_pretrained(directory)
encoder = SentenceTransformer(directory)  # its mask, prompt, pooling and length are saved
```

Plain `AutoModel.from_pretrained(directory)` is causal. Engines that know the class but read only
config.json can generate with it; they cannot embed with it.
"""
MIXTURE_CARD = f"""---
library_name: transformers
tags: [ubmoe, mixture-of-experts, sentence-transformers]
---
# A uni- and bi-directional mixture of experts

A mixture whose expert 0 is the original FFN of a causal language model and whose expert 1 is the
same FFN tuned bidirectionally for sentence embeddings. Attention, norms and embeddings are the
original's. A router in each layer weighs the two. A shared expert, if any, adds exactly zero.
{USE}"""
MODES_CARD = f"""---
library_name: transformers
tags: [ubmoe, mixture-of-experts, sentence-transformers]
---
# Two modes in one checkpoint

As a language model this is exactly the original model; as an encoder it is exactly the
bidirectionally tuned one. Both share everything but their FFNs, and each runs at dense speed.
{USE}
Each reader reports the other mode's FFN as unexpected tensors: that is how it works. It is promised
for transformers and sentence-transformers only: other engines stop at tensors that they did not
build. There, serve the original model and the dense encoder, which the two modes equal.
"""
ADAPTER_CARD = f"""---
library_name: transformers
tags: [ubmoe, lora, sentence-transformers]
---
# A language model, and an encoder as an adapter of it

As a language model this is exactly the original model, in its own class. As an encoder it is the
same model with the low-rank adapter in `{ADAPTER}/`, which sentence-transformers loads by peft.
{USE}
Engines that know the class generate with it; the adapter is a LoRA as peft saves it. On a model
hub, write this repository's own id as `base_model_name_or_path` in `{ADAPTER}/adapter_config.json`.
"""
