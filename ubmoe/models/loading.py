"""Load a decoder and its tokenizer: explicit dtype, no hub code, nothing missing or NaN."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import (
    logging as transformers_logging,
)

from ubmoe.bidirectional import attention_name, prove_attention, set_attention, set_layers
from ubmoe.bounds import METADATA, expanded, read_json, regular
from ubmoe.config import Config, Layers, ModelSection, Section, UserError, error_reason, listed
from ubmoe.data import templates, tokens
from ubmoe.data.inputs import SUFFIXES
from ubmoe.layered import is_ours
from ubmoe.models import gguf, lora, precision
from ubmoe.models.tokenizer_file import as_stored
from ubmoe.tiny.model import tiny_directory

log = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "*.bin")
# How long processes wait for the first one, which may write a large model; the default is minutes.
PATIENCE = timedelta(hours=6)
LIMITS = ("max_tokens", "lm_max_tokens")  # keys of any section that the context bounds
AnySection = TypeVar("AnySection", bound=Section)


def best_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is (under torchrun, this process's own).

    Raises UserError for one that is not here.
    """
    # accelerate counts processes without an accelerator only if it is told that the CPU is meant
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


def gguf_file(config: ModelSection) -> Path | None:
    """The GGUF file that the model is; None where it is none. Raises UserError."""
    path = expanded(config.name)
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model.name: {path} is no file; expected a GGUF file that is there")
    return path


