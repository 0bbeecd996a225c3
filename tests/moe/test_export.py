"""Directories that stock libraries load as either model: each reader gets exactly its model."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from builders import IDS, JOINED, ROOT, drawn, logits, pair, weights
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import prove_attention
from ubmoe.config import BiSection, Config, ModelSection, UserError, WhitenSection
from ubmoe.encoder import whitening
from ubmoe.encoder.sentence_encoder import as_encoder, load_saved, save_encoder
from ubmoe.models import cards
from ubmoe.models.digests import fingerprint
from ubmoe.models.loading import load_model
from ubmoe.models.streams import open_weights
from ubmoe.moe import export
from ubmoe.moe.joining import check_alike, load_mixture, mixture_config, save_routers
from ubmoe.moe.routers import router_weights
from ubmoe.tiny import language

MADE = "\nMade in a test.\n"
TEXTS = ["The cat slept.", "A much longer sentence about the small horse in the garden.", "No."]


KINDS = [(True, "qwen2"), (False, "qwen2"), (True, "llama"), (False, "mistral, a window")]
KINDS += [(True, "qwen3"), (False, "qwen3, wide heads")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[1]}, {'tied' if kind[0] else 'untied'}")
def sources(request, tiny_path, tmp_path):
    """uni, bi, tokenizer, the encoder's directory and its vectors of TEXTS."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tied, (family, keys) = request.param[0], JOINED[request.param[1]]
    uni, bi = pair(tied, family, vocab_size=len(tokenizer), **keys)
    bi.config.is_causal = False
    settings = BiSection(prompt="Word of {text}:", max_tokens=99)
    encoder = as_encoder(bi, tokenizer, settings)
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    return uni, bi, tokenizer, tmp_path / "bi", vectors


def saved_mixture(uni, bi, tokenizer, encoder, directory):
    """A mixture as train_ubmoe.py saves it: written, loaded, its routers trained and put there."""
    export.save_mixture(*weights(uni, bi), tokenizer, encoder, directory, MADE)
    dtype = str(uni.dtype).removeprefix("torch.")
    section = ModelSection(name=str(directory), dtype=dtype, device="cpu")
    model = drawn(load_mixture(section, export.encoder_attention(encoder)))
    save_routers(model, directory)
    return model


