"""Where a model is read from, resolved once a run: its path, its config, its tokenizer.

Programs make one ModelSource and pass it on, so that all parts of a run read the same files.
"""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from ubmoe.bidirectional import Attention, attention_name
from ubmoe.bounds import METADATA, expanded, read_json, regular
from ubmoe.config import Config, ModelSection, Section, UserError, error_reason, shown
from ubmoe.data import templates, tokens
from ubmoe.data.inputs import SUFFIXES
from ubmoe.layered import is_ours
from ubmoe.models import gguf
from ubmoe.models.tokenizer_file import as_stored
from ubmoe.tiny.model import tiny_directory

log = logging.getLogger(__name__)
WEIGHTS = ("*.safetensors", "*.bin")
LIMITS = ("max_tokens", "lm_max_tokens")  # keys of any section that the context bounds
DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # as families call it
MOST_LAYERS = 1000
AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class ModelSource:
    """The model that a section `model` names, located and read.

    path: the directory or hub id that the libraries load from; of a GGUF file its folder. file: the
    GGUF file, if it is one. settings: the model's config, as it is stored.
    """

    section: ModelSection
    path: str
    file: Path | None
    settings: PreTrainedConfig

    @classmethod
    def of(cls, given: "ModelSection | ModelSource") -> "ModelSource":
        """Resolve a section; the embedded model is built where it is missing. Raises UserError."""
        if isinstance(given, ModelSource):
            return given
        with as_user_error(given):
            if (file := _gguf_file(given)) is not None:
                return cls(given, str(file.parent), file, gguf.config_of(file))
            path = _path(given)
            return cls(given, path, None, AutoConfig.from_pretrained(path, **_keywords(given)))

    def at(self, folder: Path | str) -> "ModelSource":
        """A model of the same run in another folder, loaded alike. Raises UserError."""
        changes = {"name": str(folder), "revision": None, "adapter": None}
        return self.of(self.section.model_copy(update=changes))

    @property
    def keywords(self) -> dict[str, Any]:
        """Further arguments of the libraries, to load a tokenizer or a model."""
        return _keywords(self.section)

    @property
    def attention(self) -> Attention:
        """The mask that its config.json names."""
        if is_ours(self.settings):  # which says causal, for language models
            return "bidirectional"
        return attention_name(self.settings)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, with a padding token that the model has. Raises UserError."""
        templates.install()
        with as_user_error(self.section):
            if self.file is not None:
                tokenizer = gguf.tokenizer_of(self.file)
            else:
                tokenizer = AutoTokenizer.from_pretrained(self.path, **self.keywords)
                if tokenizer("any text", add_special_tokens=False)["input_ids"]:
                    tokenizer = as_stored(tokenizer, self.section.revision)
            some = tokenizer("any text", add_special_tokens=False)["input_ids"]  # it may fail now
        # Without tokenizer files transformers 5 makes an empty tokenizer, and says nothing.
        if not some:
            raise UserError(
                f"model.name: {self.section.name} has no tokenizer; expected tokenizer.json"
            )
        tokens.fit(tokenizer, getattr(self.settings.get_text_config(), "vocab_size", None))
        context = context_length(self.settings) or tokenizer.model_max_length
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        return tokenizer

    def decoder_settings(self) -> Any:
        """A copy of its config, which a model may change. Raises UserError for what is no decoder,
        or has no weights.
        """
        folder = Path(self.path)
        if (
            self.file is None
            and folder.is_dir()
            and not any(match for pattern in WEIGHTS for match in folder.glob(pattern))
        ):
            raise UserError(
                f"model.name: {folder} has no weights; expected model.safetensors beside "
                "config.json"
            )
        if self.settings.is_encoder_decoder:
            raise UserError(
                f"model.name: {self.section.name} ({self.settings.model_type}) is an "
                "encoder-decoder; expected a decoder"
            )
        return copy.deepcopy(self.settings)

    def within_context(self, config: Config, *sections: str) -> Config:
        """The config, in these sections no limit of tokens beyond the model's context.

        Every program reads its limits through it, so that training, measuring, saving and scoring
        cut at the same place; the log says which were lowered.
        """
        if context := context_length(self.settings):
            for name in sections:
                section = bounded(getattr(config, name), context, name)
                config = config.model_copy(update={name: section})
        return config


def _keywords(config: ModelSection) -> dict[str, Any]:
    """Without one about remote code transformers would ask on the terminal whether to run it."""
    return {"revision": config.revision, "trust_remote_code": False}


def _gguf_file(config: ModelSection) -> Path | None:
    """The GGUF file that the model is, or None. Raises UserError."""
    path = expanded(config.name)
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model.name: {path} is no file; expected a GGUF file that is there")
    return path


def _path(config: ModelSection) -> str:
    """The directory or hub id to load from. Raises UserError."""
    if config.name == "tiny":
        _check_cache(config)
        return str(tiny_directory(config.cache))
    path = expanded(config.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {path} has no config.json; expected a model directory")
        _check_files(path)
        _check_depth(path / "config.json")
        _check_index(path)
        return str(path)
    if path.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise UserError(
            f"model.name: {path} is no directory; expected a model directory, a hub id, a .gguf "
            "file, or tiny"
        )
    return config.name


def _check_cache(config: ModelSection) -> None:
    """A folder called ~somebody would be made. Raises UserError for a home of nobody's."""
    folder = config.cache or os.environ.get("UBMOE_CACHE") or ""
    if str(expanded(folder)).startswith("~"):
        name = "model.cache" if config.cache else "UBMOE_CACHE"
        raise UserError(f"{name}: got {folder}, and nobody is called so; expected a folder")


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


def _check_depth(path: Path) -> None:
    """The libraries would build whatever number of layers a config names. Raises UserError."""
    try:
        whole = read_json(path)
    except (OSError, ValueError):
        return  # whoever loads it says what is wrong
    for config in (whole, *(whole.values() if isinstance(whole, dict) else ())):
        for name in DEPTH:
            number = config.get(name) if isinstance(config, dict) else None
            if isinstance(number, int | float) and number > MOST_LAYERS:
                raise UserError(
                    f"model.name: {path}: {name}: got {shown(number)}; expected at most "
                    f"{MOST_LAYERS}"
                )


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


@contextmanager
def as_user_error(config: ModelSection, kind: str = "a decoder") -> Iterator[None]:
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


def context_length(settings: PreTrainedConfig) -> int | None:
    """Positions that a model was made for, in tokens; None where its config names none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


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
            changes[key] = [bounded(item, context, f"{name}.{key}.{n}") for n, item in numbered]
    return section.model_copy(update=changes)
