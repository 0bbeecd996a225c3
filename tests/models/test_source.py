"""A model's source is resolved once, and what is made from it does not change it."""

import pytest
import transformers
from transformers import AutoTokenizer

from ubmoe.config import ModelSection, UserError
from ubmoe.models.loading import load_model
from ubmoe.models.source import ModelSource
from ubmoe.models.streams import open_weights


@pytest.fixture
def reads(monkeypatch):
    """The paths that a config is read from, from now on."""
    real, paths = transformers.AutoConfig.from_pretrained.__func__, []

    def from_pretrained(cls, path, *arguments, **keys):
        paths.append(path)
        return real(cls, path, *arguments, **keys)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", classmethod(from_pretrained))
    return paths


def test_a_config_is_read_once_for_tokenizer_model_and_weights(saved, tiny_path, reads):
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(saved)
    del reads[:]
    source = ModelSource.of(ModelSection(name=str(saved), device="cpu"))
    assert reads == [str(saved)] and ModelSource.of(source) is source
    load_model(source), open_weights(source, None)
    assert reads == [str(saved)]
    assert source.tokenizer is source.tokenizer  # whose class the library finds by the config
    assert reads.count(str(saved)) <= 2


def test_a_mask_of_one_model_is_not_the_next_ones(saved):
    source = ModelSource.of(ModelSection(name=str(saved), device="cpu"))
    assert load_model(source, True, [0], True).config.bidirectional_layers == [0]
    assert source.attention == "causal" and "bidirectional_layers" not in vars(source.settings)
    assert load_model(source).config.is_causal is True


@pytest.mark.parametrize("name", ["~nobody of this name", "~nobody of this name/cache"])
def test_a_home_of_nobodys_is_no_cache_folder(name, monkeypatch):
    with pytest.raises(UserError, match=f"model.cache: got {name}, and nobody is called so"):
        ModelSource.of(ModelSection(cache=name))
    monkeypatch.setenv("UBMOE_CACHE", name)
    with pytest.raises(UserError, match=f"UBMOE_CACHE: got {name}, and nobody is called so"):
        ModelSource.of(ModelSection())
