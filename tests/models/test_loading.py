"""What is loaded is whole, finite, a decoder, and in the dtype and attention that were asked "
"for."""

import json
import math
import shutil

import pytest
import torch
from builders import random_model, run, tokenizer_of, write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ubmoe.config import ModelSection, UserError, load_config, with_keys
from ubmoe.models.digests import fingerprint
from ubmoe.models.loading import (
    best_device,
    environment,
    is_finite,
    load_model,
    load_with_encoder,
)
from ubmoe.models.source import ModelSource, context_length


def section(path, **keys):
    return ModelSection(name=str(path), device="cpu", **keys)


def refused(path, **keys):
    with pytest.raises(UserError) as caught:
        load_model(section(path, **keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_dtype_device_and_attention_are_those_asked_for(saved):
    model = load_model(section(saved, dtype="bfloat16", attn_implementation="eager"))
    assert not model.training and model.config.is_causal is True
    threads = torch.get_num_threads()
    assert environment(model) | {"parameters": 0, "threads": threads} == {
        "model_class": "Qwen2ForCausalLM",
        "parameters": 0,
        "weights": fingerprint(load_model(section(saved))),  # the same in either dtype
        "threads": threads,
        "dtype": "bfloat16",
        "device": "cpu",
        "attn_implementation": "eager",
        "bfloat16": False,
    }
    assert context_length(model.config) == 512
    assert load_model(section(saved), bidirectional=True).config.is_causal is False


def test_the_embedded_model_loads_like_any_other(tiny_path):
    config = ModelSection(device="cpu")
    assert load_model(config).name_or_path == str(tiny_path)
    assert tokenizer_of(config).chat_template


def test_a_directory_without_config_or_weights(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    assert "has no weights; expected model.safetensors" in refused(saved)
    assert "has no config.json" in refused(tmp_path)
    assert "is no directory" in refused(tmp_path / "nowhere")
    assert "is no directory" in refused("~nobody of this name/model")


def test_tensors_that_the_checkpoint_lacks_are_an_error(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert "lacks lm_head.weight; expected a whole causal language model" in refused(saved)


def test_a_head_of_its_own_is_kept_where_the_config_says_that_it_is_tied(saved, tmp_path):
    """As the library loads it; what is saved of it says so."""
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = random_model("qwen2", tie_word_embeddings=False)(ids).logits
        say_tied(saved)
        model = load_model(section(saved))
        assert torch.equal(model(ids).logits, expected)
        assert model.config.tie_word_embeddings is False
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(load_model(section(tmp_path / "again"))(ids).logits, expected)


def say_tied(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_weights_of_more_layers_than_the_config_names_are_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (saved / "config.json").write_text(json.dumps(config))
    assert "has weights of more layers than the 1 that its config.json names" in refused(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(saved, value):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite weights in model.layers.1.mlp.up_proj.weight" in refused(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (130, 33), (0, 3)])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype, shape):
    value = torch.linspace(-2, 3, math.prod(shape)).reshape(shape).to(dtype)
    assert is_finite(value)
    for place in range(0, value.numel(), 97):
        for bad in (math.nan, math.inf, -math.inf):
            broken = value.clone()
            broken.view(-1)[place] = bad
            assert not is_finite(broken) and not torch.isfinite(broken).all()


def test_a_truncated_file_is_one_line(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "cannot be loaded as a decoder" in refused(saved)


def test_models_that_are_no_decoders_are_refused(tmp_path):
    random_model("bert").save_pretrained(tmp_path / "bert")
    assert "expected a causal language model (a decoder)" in refused(tmp_path / "bert")
    (tmp_path / "t5").mkdir()
    shutil.copy(tmp_path / "bert" / "model.safetensors", tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "(t5) is an encoder-decoder; expected a decoder" in refused(tmp_path / "t5")


def test_code_from_the_hub_is_never_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text("raise SystemExit('hub code ran')")
    assert "cannot be loaded" in refused(saved)


def test_a_hub_id_that_cannot_be_had_is_one_line():
    assert "nobody/nothing cannot be loaded" in refused("nobody/nothing")


@pytest.mark.parametrize(("family", "reason"), [("qwen2", "has no tokenizer"), ("llama", "cannot")])
def test_a_tokenizer_that_is_not_there(tmp_path, family, reason):
    random_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        tokenizer_of(section(tmp_path))


@pytest.mark.parametrize("name", ["gpu", "cuda:77", "tpu9", "meta", "cpu:3", "privateuseone"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(UserError, match="model.device: .*expected cpu, cuda, cuda:1, mps or xpu"):
        best_device(name)


def test_a_gguf_file_is_a_model_like_any_other(tiny_path, tmp_path):
    write_gguf(tiny_path, tmp_path / "model.gguf")
    settings = ModelSection(name=str(tmp_path / "model.gguf"))
    model, dense = load_model(settings), load_model(ModelSection(name=str(tiny_path)))
    tokenizer = tokenizer_of(settings)
    text = "<|im_start|>user\nWhere does Anna live?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    own = tokenizer_of(ModelSection(name=str(tiny_path)))
    assert ids.tolist()[0] == own(text)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
    model.save_pretrained(tmp_path / "saved")  # as an ordinary directory
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert fingerprint(model) == fingerprint(dense)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "none.gguf is no file; expected a GGUF file that is there"),
        (b"not one", "cannot be loaded as a decoder: .*GGUF"),
        (b"GGUF\x03\x00\x00\x00", "cannot be loaded as a decoder"),
    ],
)
def test_a_broken_gguf_file_is_one_line(tmp_path, content, expected):
    path = tmp_path / ("none.gguf" if content is None else "model.gguf")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_model(ModelSection(name=str(path)))


def test_a_file_of_weights_beside_an_index_of_others_is_named(saved):
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}))
    for load in (load_model, tokenizer_of):
        with pytest.raises(UserError, match="would read model.safetensors; remove it if it is old"):
            load(section(saved))
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}))
    load_model(section(saved))


@pytest.mark.parametrize("program", ["calculate_dp.py", "train_bi.py", "-m ubmoe.evaluate"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    program, tiny_path, tmp_path, monkeypatch
):
    """A question on the terminal would be answered with yes."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_path, folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    given = [f"model.name={folder}", "model.device=cpu", f"output_dir={tmp_path}/run"]
    code, output, errors = run(*given, "evaluation.sts=[tiny]", script=program)
    assert (code, output, errors.count("\n")) == (2, "", 1), errors
    assert "it needs code of its own (auto_map in its .json files), which is never run" in errors
    assert not ran.exists() and not (tmp_path / "run").exists()
    # of a model that the library knows itself, its own class is taken
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    load_model(section(folder))
    assert not ran.exists()


def test_no_limit_of_a_program_is_beyond_the_context(saved, caplog):
    caplog.set_level("INFO")
    stage = "{objective: mntp, max_tokens: 600, lm_max_tokens: 700}"
    keys = ["bi.max_tokens=4096", f"bi.stages=[{stage}]", "bitune.max_tokens=513"]
    config = load_config(None, [f"model.name={saved}", *keys])
    actual = ModelSource.of(config.model).within_context(config, "bi", "bitune")
    assert (actual.bi.max_tokens, actual.bi.stages[0].max_tokens) == (512, 512)
    assert (actual.bitune.max_tokens, actual.bi.stages[0].lm_max_tokens) == (512, 700)  # unused
    assert actual.ubmoe == config.ubmoe and actual.bi.stages[0].objective == "mntp"
    assert [record.message for record in caplog.records] == [
        "bi.max_tokens: 512, the model's context, not 4096",
        "bi.stages.0.max_tokens: 512, the model's context, not 600",
        "bitune.max_tokens: 512, the model's context, not 513",
    ]
    assert ModelSource.of(actual.model).within_context(actual, "bi", "bitune") == actual


def test_a_tokenizer_gets_the_context(tiny_path, tmp_path):
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path)
    random_model("qwen2", vocab_size=8192, max_position_embeddings=77).save_pretrained(tmp_path)
    assert tokenizer_of(section(tmp_path)).model_max_length == 77


def test_models_that_are_not_alike_are_refused(config, tmp_path, tiny_path):
    random_model("qwen2").save_pretrained(tmp_path / "other")
    asked = with_keys(config, [f"model.name={tiny_path}", f"ubmoe.bi={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="ubmoe.bi: .*other has other weights than .*tuned from it"):
        load_with_encoder(asked, ModelSource.of(asked.model))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_weights_that_are_whole_numbers_are_named(saved, kind):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        tensors | {name: tensors[name].to(kind)}, saved / "model.safetensors", {"format": "pt"}
    )
    assert f"{saved}/model.safetensors: {name} is stored as " in refused(saved)


@pytest.mark.parametrize(
    ("family", "keys", "bidirectional"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, True),
        ("qwen2_moe", {"num_experts_per_tok": 3}, False),  # of two experts
    ],
)
def test_a_model_that_cannot_be_run_is_one_line(tmp_path, family, keys, bidirectional):
    keys = dict(keys)
    later = {name: keys.pop(name) for name in ("num_experts_per_tok",) if name in keys}
    random_model(family, **keys).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | later))
    with pytest.raises(UserError, match="cannot be loaded as a decoder: ") as caught:
        load_model(section(tmp_path), bidirectional)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer"])
@pytest.mark.parametrize("inner", [False, True])
def test_no_number_of_layers_is_built_that_nobody_has(saved, name, inner):
    path, more = saved / "config.json", {name: 10**9}
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"sub": more} if inner else more)))
    assert f"{path}: {name}: got 1000000000; expected at most 1000" in refused(saved)