def source(config: ModelSection) -> str:
    """The directory or hub id to load from; the embedded model is built where it is missing.

    Of a GGUF file, its folder.
    """
    if config.name == "tiny":
        return str(tiny_directory(config.cache))
    if (file := gguf_file(config)) is not None:
        return str(file.parent)
    path = expanded(config.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {path} has no config.json; expected a model directory")
        _check_files(path)
        _check_index(path)
        return str(path)
    if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise UserError(
            f"model.name: {path} is no directory; expected a model directory, a hub id, or tiny"
        )
    return config.name


def _check_files(folder: Path) -> None:
    """The libraries would wait for a pipe for ever, or read a device. Raises UserError."""
    for path in (*folder.iterdir(), *folder.glob("*/*")):
        if path.suffix in SUFFIXES and path.exists():
            try:
                regular(path, METADATA if path.suffix not in (".safetensors", ".bin") else None)
            except OSError as error:
                raise UserError(
                    f"model.name: {path} {error.strerror}; expected a file of the model"
                ) from error


def _check_index(path: Path) -> None:
    """A file of weights beside an index of others is read, and they are not. Raises UserError."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not (single.exists() and index.exists()):
        return
    try:
        named = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        named = set()
    if single.name not in named:
        raise UserError(
            f"model.name: {path} has {single.name} and {index.name} of other files; the libraries "
            f"would read {single.name}; remove it if it is older, or else the index and its files"
        )


def keywords(config: ModelSection) -> dict[str, Any]:
    """What else the libraries are told, to load a tokenizer, a config or a model.

    Told nothing of remote code, transformers would ask on the terminal whether to run it.
    """
    return {"revision": config.revision, "trust_remote_code": False}


def settings_of(config: ModelSection) -> Any:
    """The model's config, as config.json or the GGUF file says it. Raises UserError."""
    with explained(config):
        if (file := gguf_file(config)) is not None:
            return gguf.config_of(file)
        return AutoConfig.from_pretrained(source(config), **keywords(config))


def load_tokenizer(config: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token that the model has. Raises UserError."""
    templates.install()
    whole = settings_of(config)
    with explained(config):
        if (file := gguf_file(config)) is not None:
            tokenizer = gguf.tokenizer_of(file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source(config), **keywords(config))
            if tokenizer("any text", add_special_tokens=False)["input_ids"]:
                tokenizer = as_stored(tokenizer, config.revision)
        some = tokenizer("any text", add_special_tokens=False)["input_ids"]  # it may fail only now
    # Without tokenizer files transformers 5 makes an empty tokenizer, and says nothing.
    if not some:
        raise UserError(f"model.name: {config.name} has no tokenizer; expected tokenizer.json")
    tokens.fit(tokenizer, getattr(whole.get_text_config(), "vocab_size", None))
    context = context_length(whole) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


def saved_attention(config: ModelSection) -> str:
    """The mask that config.json names, causal or bidirectional. Raises UserError."""
    settings = settings_of(config)
    if is_ours(settings):  # its config.json is causal, for language models
        return "bidirectional"
    return attention_name(settings)


def model_type(config: ModelSection) -> str:
    """The family that config.json names, weights or none. Raises UserError."""
    with explained(config):
        return str(AutoConfig.from_pretrained(source(config), **keywords(config)).model_type)


def decoder_config(config: ModelSection) -> Any:
    """The config of a model whose weights are there. Raises UserError for what is no decoder."""
    path = source(config)
    if (
        not gguf_file(config)
        and Path(path).is_dir()
        and not any(match for pattern in WEIGHTS for match in Path(path).glob(pattern))
    ):
        raise UserError(
            f"model.name: {path} has no weights; expected model.safetensors beside config.json"
        )
    settings = settings_of(config)
    if settings.is_encoder_decoder:
        raise UserError(
            f"model.name: {config.name} ({settings.model_type}) is an encoder-decoder; "
            "expected a decoder"
        )
    return settings


def load_model(
    config: ModelSection,
    bidirectional: bool = False,
    layers: Layers = "all",
    keep_sink: bool = False,
) -> PreTrainedModel:
    """The causal LM in eval mode on its device, its attention as asked and proved by a leak test.

    layers: those that look both ways; keep_sink: the first token sees itself alone. `all` and false
    leave what a saved encoder says of itself.

    Raises UserError for a missing or broken checkpoint, a model that is not a decoder, tensors that
    the checkpoint lacks (they would be random), and weights that are not finite.
    """
    settings = decoder_config(config)
    device = best_device(config.device)
    dtype = precision.weights_dtype(config.dtype, device)
    # an adapter is merged in fp32, then cast
    keys: dict[str, Any] = {
        "dtype": torch.float32 if config.adapters else dtype,
        "attn_implementation": config.attn_implementation,
    }
    with explained(config):
        if (file := gguf_file(config)) is not None:
            model, report = gguf.model_of(file, settings, **keys)
        else:
            keys |= keywords(config) | {"config": settings, "output_loading_info": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(source(config), **keys)
            model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.name: {config.name} lacks {listed(missing)}; expected a whole causal "
            "language model"
        )
    check_layers(model.config, report["unexpected_keys"], config.name)
    if gguf_file(config) is None:
        _refuse_whole_numbers(model, Path(source(config)))
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        lora.tie_where_equal(model)  # the library keeps a head of its own, and the config's word
    model = lora.merged(model, config.adapters, dtype)
    broken = [key for key, value in model.named_parameters() if not is_finite(value)]
    refuse_not_finite(broken, config.name)
    asked = (layers, keep_sink) if bidirectional else ("all", False)
    set_layers(model.eval().to(device), *asked)
    set_attention(model, bidirectional)
    log.info("%s: %s", config.name, prove_attention(model, bidirectional))
    return model


def load_with_encoder(config: Config) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model, and its encoder read causally. Raises UserError where they are not alike."""
    path = config.ubmoe.bi or f"{config.output_dir}/bi"
    base = load_model(config.model)
    encoder = load_model(config.model.model_copy(update={"name": path, "revision": None}))
    one, other = (
        {name: value.shape for name, value in each.named_parameters()} for each in (base, encoder)
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


@contextmanager
def explained(config: ModelSection, kind: str = "a decoder") -> Iterator[None]:
    """The libraries' many ways to say that a model cannot be loaded, as one line, and nothing else.

    What they say to the user is as it was afterwards.
    """
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the libraries raise nearly every type; tokenizers may panic
        reason = error_reason(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code of its own (auto_map in its .json files), which is never run; "
                "expected a model that transformers knows"
            )
        revision = f" (revision {config.revision})" if config.revision else ""
        raise UserError(
            f"model.name: {config.name}{revision} cannot be loaded as {kind}: {reason}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


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


def context_length(settings: PreTrainedConfig) -> int | None:
    """Positions that a model was made for, in tokens; None where its config names none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def within_context(config: Config, *sections: str) -> Config:
    """The config, in these sections no limit of tokens beyond the model's context; says which were.

    Every program reads its limits through it, so that training, measuring, saving and scoring cut
    at the same place. Raises UserError for a model whose config cannot be had.
    """
    if context := context_length(settings_of(config.model)):
        for name in sections:
            section = bounded(getattr(config, name), context, name)
            config = config.model_copy(update={name: section})
    return config


def bounded(section: AnySection, context: int, name: str) -> AnySection:
    """The section called `name`, and those in its lists, with no limit of more tokens."""
    changes: dict[str, Any] = {}
    for key, value in section:
        unused = key == "lm_max_tokens" and not getattr(section, "lm_weight", 0)
        if key in LIMITS and value > context and not unused:
            log.info("%s.%s: %d, the model's context, not %d", name, key, context, value)
            changes[key] = context
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            numbered = enumerate(value)
            changes[key] = [bounded(each, context, f"{name}.{key}.{n}") for n, each in numbered]
    return section.model_copy(update=changes)


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What a record says of the loaded model."""
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
