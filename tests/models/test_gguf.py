"""Everything in a GGUF file that changes numbers is read as llama.cpp means it, or refused."""

import math

import gguf as format_of
import numpy as np
import pytest
import torch
from builders import random_model, tokenizer_of, write_gguf, write_gguf_model
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import ModelSection, UserError
from ubmoe.models import gguf
from ubmoe.models.loading import load_model
from ubmoe.models.source import ModelSource

IDS = torch.arange(1, 97).repeat(2)[None, :150]  # longer than any window, and than old contexts
TEXT = "It's 2024,  café café\u0301  12345 你好 \n\n\tfoo 7\u00bd \U0001f600 x\u00b2  99"


def made_model(family, **keys):
    """As `random_model`, windows as files have them: no key says another pattern."""
    pattern = {"sliding_window_pattern": 6} if family == "gemma3_text" else {}
    return random_model(family, **pattern | keys)


def section(path):
    return ModelSection(name=str(path), device="cpu", dtype="float32")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same(tmp_path, model, keys=(), tensors=()):
    """Whether the file of a model without scaling gives the logits of this one."""
    write_gguf_model(model, tmp_path / "model.gguf", keys, tensors)
    loaded = load_model(section(tmp_path / "model.gguf"))
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5), loaded.config
    return loaded


UNTIED = [("llama", False), ("qwen2", False), ("qwen3", False)]
TIED = [(family, True) for family in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")]


@pytest.mark.parametrize(("family", "tied"), [*UNTIED, *TIED])
def test_a_family_has_the_logits_of_its_class(tmp_path, family, tied):
    loaded = same(tmp_path, made_model(family, tie_word_embeddings=tied, rms_norm_eps=1e-3))
    loaded.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock), logits(loaded))


def test_a_llama_with_biases_keeps_them(tmp_path):
    same(tmp_path, made_model("llama", attention_bias=True, mlp_bias=True))


def scaled(family, **rope):
    theta = {"rope_theta": 1e6 if family == "gemma3_text" else 10000.0}
    rope = theta | rope
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", **theta}}
        rope["sliding_attention"]["rope_theta"] = 10000.0
    return made_model(family, rope_parameters=rope, layer_types=None, num_hidden_layers=2)


def by_hand(factor, low, high, old, width, theta=10000.0):
    """The divisors that llama.cpp's converter writes for Llama 3.1, as its makers define them."""
    actual = []
    for number in range(0, width, 2):
        wave = 2 * math.pi * theta ** (number / width)
        smooth = (old / wave - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        actual.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(actual, dtype=np.float32)


def test_rope_freqs_are_the_scaling_of_llama_3(tmp_path):
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = scaled("llama", rope_type="llama3", original_max_position_embeddings=64, **numbers)
    divisors = by_hand(8, 1, 4, 64, 8)
    assert 1 == divisors[0] < divisors[1] < divisors[-1] == 8
    loaded = same(tmp_path, model, tensors={"rope_freqs.weight": divisors})
    assert not torch.allclose(logits(loaded), logits(scaled("llama")), atol=1e-2)
    loaded.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock), logits(loaded))


SCALINGS = [
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),  # llama.cpp's kind where none is said
    ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    (
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    (
        {"type": "yarn", "factor": 2.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
        {
            **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
            **{"beta_fast": 16.0, "beta_slow": 2.0},
        },
    ),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize(("said", "expected"), SCALINGS)
def test_scaling_is_read(tmp_path, family, said, expected):
    name = family.removesuffix("_text")
    keys = {f"{name}.rope.scaling.{key}": value for key, value in said.items()}
    same(tmp_path, scaled(family, **expected), keys)


def test_the_old_key_of_linear_scaling_is_read(tmp_path):
    same(
        tmp_path, scaled("llama", rope_type="linear", factor=4.0), {"llama.rope.scale_linear": 4.0}
    )


@pytest.mark.parametrize("pattern", [2, [True, False, True, True]])
def test_the_windows_of_gemma_are_read(tmp_path, pattern):
    kinds = ["full_attention", "sliding_attention"]
    layers = [kinds[1], kinds[0], kinds[1], kinds[0] if pattern == 2 else kinds[1]]
    model = made_model("gemma3_text", layer_types=layers, num_hidden_layers=4)
    same(tmp_path, model, {"gemma3.attention.sliding_window_pattern": pattern})


def test_what_scales_and_caps_scores_in_gemma_is_read(tmp_path):
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
    keys = {f"gemma2.{key}": value for key, value in caps.items()}
    same(tmp_path, made_model("gemma2", **caps), keys)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    local = {"rope_type": "default", "rope_theta": 500.0}
    rope = {"full_attention": local | {"rope_theta": 1e6}, "sliding_attention": local}
    model = made_model(
        "gemma3_text", query_pre_attn_scalar=16, num_hidden_layers=62, rope_parameters=rope, **sizes
    )
    write_gguf_model(model, tmp_path / "large.gguf", {"gemma3.rope.freq_base_swa": 500.0})
    read = ModelSource.of(section(tmp_path / "large.gguf")).settings
    assert (read.query_pre_attn_scalar, read.rope_parameters) == (16, rope)
    assert read.layer_types == model.config.layer_types


def test_heads_of_another_width_than_their_share_are_read(tmp_path):
    same(tmp_path, made_model("qwen3", head_dim=16))


REFUSED = [
    ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window = 16, which is not"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5, which is not read here"),
    ({"llama.attention.causal": False}, "llama.attention.causal = False"),
    ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type = longrope; expected none,"),
    ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor = 1.2"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4 and heads of 8"),
    ({"llama.attention.value_length": 4}, "value_length = 4 and heads of 8"),
    ({"llama.expert_count": 8}, "llama.expert_count = 8"),
    ({"llama.feed_forward_length": [48, 24]}, "whose layers differ in intermediate_size"),
    ({"llama.embedding_length": None}, "it has no key llama.embedding_length"),
    ({"rope.anything": 1.0}, "rope.anything = 1.0"),
    ({"tokenizer.ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token = True"),
    ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "with tokenizer.ggml.precompiled_charsmap,"),
    ({"llama.rope.scaling.factor": -4.0}, "llama.rope.scaling.factor = -4.0; expected a positive"),
    ({"llama.rope.scale_linear": math.inf}, "rope.scaling.factor = inf; expected a positive"),
    ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base = 0.0; expected a positive number"),
    ({"llama.rope.freq_base": "much"}, "llama.rope.freq_base = much; expected a positive number"),
    ({"llama.block_count": 10**9}, "a GGUF file of 1000000000 blocks and 21 tensors"),
    ({"general.architecture": "falcon"}, "of architecture falcon; expected llama, qwen2,"),
]


