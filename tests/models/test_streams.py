"""Tensors read one at a time are those that the loaded model has, whatever they are stored in."""

import json

import pytest
import torch
from builders import random_model, write_gguf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ubmoe.config import ModelSection, UserError
from ubmoe.models import streams, tensors
from ubmoe.models.digests import fingerprint
from ubmoe.models.loading import load_model
from ubmoe.models.streams import open_weights


def section(path, **keys):
    return ModelSection(name=str(path), device="cpu", **keys)


def renamed(path, change):
    """The model's one file with its tensors changed."""
    values = change(load_file(path / "model.safetensors"))
    save_file(values, path / "model.safetensors", metadata={"format": "pt"})


def pickled(path, tmp_path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return section(path)


def without_prefix(path, tmp_path):
    renamed(path, lambda values: {k.removeprefix("model."): v for k, v in values.items()})
    return section(path)


def with_adapter(path, tmp_path):
    settings = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(load_model(section(path)), settings).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "ubmoe.json").write_text('{"attention": "causal"}')
    return section(path, adapter=str(tmp_path / "adapter"))


def with_adapter_beside(path, tmp_path):
    """transformers loads it over the model unasked."""
    (path / "adapter_config.json").write_text("{}")
    return section(path)


def with_tied_head(path, tmp_path):
    random_model("qwen2", tie_word_embeddings=True).save_pretrained(path)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    renamed(path, lambda values: values | {"lm_head.weight": embedding.clone()})
    return section(path)


def with_other_head(path, tmp_path):
    """Its config says that it is tied."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return section(path)


def whole(path, tmp_path):
    return section(path)


def in_shards(path, tmp_path):
    load_model(section(path)).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return section(tmp_path / "shards")


def tied(path, tmp_path):
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    return section(tmp_path / "tied")


def with_others(path, tmp_path):
    """Old checkpoints hold what the class computes."""
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    renamed(path, lambda values: values | more)
    return section(path)


def as_gguf(path, tmp_path, tiny_path):
    write_gguf(tiny_path, tmp_path / "model.gguf")
    return section(tmp_path / "model.gguf")


@pytest.mark.parametrize("make", [whole, in_shards, tied, with_others])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_directory_is_read_tensor_by_tensor(saved, tmp_path, make, dtype, monkeypatch):
    config = make(saved, tmp_path).model_copy(update={"dtype": dtype})
    model = load_model(config)
    monkeypatch.setattr(streams, "load_model", None)  # nobody loads it
    found = open_weights(config, getattr(torch, dtype))
    assert_same(found, model)
    assert {value.device.type for value in found.model.parameters()} == {"meta"}


OTHERWISE = [pickled, without_prefix, with_adapter, with_tied_head, with_other_head, as_gguf]


@pytest.mark.parametrize("make", OTHERWISE)
def test_what_is_stored_otherwise_is_loaded_and_read_alike(saved, tmp_path, make, request):
    more = [request.getfixturevalue("tiny_path")] if make is as_gguf else []
    config = make(saved, tmp_path, *more)
    found, model = open_weights(config, torch.float32), load_model(config)
    assert {value.device.type for value in found.model.parameters()} == {"cpu"}
    assert_same(found, model)


def assert_same(found, model):
    stored = model.state_dict()
    if model.config.tie_word_embeddings:
        del stored["lm_head.weight"]
    assert list(found.tensors) == list(stored)
    for name, value in stored.items():
        assert found.tensors[name].dtype == value.dtype == found.dtype
        assert torch.equal(found.tensors[name].whole(), value), name
    assert found.shapes() == {name: value.shape for name, value in model.state_dict().items()}
    assert found.model.generation_config.to_dict() == model.generation_config.to_dict()
    ours, theirs = found.config.to_dict(), model.config.to_dict()
    assert ours | dict.fromkeys(("is_causal", "dtype")) == theirs | dict.fromkeys(
        ("is_causal", "dtype")
    )


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_the_fingerprint_is_the_loaded_models_however_it_is_read(saved, monkeypatch, block):
    model = load_model(section(saved))
    monkeypatch.setattr(tensors, "BLOCK", block)
    for dtype in (torch.float32, torch.bfloat16):
        assert open_weights(section(saved), dtype).fingerprint() == fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[-1] += 1
    assert open_weights(section(saved), None).fingerprint() != fingerprint(model)


def test_without_a_dtype_it_is_that_of_the_files(saved):
    random_model("qwen2").bfloat16().save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    for _ in range(2):  # as the config says, and then as the files do
        found = open_weights(section(saved), None)
        assert {tensor.dtype for tensor in found.tensors.values()} == {found.dtype, torch.bfloat16}
        (saved / "config.json").write_text(json.dumps(config))


def lacking(path):
    renamed(path, lambda values: {k: v for k, v in values.items() if k != "lm_head.weight"})


def truncated(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def of_fewer_layers(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (path / "config.json").write_text(json.dumps(config))


def of_other_shapes(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def without_weights(path):
    (path / "model.safetensors").unlink()


def index_of_nothing(path):
    (path / "model.safetensors").rename(path / "other.safetensors")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')


BROKEN = [lacking, truncated, of_fewer_layers, of_other_shapes, without_weights, index_of_nothing]


@pytest.mark.parametrize("breaking", BROKEN)
def test_what_cannot_be_loaded_is_refused_in_the_same_words(saved, breaking):
    breaking(saved)
    said = []
    for read in (load_model, lambda config: open_weights(config, None)):
        with pytest.raises(UserError) as caught:
            read(section(saved))
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 8, "num_layers": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is an encoder-decoder; expected a decoder"):
        open_weights(section(tmp_path), None)


def test_an_adapter_beside_the_model_is_for_the_library(saved, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        streams, "load_model", lambda config: loaded.append(1) or random_model("qwen2")
    )
    open_weights(with_adapter_beside(saved, tmp_path), None)
    assert loaded == [1]
