"""A model without its numbers, and its tensors as they lie on disk, read one after the other.

So a model of any size is compared, cast and copied. What is no plain safetensors file under the
names of the model's class (a GGUF file, pickles, adapters to merge, other names, a stored head that
is tied) is loaded whole on the CPU instead, and read the same way.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from ubmoe.config import ModelSection
from ubmoe.models.digests import fingerprint_of
from ubmoe.models.loading import check_layers, load_model
from ubmoe.models.source import ModelSource, as_user_error
from ubmoe.models.tensors import Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A causal language model as tensors that are read when they are wanted.

    name: as the configuration calls it. model: its class and configs, mostly as shapes alone.
    dtype: of all tensors, whatever it is on disk. tensors: those that are stored, without a tied
    head, in the order of the class.
    """

    name: str
    model: PreTrainedModel
    dtype: torch.dtype
    tensors: dict[str, Stream]

    @property
    def config(self) -> Any:
        return self.model.config

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of the class, by name, a tied head included."""
        return {name: value.shape for name, value in self.model.state_dict().items()}

    def inner(self) -> Iterator[tuple[str, Stream]]:
        """The tensors of the headless model, as it names them."""
        for name, _ in self.model.base_model.named_parameters():
            yield name, self.tensors[f"{self.model.base_model_prefix}.{name}"]

    def fingerprint(self) -> str:
        """As of the loaded model."""
        return fingerprint_of(stream for _, stream in self.inner())


def open_weights(given: ModelSection | ModelSource, dtype: torch.dtype | None) -> Weights:
    """The weights that `load_model` would load, in a dtype; None: that of the model's own files.

    Raises UserError as it does, except for numbers that are not finite: none is read yet.
    """
    source = ModelSource.of(given)
    config, settings = source.section, source.decoder_settings()
    weights = None
    if not config.adapters and source.file is None:
        with as_user_error(config):
            weights = _plain(source, settings)
    if weights is None:
        log.info("%s: loaded whole, since it is not stored tensor by tensor", config.name)
        return of_model(load_model(config.model_copy(update={"device": "cpu"})), config.name, dtype)
    model, tensors, others = weights
    check_layers(settings, others, config.name)
    target = dtype or settings.dtype or next(iter(tensors.values())).dtype
    cast = {name: tensor.to(target) for name, tensor in tensors.items()}
    return Weights(config.name, model, target, cast)


def of_model(model: PreTrainedModel, name: str, dtype: torch.dtype | None = None) -> Weights:
    """The tensors of a model that is in memory; None: of its own dtype."""
    target: Any = dtype or model.dtype
    tensors = {
        key: Stream.from_tensor(value).to(target) for key, value in model.state_dict().items()
    }
    return Weights(name, model, target, _untied(model, tensors))


def shaped(settings: Any) -> Any:
    """The causal language model of a config, without numbers."""
    with torch.device("meta"), no_init_weights():
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def _plain(
    source: ModelSource, settings: Any
) -> tuple[PreTrainedModel, dict[str, Stream], set[str]] | None:
    """The model as shapes, its tensors, and the names of others in its files.

    None where its files are not exactly what its class would hold.
    """
    path, revision = source.path, source.section.revision
    if hasattr(settings, "quantization_config") or find_adapter_config_file(
        path, revision=revision
    ):
        return None
    try:
        streams: dict[str, Stream] = {}
        for file in _files(path, revision):
            streams |= Stream.from_file(Path(file))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whoever loads it says what is wrong
    model = shaped(settings)
    wanted = _untied(model, model.state_dict())
    shapes = {name: stream.shape for name, stream in streams.items() if name in wanted}
    tied = model.state_dict().keys() - wanted.keys()
    if shapes != {name: value.shape for name, value in wanted.items()} or tied & streams.keys():
        return None
    with suppress(OSError):  # where it has none, the class has made one of its config
        named = revision or "main"
        model.generation_config = GenerationConfig.from_pretrained(path, revision=named)
    return model, {name: streams[name] for name in wanted}, streams.keys() - wanted.keys()


def _untied(model: PreTrainedModel, tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the head, where it is the embedding."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _files(path: str, revision: str | None) -> list[str]:
    """The safetensors files of a directory or of a hub model, which is fetched; none: no such."""
    keys: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **keys):
        return [single]
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **keys):
        files, _ = get_checkpoint_shard_files(path, index, revision=revision)
        return files
    return []