@pytest.mark.parametrize(("keys", "expected"), REFUSED)
def test_a_key_that_may_change_numbers_refuses_the_file(tmp_path, keys, expected):
    write_gguf_model(made_model("llama"), tmp_path / "model.gguf", keys)
    with pytest.raises(UserError, match=expected) as caught:
        load_model(section(tmp_path / "model.gguf"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "rope_factors_long.weight", "output.bias"]
)
def test_a_tensor_that_the_class_lacks_refuses_the_file(tmp_path, name):
    more = {name: np.ones(8, dtype=np.float32)}
    write_gguf_model(made_model("llama"), tmp_path / "model.gguf", tensors=more)
    with pytest.raises(UserError, match=f"a tensor {name}, which llama has not"):
        load_model(section(tmp_path / "model.gguf"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_divisors_of_frequencies_are_read_where_their_meaning_is_known(tmp_path, family):
    more = {"rope_freqs.weight": np.array([1, 2, 4, 8], dtype=np.float32)}
    write_gguf_model(made_model(family), tmp_path / "model.gguf", tensors=more)
    with pytest.raises(UserError, match=f"of {family[:6]}.* with rope_freqs.weight"):
        load_model(section(tmp_path / "model.gguf"))


def test_keys_without_effect_pass(tmp_path):
    keys = {
        **{"general.file_type": 2, "general.quantization_version": 2, "general.name": "mistral"},
        **{"general.tags": ["a"], "quantize.imatrix.file": "x", "llama.pooling_type": 3},
        **{"llama.rope.dimension_count": 8, "llama.attention.value_length": 8},
        **{"llama.attention.causal": True, "split.count": 0, "general.alignment": 64},
        **{"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.add_sep_token": False},
    }
    same(tmp_path, made_model("llama"), keys)


# --- tokenizers -----------------------------------------------------------------------------------


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [DIGITS, GPT2],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), PLAIN],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), PLAIN],
}
# Merges over every place at which the ways to split differ; Ġ is a space, Ċ a line's end.
MERGES = "1 2,12 3,123 4,Ġ Ġ,Ġ 9,Ġ 1,2 0,Ċ Ċ,Ċ ĉ,ĠĠ 1,Ġ Ċ,I t,It ',' s,e Ì,eÌ ģ,Ã ©".split(",")  # noqa: SIM905