def tensors_in(directory):
    """Of all files of a directory, as its index has them."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    named, actual = json.loads(index.read_text()), {}
    for file in sorted(directory.glob("*.safetensors")):
        part = load_file(file)
        assert {named["weight_map"].pop(name) for name in part} == {file.name}
        actual |= part
    assert not named["weight_map"]
    assert named["metadata"]["total_size"] == sum(value.nbytes for value in actual.values())
    return actual


def bytes_of(tensors):
    return {
        name: (
            value.dtype,
            tuple(value.shape),
            value.contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, value in tensors.items()
    }


@torch.no_grad()
def built(uni, bi):
    """The mixture in memory, each parameter copied by hand: the slow and obvious way."""
    model = AutoModelForCausalLM.from_config(mixture_config(uni.config, 2)).to(uni.dtype)
    for value in model.parameters():
        value.zero_()
    own = dict(model.named_parameters())
    for name, value in uni.named_parameters():
        if ".mlp." not in name:
            own[name].copy_(value)
    for number, dense in enumerate((uni, bi)):
        for layer, block in zip(model.model.layers, dense.model.layers, strict=True):
            both = (block.mlp.gate_proj.weight, block.mlp.up_proj.weight)
            layer.mlp.experts.gate_up_proj[number].copy_(torch.cat(both))
            layer.mlp.experts.down_proj[number].copy_(block.mlp.down_proj.weight)
    for layer in model.model.layers:
        layer.mlp.gate.float()
    model.generation_config = uni.generation_config
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_written_equals_what_models_in_memory_would_save(sources, tmp_path, dtype):
    """Read from disk in one dtype and written in another, byte for byte."""
    uni, bi, tokenizer, encoder, _ = sources
    uni.bfloat16().save_pretrained(tmp_path / "uni")
    bi.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")  # float32
    bi.bfloat16()
    names = [str(tmp_path / name) for name in ("uni", "tuned")]
    opened = [open_weights(ModelSection(name=name, device="cpu"), dtype) for name in names]
    assert all(weights.model.device.type == "meta" for weights in opened)
    check_alike(*[open_weights(ModelSection(name=name), torch.bfloat16) for name in names])
    uni, bi = (AutoModelForCausalLM.from_pretrained(name, dtype=dtype) for name in names)
    common = (*opened, tokenizer, encoder)
    export.save_mixture(*common, tmp_path / "ubmoe", MADE)
    built(uni, bi).save_pretrained(tmp_path / "built")
    assert bytes_of(tensors_in(tmp_path / "ubmoe")) == bytes_of(tensors_in(tmp_path / "built"))
    export.save_modes(*common, tmp_path / "modes", MADE)
    actual, base = tensors_in(tmp_path / "modes"), tensors_in_model(uni)
    tuned = {name.replace(".mlp.", ".mlp.experts.0."): v for name, v in ffn_of(bi).items()}
    zeros = {name: actual[name] for name in actual if name not in base | tuned}
    assert bytes_of(actual) == bytes_of(base | tuned | zeros)
    assert all(not value.any() and value.dtype == dtype for value in zeros.values())
    export.save_adapter(*common, tmp_path / "adapter", MADE, 4)
    uni.save_pretrained(tmp_path / "base")
    assert bytes_of(tensors_in(tmp_path / "adapter")) == bytes_of(tensors_in(tmp_path / "base"))
    for name, other, more in (("ubmoe", "built", {}), ("adapter", "base", {"is_causal": True})):
        for file, added in (("config.json", more), ("generation_config.json", {})):
            read = [json.loads((tmp_path / item / file).read_text()) for item in (name, other)]
            assert read[0] == read[1] | added, file
    assert opened[0].fingerprint() == fingerprint(uni)
    assert opened[1].fingerprint() == fingerprint(bi)


def test_a_head_of_its_own_is_in_every_export_though_the_config_says_tied(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, bi = pair(False, "qwen2", vocab_size=len(tokenizer))
    uni.save_pretrained(tmp_path / "uni")
    config = json.loads((tmp_path / "uni" / "config.json").read_text())
    text = json.dumps(config | {"tie_word_embeddings": True})
    (tmp_path / "uni" / "config.json").write_text(text)
    settings = BiSection(prompt=None)
    save_encoder(as_encoder(bi, tokenizer, settings), bi, tokenizer, settings, tmp_path / "bi")
    names = [str(tmp_path / name) for name in ("uni", "bi")]
    both = [open_weights(ModelSection(name=name, device="cpu"), torch.float32) for name in names]
    check_alike(*both)
    common = (*both, tokenizer, tmp_path / "bi")
    export.save_modes(*common, tmp_path / "modes", MADE)
    export.save_adapter(*common, tmp_path / "adapter", MADE, 4)
    export.save_mixture(*common, tmp_path / "ubmoe", MADE)
    for name in ("modes", "adapter", "ubmoe"):
        tensors = tensors_in(tmp_path / name)
        assert torch.equal(tensors["lm_head.weight"], uni.lm_head.weight), name
        if name != "ubmoe":
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert torch.equal(logits(stock), logits(uni)), name


def tensors_in_model(model):
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def ffn_of(model):
    return {name: value for name, value in model.state_dict().items() if ".mlp." in name}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_the_two_modes_are_base_and_encoder_in_stock_libraries(sources, tmp_path, shard):
    uni, bi, tokenizer, encoder, vectors = sources
    export.save_modes(*weights(uni, bi), tokenizer, encoder, tmp_path / "modes", MADE, shard)
    files = list((tmp_path / "modes").glob("*.safetensors"))
    assert len(files) == 2 if shard == "5GB" else len(files) > 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "modes")
    assert torch.equal(logits(model), logits(uni))
    prove_attention(model, bidirectional=False)
    prompt = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    keys = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt, **keys), uni.generate(**prompt, **keys))
    stock = SentenceTransformer(str(tmp_path / "modes"), device="cpu")
    kind = "Qwen3" if uni.config.model_type == "qwen3" else "Qwen2"
    assert type(stock[0].model).__name__ == f"{kind}MoeModel" and stock.max_seq_length == 99
    actual = stock.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual, vectors, atol=1e-5, rtol=1e-5)
    prove_attention(AutoModel.from_pretrained(tmp_path / "modes"), bidirectional=False)


def test_the_two_modes_store_nothing_twice(sources, tmp_path):
    uni, bi, tokenizer, encoder, _ = sources
    export.save_modes(*weights(uni, bi), tokenizer, encoder, tmp_path / "modes", MADE)
    size = sum(file.stat().st_size for file in (tmp_path / "modes").glob("*.safetensors"))
    ffn = sum(value.nbytes for name, value in bi.named_parameters() if ".mlp." in name)
    base = sum(value.nbytes for value in uni.parameters())
    extra = 2 * 4 * 32  # a router of one row in each layer, fp32
    if uni.config.model_type != "qwen3":
        extra += 2 * 4 * (3 * 16 * 32 + 32)  # the zero expert and its gate
    assert base + ffn + extra <= size <= base + ffn + extra + 12_800  # headers
    index = json.loads((tmp_path / "modes" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        in_bi = any(part in name for part in (".experts.", ".shared_expert", ".mlp.gate.weight"))
        assert ("-bi" in file) == in_bi, name


def test_the_saved_mixture_is_the_same_in_stock_libraries(sources, tmp_path):
    uni, bi, tokenizer, encoder, _ = sources
    model = saved_mixture(uni, bi, tokenizer, encoder, tmp_path / "ubmoe")
    again, said = AutoModelForCausalLM.from_pretrained(tmp_path / "ubmoe", output_loading_info=True)
    assert not any(said.values()), said
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert again.config.is_causal is True and again.config.use_cache is True
    prompt = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    keys = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **keys)
    assert torch.equal(again.generate(**prompt, **keys), expected)
    assert torch.equal(again.generate(**prompt, **keys, use_cache=False), expected)
    stock = SentenceTransformer(str(tmp_path / "ubmoe"), device="cpu")
    prove_attention(stock[0].model, bidirectional=True)
    model.config.is_causal = False
    expected = as_encoder(model, tokenizer, BiSection(prompt="Word of {text}:")).encode(TEXTS)
    torch.testing.assert_close(stock.encode(TEXTS), expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "ubmoe" / "README.md").read_text().endswith(MADE)


def test_a_causal_encoder_stays_causal_in_both_exports(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, bi = pair(vocab_size=len(tokenizer))
    settings = BiSection(attention="causal", prompt=None)
    encoder = as_encoder(bi, tokenizer, settings)
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    assert export.encoder_attention(tmp_path / "bi") == "causal"
    export.save_modes(*weights(uni, bi), tokenizer, tmp_path / "bi", tmp_path / "modes", MADE)
    saved_mixture(uni, bi, tokenizer, tmp_path / "bi", tmp_path / "ubmoe")
    stock = SentenceTransformer(str(tmp_path / "modes"), device="cpu")
    torch.testing.assert_close(stock.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=1e-5)
    mixed = SentenceTransformer(str(tmp_path / "ubmoe"), device="cpu")
    prove_attention(mixed[0].model, bidirectional=False)


def test_routers_stay_float32_in_the_file(sources, tmp_path):
    uni, bi, tokenizer, encoder, _ = sources
    directory = tmp_path / "ubmoe"
    model = saved_mixture(uni.bfloat16(), bi.bfloat16(), tokenizer, encoder, directory)
    tensors = tensors_in(directory)
    for name, value in tensors.items():
        assert value.dtype == (
            torch.float32 if name in router_weights(model) else torch.bfloat16
        ), name
    for name, value in router_weights(model).items():
        assert torch.equal(tensors[name], value)


def test_what_is_no_encoder_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match=r"has no modules.json; run train_bi.py with the same"):
        export.encoder_attention(tmp_path)


POOL = {"type": "x.Pooling", "path": "1_Pooling"}
FIRST = POOL | {"path": ""}


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("config.json", [], "must hold an object each"),
        ("sentence_bert_config.json", {"config_kwargs": [1]}, "config_kwargs must be an object"),
        ("sentence_bert_config.json", {"model_kwargs": 5}, "model_kwargs must be an object"),
        ("modules.json", {}, "got {}; expected modules with a type and a path"),
        ("modules.json", [], "got []; expected modules"),
        ("modules.json", [None], "got null; expected modules"),
        ("modules.json", [FIRST, {"path": "1_Pooling"}], "expected modules with a type"),
        ("modules.json", [FIRST, POOL | {"path": 3}], "the name of a folder in it"),
        ("modules.json", [FIRST, POOL, POOL | {"path": "../other"}], "the name of a folder in it"),
        ("modules.json", [FIRST, POOL, POOL | {"path": ".."}], "the name of a folder in it"),
        ("modules.json", [FIRST, POOL, POOL | {"path": ""}], "the name of a folder in it"),
        ("modules.json", [FIRST, POOL | {"path": "/etc"}], "the name of a folder in it"),
    ],
)
def test_an_encoder_of_another_shape_is_refused_and_names_no_folder_elsewhere(
    tmp_path, name, said, expected
):
    right = {"config.json": {}, "sentence_bert_config.json": {}, "modules.json": [FIRST, POOL]}
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config_sentence_transformers.json").write_text("{}")
    for item, value in right.items():
        (tmp_path / item).write_text(json.dumps(value))
    assert export.encoder_attention(tmp_path) == "causal"
    (tmp_path / name).write_text(json.dumps(said))
    with pytest.raises(UserError) as caught:
        export.encoder_attention(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "sentence_bert_config.json"])
def test_a_damaged_encoder_is_refused(sources, name):
    encoder = sources[3]
    (encoder / name).write_text("{")
    with pytest.raises(UserError, match=f"{name}: no JSON"):
        export.encoder_attention(encoder)


# --- an adapter in place of the second set of FFNs ------------------------------------------------


def save_adapter(sources, directory, rank):
    uni, bi, tokenizer, encoder, _ = sources
    return export.save_adapter(*weights(uni, bi), tokenizer, encoder, directory, MADE, rank)


def truncated(uni, bi, rank):
    """uni with the FFNs of bi but for the smaller singular values, and the share that is kept."""
    model, ours = copy.deepcopy(bi), dict(uni.named_parameters())
    kept = total = 0.0
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".mlp." in name:
                left, values, right = np.linalg.svd((value - ours[name]).double().numpy())
                change = left[:, :rank] * values[:rank] @ right[:rank]
                value.copy_(ours[name] + torch.from_numpy(change))
                kept, total = kept + sum(values[:rank] ** 2), total + sum(values**2)
    return model, kept / total


@pytest.mark.parametrize("rank", [3, 32])
def test_an_adapter_is_the_base_and_the_nearest_encoder_of_its_rank(
    sources, tmp_path, monkeypatch, rank
):
    uni, bi, tokenizer, encoder, vectors = sources
    actual = save_adapter(sources, tmp_path / "made", rank)
    (tmp_path / "made").rename(tmp_path / "moved")
    shutil.rmtree(encoder)  # nothing else is needed
    monkeypatch.chdir("/")
    path = str(tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model) is type(uni) and not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(uni))
    expected, kept = truncated(uni, bi, rank)
    settings = BiSection(prompt="Word of {text}:", max_tokens=99)
    expected = as_encoder(expected, tokenizer, settings).encode(TEXTS, convert_to_tensor=True)
    stock = SentenceTransformer(path, device="cpu")
    assert stock[0].model.peft_config["default"].r == rank and stock.max_seq_length == 99
    again = stock.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    assert bool((again - vectors).abs().max() < 1e-4) == (rank == 32)
    size = 3 * 2 * rank * (32 + 48)  # projections, layers, and the two factors
    assert actual == {"rank": rank, "parameters": size, "kept": pytest.approx(kept, abs=1e-9)}


def test_an_encoder_that_was_trained_as_an_adapter_is_kept_whole(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, _ = pair(vocab_size=len(tokenizer))
    bi, generator = copy.deepcopy(uni), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("gate_proj", "down_proj"):  # and only in layer 1
            weight = getattr(bi.model.layers[1].mlp, name).weight
            out, into = (torch.randn(size, 4, generator=generator) for size in weight.shape)
            weight += 0.1 * out @ into.T
    settings = BiSection(attention="causal", prompt=None, pooling="last")
    encoder = as_encoder(bi, tokenizer, settings)
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    sources = (uni, bi, tokenizer, tmp_path / "bi", None)
    actual = save_adapter(sources, tmp_path / "adapter", 4)
    assert actual["kept"] == pytest.approx(1, abs=1e-6)
    assert actual["parameters"] == 2 * 4 * (32 + 48)
    stock = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(stock.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=1e-5)
    prove_attention(stock[0].model, bidirectional=False)
    config = ModelSection(
        name=str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter" / "bi"), device="cpu"
    )
    torch.testing.assert_close(logits(load_model(config)), logits(bi), atol=1e-4, rtol=1e-4)
    one_copy(str(tmp_path / "adapter"), uni, encoder.encode(TEXTS))


def one_copy(path, uni, vectors):
    """As docs/mixture.md shows it: one process, one copy of the weights, the adapter on and off."""
    encoder = SentenceTransformer(path, device="cpu")
    language_model = AutoModelForCausalLM.from_pretrained(path)
    language_model.model = encoder[0].model
    language_model.model.disable_adapters()
    assert torch.equal(logits(language_model), logits(uni))
    language_model.model.enable_adapters()
    torch.testing.assert_close(encoder.encode(TEXTS), vectors, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_cannot_be_made_is_refused_in_one_line(sources, tmp_path):
    uni, bi, tokenizer, encoder, _ = sources
    with pytest.raises(UserError, match=r"^ubmoe.rank: got 33; expected at most 32$"):
        save_adapter(sources, tmp_path / "adapter", 33)
    with pytest.raises(UserError, match=r"the encoder has the weights of model.name"):
        save_adapter((uni, uni, tokenizer, encoder, None), tmp_path / "adapter", 4)
    assert not (tmp_path / "adapter").exists()
    save_adapter(sources, tmp_path / "adapter", 4)
    with pytest.raises(UserError, match=r"expected the encoder that it was made from"):
        export.encoder_attention(tmp_path / "adapter")


def test_the_snippet_of_the_readme_generates_and_embeds(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, bi = (AutoModelForCausalLM.from_pretrained(tiny_path) for _ in range(2))
    with torch.no_grad():
        for layer in bi.model.layers:
            layer.mlp.down_proj.weight *= 1.1
    bi.config.is_causal = False
    settings = BiSection(prompt=None)
    encoder = as_encoder(bi, tokenizer, settings)
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    export.save_modes(*weights(uni, bi), tokenizer, tmp_path / "bi", tmp_path / "modes", MADE)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [snippet] = [block for block in blocks if "runs/tiny/modes" in block]
    names: dict = {}
    exec(snippet.replace("runs/tiny/modes", str(tmp_path / "modes")), names)
    assert torch.equal(logits(names["language_model"]), logits(uni))
    expected = encoder.encode(["The dog sleeps."])
    assert abs(names["vectors"] - expected).max() < 1e-5
    [fact] = [fact for fact in language.facts() if fact.question == "Where does Anna live?"]
    assert names["text"] == fact.answer


def test_a_form_and_a_whitening_are_kept_in_every_export(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, bi = pair(vocab_size=len(tokenizer))
    settings = BiSection(attention="causal", form="echo", whiten=WhitenSection(rows=50, remove=2))
    encoder = as_encoder(bi, tokenizer, settings)
    plain = encoder.encode(TEXTS, convert_to_tensor=True)
    whitening.whiten(encoder, Config(bi=settings), [f"Anna has {n} dogs." for n in range(50)])
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    assert (vectors - plain).abs().max() > 0.1
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    common = (*weights(uni, bi), tokenizer, tmp_path / "bi")
    export.save_modes(*common, tmp_path / "modes", MADE)
    export.save_adapter(*common, tmp_path / "adapter", MADE, rank=32)
    saved_mixture(uni, bi, tokenizer, tmp_path / "bi", tmp_path / "ubmoe")
    for name in ("modes", "adapter", "ubmoe"):
        path = tmp_path / name
        stock = SentenceTransformer(str(path), device="cpu", trust_remote_code=True)
        assert stock[0].echo == settings.prompt and type(stock[2]).__name__ == "Dense"
        assert torch.equal(stock[2].linear.bias, encoder[2].linear.bias)
        if name != "ubmoe":  # whose routers mix
            for saved in (stock, load_saved(str(path), "cpu")):
                actual = saved.encode(TEXTS, convert_to_tensor=True)
                torch.testing.assert_close(actual, vectors, atol=1e-4, rtol=1e-4)
        assert "trust_remote_code=True" in (path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["mixture", "modes", "adapter"])
def test_the_code_of_a_card_generates_and_embeds(tiny_path, tmp_path, monkeypatch, kind):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    uni, bi = pair(vocab_size=len(tokenizer))
    bi.config.is_causal = False
    settings = BiSection(prompt="Word of {text}:", max_tokens=99)
    encoder = as_encoder(bi, tokenizer, settings)
    save_encoder(encoder, bi, tokenizer, settings, tmp_path / "bi")
    given = (uni, bi, tokenizer, tmp_path / "bi")
    if kind == "mixture":
        saved_mixture(*given, tmp_path / "made")
    elif kind == "modes":
        export.save_modes(*weights(uni, bi), *given[2:], tmp_path / "made", MADE)
    else:
        save_adapter((*given, None), tmp_path / "made", 32)
        said = json.loads((tmp_path / "made" / "bi" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] is None  # no path of this machine
    front, text = cards.read(tmp_path / "made")
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path / "made")
    names = {}
    exec(code, names)
    assert names["answer"].shape[1] > names["prompt"]["input_ids"].shape[1]
    if kind != "mixture":
        actual = torch.as_tensor(names["encoder"].encode(TEXTS))
        expected = encoder.encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert all(
        path.stat().st_mode & 0o777 == 0o644
        for path in (tmp_path / "made").rglob("*")
        if path.is_file() and not path.name.startswith(".ubmoe")
    )
