"""A GGUF file as a model: its config, its tokenizer and its weights, parsed once a process.

The library reads some of the keys and passes over the others. Here every key of the architecture
and every tensor is read, or is known to change no number, or the file is refused by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.integrations.gguf import gguf_tokenizer_mapping as tokenizers_of
from transformers.integrations.gguf import reader
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

# Architectures, as transformers calls their configs.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# Keys below the architecture's name, as the config calls them.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Further ones that are read, and those of Gemma alone.
READ = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
GEMMA = {
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
# Keys that change no number, where they have one of these values; None: whatever they have.
WITHOUT_EFFECT: dict[str, tuple[object, ...] | None] = {
    "rope.scaling.finetuned": None,
    "pooling_type": None,
    "tensor_data_layout": None,
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# Keys below tokenizer.ggml, likewise; the numbers of special tokens are names alone.
TOKENIZER = {
    *("model", "pre", "tokens", "scores", "token_type", "merges", "token_type_count"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
}
TOKENIZER_WITHOUT_EFFECT = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "escape_whitespaces": (True,),
}
NAMED = ("bos", "eos", "unknown", "padding")  # special tokens that a tokenizer has names for
CONTROL, USER_DEFINED = 3, 4  # kinds of token that a text is cut at
LARGE_GEMMAS = {46, 62}  # layers of the 27B models, which scale attention by the width
STRINGS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def _splitting(*first: pre_tokenizers.PreTokenizer, gpt2: bool = False) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    return pre_tokenizers.Sequence([*first, last])


def _pattern(name: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(tokenizers_of.GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")


@dataclass(frozen=True)
class Bytes:
    """A byte-level tokenizer, as tokenizer.ggml.pre names it.

    whole: a piece that is a token needs no merges. first: a text begins with the bos token where
    the file does not say.
    """

    splits: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    whole: bool = False
    first: bool = False


GPT2 = Bytes(_splitting(gpt2=True))
DIGITS = Bytes(_splitting(pre_tokenizers.Digits(individual_digits=True), gpt2=True))
LLAMA3 = Bytes(_splitting(_pattern("llama-bpe")), whole=True, first=True)
QWEN2 = Bytes(_splitting(_pattern("qwen2")), normalizers.NFC())
BYTES = {
    **dict.fromkeys(("gpt-2", "phi-2"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    "tekken": Bytes(_splitting(_pattern("tekken")), whole=True, first=True),
    "qwen2": QWEN2,
}
# Old files do not say; of these families all models split alike.
UNSAID = {"qwen2": QWEN2, "qwen3": QWEN2}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its shape in torch's order, its kind, its first byte in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    def read(self, blob: np.ndarray) -> np.ndarray:
        """Its numbers, in float32."""
        per_block, size = GGML_QUANT_SIZES[self.kind]
        if self.kind == GGMLQuantizationType.F32:
            per_block, size = 1, 4
        row = (self.shape[-1] if self.shape else 1) // per_block * size
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        data = blob[self.start : self.start + rows * row]
        if len(data) < rows * row:
            raise ValueError("the file ends in the middle of a tensor")
        values = dequantize(np.ascontiguousarray(data).reshape(rows, row), self.kind)
        return values.reshape(self.shape)


@dataclass(frozen=True)
class File:
    """A file's metadata, and where its tensors lie in it."""

    path: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key below the architecture's name."""
        return self.keys.get(f"{self.architecture}.{key}", default)

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ValueError(f"it has no key {self.architecture}.{key}")
        return value


def open_file(path: Path) -> File:
    """The file, parsed at the first call. Raises ValueError for what is not understood in it."""
    state = path.stat()
    return _opened(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2)