def bytes_keys(pre, **more):
    """Keys of a byte-level tokenizer: every byte, the merges, a token that none lead to."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    merged = ["".join(item.split()) for item in MERGES]
    tokens = [*sorted(letters), *merged, "foo", "<end>", "<own>"]
    kinds = [*([1] * (len(tokens) - 2)), 3, 4]
    said = {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": MERGES, "pre": pre}
    said |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 2} | more
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}


def tokenizer(tmp_path, keys, family="llama"):
    write_gguf_model(made_model(family, vocab_size=300), tmp_path / "model.gguf", keys)
    return tokenizer_of(section(tmp_path / "model.gguf"))


@pytest.mark.parametrize("pre", list(SPLITS))
def test_a_text_is_split_as_the_file_names_it(tmp_path, pre):
    keys = bytes_keys(pre)
    vocabulary = {token: n for n, token in enumerate(keys["tokenizer.ggml.tokens"])}
    pairs = [tuple(item.split()) for item in MERGES]
    expected = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    expected.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    if pre == "qwen2":
        expected.normalizer = normalizers.NFC()
    actual = tokenizer(tmp_path, keys)
    ids = actual(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == expected.encode(TEXT).ids
    first = [actual.bos_token_id] if pre == "llama-bpe" else []
    assert actual(TEXT)["input_ids"] == first + ids
    assert actual("a<end>b<own>c", add_special_tokens=False)["input_ids"][1::2] == [274, 275]
    actual.save_pretrained(tmp_path / "saved")
    ModelSource.of(section(tmp_path / "model.gguf")).settings.save_pretrained(tmp_path / "saved")
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert stock(TEXT)["input_ids"] == first + ids


def test_the_ways_to_split_differ_on_the_text(tmp_path):
    ids = [tokenizer(tmp_path, bytes_keys(pre))(TEXT)["input_ids"] for pre in SPLITS]
    assert len({tuple(item) for item in ids}) == len(SPLITS)


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_that_does_not_say_splits_as_its_family_does(tmp_path, pre):
    for family, known in (("qwen2", "qwen2"), ("llama", "gpt-2")):
        unsaid, said = (tokenizer(tmp_path, bytes_keys(item), family) for item in (pre, known))
        assert unsaid(TEXT)["input_ids"] == said(TEXT)["input_ids"]


def test_the_tokens_that_begin_and_end_a_text_are_read(tmp_path):
    letter = bytes_keys("gpt-2")["tokenizer.ggml.tokens"].index("x")

    def ends(pre, **more):
        ids = tokenizer(tmp_path, bytes_keys(pre, **more))("x")["input_ids"]
        place = ids.index(letter)
        return place, len(ids) - place - 1

    assert ends("gpt-2") == (0, 0) and ends("llama-bpe") == (1, 0)
    assert ends("gpt-2", add_bos_token=True) == (1, 0)
    assert ends("llama-bpe", add_bos_token=False, add_eos_token=True) == (0, 1)


PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "<0x0A>"]
PREFIXES = [
    ({}, "ab a", "<s> ▁a b ▁a"),
    ({}, " a", "<s> ▁ ▁a"),  # SentencePiece puts its mark before a space, too
    ({"add_space_prefix": True}, "ab a", "<s> ▁a b ▁a"),
    ({"add_space_prefix": False}, "ab a", "<s> ab ▁a"),
    ({"add_bos_token": False}, "a", "▁a"),
    ({"add_eos_token": True}, "a\n", "<s> ▁a <0x0A> </s>"),
]


@pytest.mark.parametrize(("more", "text", "expected"), PREFIXES)
def test_sentencepiece_is_read(tmp_path, more, text, expected):
    said = {
        **{"model": "llama", "pre": "default", "tokens": PIECES},
        **{"scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, 0.0]},
        **{"token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6], "unknown_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2, **more},
    }
    actual = tokenizer(tmp_path, {f"tokenizer.ggml.{key}": value for key, value in said.items()})
    assert " ".join(actual.convert_ids_to_tokens(actual(text)["input_ids"])) == expected
    assert (
        actual.decode(actual(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            bytes_keys("superbpe"),
            "tokenizer.ggml.pre = superbpe, which is not known here",
        ),
        (bytes_keys("smollm", model="bert"), "with a tokenizer bert; expected gpt2 or llama"),
        (bytes_keys("smollm", model=None), "with a tokenizer None; expected gpt2 or llama"),
        (bytes_keys("gpt-2", token_type=[3] * 276), "would be cut into others"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_one_line(tmp_path, keys, expected):
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"][:-1], "<\uff5cown>"]
    with pytest.raises(UserError, match=expected) as caught:
        tokenizer(tmp_path, keys)
    assert "\n" not in str(caught.value)


def test_a_file_is_parsed_once_and_again_when_it_changed(tiny_path, tmp_path, monkeypatch):
    parsed, real = [], gguf.reader._read_metadata
    monkeypatch.setattr(
        gguf.reader, "_read_metadata", lambda *item: parsed.append(1) or real(*item)
    )
    config = section(tmp_path / "model.gguf")
    write_gguf(tiny_path, tmp_path / "model.gguf")
    tokenizer_of(config), load_model(config), load_model(config)
    assert len(parsed) == 1
    write_gguf(tiny_path, tmp_path / "model.gguf", {"qwen2.context_length": 77})
    assert ModelSource.of(config).settings.max_position_embeddings == 77
    assert len(parsed) == 2


def test_quantised_tensors_are_what_the_format_says(tmp_path):
    model = made_model("llama", hidden_size=64, num_attention_heads=4, head_dim=16)
    kinds = format_of.GGMLQuantizationType
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "up_proj" in name:
                packed = format_of.quantize(value.numpy(), kinds.Q4_0)
                value.copy_(torch.from_numpy(format_of.dequantize(packed, kinds.Q4_0)))
    write_gguf_model(model, tmp_path / "model.gguf", packed={"ffn_up.weight": kinds.Q4_0})
    assert torch.allclose(
        logits(load_model(section(tmp_path / "model.gguf"))), logits(model), atol=2e-5
    )
