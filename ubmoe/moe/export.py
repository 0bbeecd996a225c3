"""One directory that generates and embeds in stock libraries: the mixture, or the two modes.

A directory has two readers. transformers reads config.json: causal. sentence-transformers reads the
same file with the `config_kwargs` of sentence_bert_config.json over it: bidirectional; and its
`model_kwargs`, which can name an adapter in a folder within, where transformers does not look.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ubmoe.bidirectional import attention_name
from ubmoe.bounds import read_json
from ubmoe.config import UserError, error_reason, shown
from ubmoe.files import replace_directory
from ubmoe.models import cards, lora
from ubmoe.models.streams import Weights
from ubmoe.models.tensors import SHARD, write_model
from ubmoe.moe.joining import (
    expert,
    mixture_config,
    save_configs,
    write_mixture,
    zero_expert,
    zero_routers,
)

MODULES = "modules.json"
FORM_FILES = (MODULES, "config_sentence_transformers.json", "1_Pooling")
FORM = "sentence_bert_config.json"
ADAPTER = "bi"  # the adapter's folder within


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
    for name in ("config.json", FORM, MODULES):
        try:
            read[name] = read_json(directory / name)
        except (OSError, ValueError) as error:
            said = error_reason(error)
            raise UserError(f"ubmoe.bi: {directory / name}: no JSON ({said})") from error
    _check_form(directory, read)
    if "adapter_kwargs" in (read[FORM].get("model_kwargs") or {}):
        raise UserError(
            f"ubmoe.bi: {directory} is a language model with an adapter as its encoder; expected "
            "the encoder that it was made from"
        )
    # sentence-transformers reads config.json with these over it
    return attention_name(read["config.json"] | (read[FORM].get("config_kwargs") or {}))


def _check_form(directory: Path, read: dict[str, Any]) -> None:
    """Raises UserError for files of another shape, and for a module's folder beyond the encoder's:
    what it names is copied.
    """
    if not isinstance(read["config.json"], dict) or not isinstance(read[FORM], dict):
        raise UserError(f"ubmoe.bi: {directory}: config.json and {FORM} must hold an object each")
    for name in ("config_kwargs", "model_kwargs"):
        if not isinstance(read[FORM].get(name) or {}, dict):
            raise UserError(f"ubmoe.bi: {directory / FORM}: {name} must be an object")
    said = read[MODULES]
    modules = said if isinstance(said, list) and said else [said]
    for number, item in enumerate(modules):
        given = item if isinstance(item, dict) else {}
        kind, place = given.get("type"), given.get("path")
        known = isinstance(kind, str) and isinstance(place, str)
        if not known or (number and (place in ("", "..") or place != Path(str(place)).name)):
            raise UserError(
                f"ubmoe.bi: {directory / MODULES}: got {shown(item)}; expected modules with a type "
                "and a path, the name of a folder in it"
            )


def save_mixture(
    uni: Weights,
    bi: Weights,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
    top_k: int = 2,
    norm_topk_prob: bool = False,
) -> None:
    """The mixture, causal for transformers, with the encoder's mask for sentence-transformers.

    encoder: the bi directory, whose prompt, pooling, length and mask are taken over. made: how the
    model was made, for its card. Its routers are zero: `joining.save_routers` puts others there.
    """

    def write(folder: Path) -> None:
        write_mixture(uni, bi, folder, top_k, norm_topk_prob)
        _finish(folder, tokenizer, encoder, {}, MIXTURE_CARD + made)

    replace_directory(directory, write)


def save_modes(
    uni: Weights,
    bi: Weights,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
    shard: str = SHARD,
) -> None:
    """Both dense models in one checkpoint, nothing stored twice: each reader gets its own exactly.

    A mixture's class with one expert a layer. Its config names every layer dense, so transformers
    reads the uni FFN under the dense names; sentence-transformers' names none, so it reads the bi
    FFN as the only expert, of weight 1. The bi tensors are in files of their own.
    """

    def write(folder: Path) -> None:
        config = mixture_config(uni.config, top_k=1, experts=1)
        config.norm_topk_prob = True
        config.mlp_only_layers = list(range(uni.config.num_hidden_layers))
        save_configs(uni, bi, config, folder)
        added = zero_routers(bi, 1, bi.dtype) | zero_expert(bi, config)
        write_model({"uni": uni.tensors, "bi": expert(bi, 0) | added}, folder, shard)
        _finish(folder, tokenizer, encoder, {"mlp_only_layers": []}, MODES_CARD + made)

    replace_directory(directory, write)


def save_adapter(
    uni: Weights,
    bi: Weights,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    directory: Path,
    made: str,
    rank: int,
    shard: str = SHARD,
) -> dict[str, float]:
    """The dense base model as it is, and the bi FFNs as a low-rank adapter for the other reader.

    transformers finds a model of its own class, to the bit, and nothing else; sentence-transformers
    loads the adapter over it by peft. Returns what `lora.save_difference` says, and raises what it
    raises.
    """
    report: dict[str, float] = {}

    def write(folder: Path) -> None:
        config = copy.deepcopy(uni.config)
        config.architectures = [type(uni.model).__name__]
        config.is_causal = True  # what is not in config.json cannot be switched
        save_configs(uni, bi, config, folder)
        before, after = (
            {name: tensor for name, tensor in weights.inner() if ".mlp." in name}
            for weights in (uni, bi)
        )
        report.update(lora.save_difference(uni.model, before, after, rank, folder / ADAPTER))
        lora.write_mode(folder / ADAPTER, uni.fingerprint(), encoder_attention(encoder))
        write_model({"": uni.tensors}, folder, shard)
        adapter = {"adapter_kwargs": {"subfolder": ADAPTER}}
        _finish(folder, tokenizer, encoder, {}, ADAPTER_CARD + made, {"model_kwargs": adapter})

    replace_directory(directory, write)
    return report


def _finish(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Path,
    switch: dict[str, Any],
    card: str,
    more: dict[str, Any] | None = None,
) -> None:
    """Write the files beside the weights: tokenizer, the encoder's form and switch, the card."""
    tokenizer.save_pretrained(folder)
    modules = read_json(encoder / MODULES)
    folders = (module["path"] for module in modules[1:])  # a pooling's, and a whitening's
    for name in {*FORM_FILES, *folders}:
        put = shutil.copytree if (encoder / name).is_dir() else shutil.copy
        put(encoder / name, folder / name)  # type: ignore[operator]
    mask = {"is_causal": encoder_attention(encoder) == "causal"}
    form = read_json(encoder / FORM)
    form |= {"config_kwargs": mask | switch} | (more or {})
    (folder / FORM).write_text(json.dumps(form, indent=4, ensure_ascii=False), encoding="utf-8")
    if modules[0]["type"].startswith("ubmoe."):
        card += OWN_MODULE
        card = card.replace("SentenceTransformer(directory)", TRUSTED)
    cards.write(folder, METADATA, card)