def _opened(path: str, size: int, changed: int) -> File:
    blob = reader._mapped(path)
    keys, count, place = reader._read_metadata(blob, path, STRINGS)
    entries, place = reader._read_tensor_table(blob, count, place)
    alignment = keys.get("general.alignment", 32)
    start = -(-place // alignment) * alignment
    tensors = {
        name: Tensor(shape, GGMLQuantizationType(kind), start + offset)
        for name, shape, kind, offset in entries
    }
    file = File(path, keys, tensors)
    _check_keys(file)
    return file


def _check_keys(file: File) -> None:
    if file.architecture not in FAMILIES:
        raise ValueError(
            f"a GGUF file of architecture {file.architecture}; expected {', '.join(FAMILIES)}, or "
            "the model's own directory"
        )
    read = SIZES.keys() | READ | (GEMMA if file.architecture.startswith("gemma") else set())
    for key, value in file.keys.items():
        space, _, name = key.partition(".")
        if space == file.architecture:
            known = name in read or _harmless(WITHOUT_EFFECT, name, value)
        elif key.startswith("tokenizer.ggml."):
            name = name.removeprefix("ggml.")
            known = name in TOKENIZER or name.endswith(("_token_id", "_token_ids"))
            known = known or _harmless(TOKENIZER_WITHOUT_EFFECT, name, value)
        else:
            known = not key.startswith("rope.")
        if not known:
            said = f"{key} = {value}" if isinstance(value, str | int | float) else key
            raise ValueError(
                f"a GGUF file with {said[:120]}, which is not read here and may change its "
                "numbers; expected the model's own directory"
            )


def _harmless(table: Mapping[str, tuple[object, ...] | None], name: str, value: object) -> bool:
    allowed = table.get(name, ())
    return allowed is None or value in allowed


def config_of(path: Path) -> Any:
    """The config that the file describes. Raises ValueError."""
    file = open_file(path)
    heads, blocks = file["attention.head_count"], file["block_count"]
    if blocks > len(file.tensors):  # the library would build them all
        raise ValueError(f"a GGUF file of {blocks} blocks and {len(file.tensors)} tensors")
    width = file.get("attention.key_length") or file["embedding_length"] // heads
    settings: dict[str, Any] = {new: file[old] for old, new in SIZES.items()}
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(key, width) != width:
            raise ValueError(
                f"a GGUF file with {file.architecture}.{key} = {file[key]} and heads of {width}; "
                "expected the same"
            )
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    settings |= {
        "head_dim": width,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "vocab_size": rows or file["vocab_size"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rotations(file, width),
        "architectures": None,
    }
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    settings |= {new: _id_of(file, old) for old, new in names.items()}
    if file.architecture in ("llama", "qwen3"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if file.architecture == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if file.architecture.startswith("gemma"):
        settings |= _of_gemma(file, settings)
    for key, value in settings.items():
        if isinstance(value, list) and key != "layer_types":
            raise ValueError(f"a GGUF file whose layers differ in {key}; expected one value")
    return AutoConfig.for_model(FAMILIES[file.architecture], **settings)


def _id_of(file: File, name: str) -> int | None:
    number: int | None = file.keys.get(f"tokenizer.ggml.{name}_token_id")
    return number


def _rotations(file: File, width: int) -> dict[str, Any]:
    """The rotary embedding of queries and keys, in the config's words."""
    theta = {"rope_theta": file.get("rope.freq_base", 10000.0)}
    factor = file.get("rope.scaling.factor") or file.get("rope.scale_linear") or 1.0
    for key, value in (("rope.freq_base", theta["rope_theta"]), ("rope.scaling.factor", factor)):
        if isinstance(value, str | list) or not (isfinite(value) and value > 0):
            raise ValueError(
                f"a GGUF file with {file.architecture}.{key} = {value}; expected a positive number"
            )
    kind = file.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"a GGUF file with {file.architecture}.rope.scaling.type = {kind}; expected none, "
            "linear, yarn, or the model's own directory"
        )
    scaled: dict[str, Any] = {"rope_type": "default"}
    if kind != "none" and factor != 1:
        scaled = {"rope_type": kind, "factor": factor}
    context = file.get("rope.scaling.original_context_length") or file["context_length"]
    if scaled["rope_type"] == "yarn":
        scaled["original_max_position_embeddings"] = context
        for key in ("beta_fast", "beta_slow"):
            if (value := file.get(f"rope.scaling.yarn_{key}")) is not None:
                scaled[key] = value
    if "rope_freqs.weight" in file.tensors:
        if file.architecture != "llama":  # nobody says what it would mean there
            raise ValueError(f"a GGUF file of {file.architecture} with rope_freqs.weight")
        if scaled["rope_type"] != "default":
            raise ValueError(f"a GGUF file with rope_freqs.weight and {kind} scaling; expected one")
        scaled = _by_frequency(file, width)
    return scaled | theta


def _by_frequency(file: File, width: int) -> dict[str, Any]:
    """A divisor for every frequency, as Llama 3.1's files hold them.

    Only longrope takes any divisors, for short and long texts, which are the same ones here.
    """
    factors = file.tensors["rope_freqs.weight"].read(reader._mapped(file.path)).tolist()
    if len(factors) != width // 2 or not all(isfinite(factor) and factor > 0 for factor in factors):
        raise ValueError(
            f"a GGUF file whose rope_freqs.weight is no {width // 2} positive numbers; expected a "
            "divisor of each frequency"
        )
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": file["context_length"],
    }


def _of_gemma(file: File, settings: dict[str, Any]) -> dict[str, Any]:
    """Windows, scales and caps; what files do not say is as llama.cpp has it."""
    third = file.architecture == "gemma3"
    layers = file["block_count"]
    pattern = file.get("attention.sliding_window_pattern", 6 if third else 2)
    if isinstance(pattern, int):
        pattern = [bool((number + 1) % pattern) for number in range(layers)]
    wide = layers in LARGE_GEMMAS
    keys: dict[str, Any] = {
        "sliding_window": file["attention.sliding_window"],
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "query_pre_attn_scalar": file["embedding_length"] // file["attention.head_count"]
        if wide
        else settings["head_dim"],
    }
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        keys[key] = file.get(key, None if third else default) or None
    if third:
        local = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10000.0)}
        whole = settings["rope_parameters"]
        keys["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}
    return keys


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes. Raises ValueError for one that is not known."""
    file = open_file(path)
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in file.keys.items()}
    kind, splits = said.get("model"), None
    if kind == "gpt2":
        splits = _splits(file, said.get("pre"))
    elif kind != "llama":
        raise ValueError(f"a GGUF file with a tokenizer {kind}; expected gpt2 or llama")
    wanted = {key: said[key] for key in ("tokens", "scores", "token_type", "merges") if key in said}
    backend, _ = tokenizers_of.convert_gguf_tokenizer(
        file.architecture, wanted | {"tokenizer_type": kind}
    )
    if splits is not None:
        backend.normalizer, backend.pre_tokenizer = splits.normalizer, splits.splits
        backend.model.ignore_merges = splits.whole
    elif not file.architecture.startswith("gemma"):
        marks = [normalizers.Prepend("▁")] if said.get("add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    added = backend.get_added_tokens_decoder()
    for number, sort in enumerate(said.get("token_type", ())):
        token = said["tokens"][number]
        if (
            sort not in (CONTROL, USER_DEFINED)
            or getattr(added.get(number), "content", "") == token
        ):
            continue
        if backend.encode(token, add_special_tokens=False).ids != [
            number
        ]:  # Gemma's spaces are one
            raise ValueError(f"a GGUF file whose token {token!r} would be cut into others")
    first = kind == "llama" or (splits is not None and splits.first)
    names = {"unknown": "unk_token", "padding": "pad_token"}
    special = {names.get(name, f"{name}_token"): _id_of(file, name) for name in NAMED}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(path.parent),
        chat_template=file.keys.get("tokenizer.chat_template"),
        add_bos_token=said.get("add_bos_token", first),
        add_eos_token=said.get("add_eos_token", False),
        **{key: None if token is None else said["tokens"][token] for key, token in special.items()},
    )


def _splits(file: File, name: str | None) -> Bytes:
    """How the text is split before the merges."""
    if name in (None, "default"):
        return UNSAID.get(file.architecture, GPT2)
    if name not in BYTES:
        raise ValueError(
            f"a GGUF file with tokenizer.ggml.pre = {name}, which is not known here; expected "
            f"{', '.join(BYTES)}, or the model's own directory"
        )
    return BYTES[str(name)]


def shaped(settings: Any, dtype: torch.dtype, **keys: Any) -> Any:
    """A causal language model of a config; its numbers are never drawn."""
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=False, **keys
        )
    model.tie_weights()
    return model


def model_of(path: Path, settings: Any, dtype: torch.dtype, **keys: Any) -> tuple[Any, Any]:
    """The model of that config, and the names of what it has and the file has not.

    keys: further ones of the class. Raises ValueError for a tensor that the class does not have.
    """
    file = open_file(path)
    model = shaped(settings, dtype, **keys)
    kind: Any = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    blob, missing = reader._mapped(file.path), dict(model.named_parameters())
    for name, tensor in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name not in names:
            raise ValueError(f"a GGUF file with a tensor {name}, which {file.architecture} has not")
        values = torch.tensor(processor.process(weights=tensor.read(blob), name=name).weights)
        place = missing.pop(names[name])
        if place.shape != values.shape:
            raise ValueError(
                f"a GGUF file whose {name} is {list(values.shape)}; expected {list(place.shape)}"
            )
        place.data.copy_(values)
    model.config.name_or_path = str(path.parent)
    return model, {"missing_keys": set(missing), "unexpected_keys": set()}