USE = f"""
`.` is the folder of this card.

```python
{cards.START}
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

language_model = AutoModelForCausalLM.from_pretrained(directory)  # causal
tokenizer = AutoTokenizer.from_pretrained(directory)
prompt = tokenizer("The dog", return_tensors="pt")
answer = language_model.generate(**prompt, max_new_tokens=16)
encoder = SentenceTransformer(directory)  # its mask, prompt, pooling and length are saved
vectors = encoder.encode(["The dog sleeps.", "A cat sat in the garden."])
```

Plain `AutoModel.from_pretrained(directory)` is causal. Engines that know the class but read only
config.json can generate with it; they cannot embed with it. The encoder's mask wants transformers
5.2 or newer: an older one would read it causally without a word.
"""
TRUSTED = "SentenceTransformer(directory, trust_remote_code=True)"
OWN_MODULE = """
The encoder's form needs a module of the package `ubmoe`: install it, and load the encoder with
`SentenceTransformer(directory, trust_remote_code=True)`.
"""
METADATA: dict[str, Any] = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["ubmoe", "mixture-of-experts", "sentence-transformers", "sentence-similarity"],
}
MIXTURE_CARD = f"""# A uni- and bi-directional mixture of experts

A mixture whose expert 0 is the original FFN of a causal language model and whose expert 1 is the
same FFN tuned bidirectionally for sentence embeddings. Attention, norms and embeddings are the
original's. A router in each layer weighs the two. A shared expert, if any, adds exactly zero.
{USE}"""
MODES_CARD = f"""# Two modes in one checkpoint

As a language model this is exactly the original model; as an encoder it is exactly the
bidirectionally tuned one. Both share everything but their FFNs, and each runs at dense speed.
{USE}
Each reader reports the other mode's FFN as unexpected tensors: that is how it works. It is promised
for transformers and sentence-transformers only: other engines stop at tensors that they did not
build. There, serve the original model and the dense encoder, which the two modes equal.
"""
ADAPTER_CARD = f"""# A language model, and an encoder as an adapter of it

As a language model this is exactly the original model, in its own class. As an encoder it is the
same model with the low-rank adapter in `{ADAPTER}/`, which sentence-transformers loads by peft.
{USE}
Engines that know the class generate with it; the adapter is a LoRA as peft saves it. On a model
hub its `{ADAPTER}/adapter_config.json` must name this repository as `base_model_name_or_path`:
`hub.push` writes it.
"""
