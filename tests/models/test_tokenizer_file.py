"""What tokenizer.json says of tokens holds, whatever class transformers loads it with."""

import json
import shutil

import pytest
import torch
from builders import random_model, tokenizer_of
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ubmoe.config import ModelSection, UserError, load_config
from ubmoe.encoder.sentence_encoder import as_encoder, load_saved, save_encoder
from ubmoe.models import tokenizer_file

TEXT = "It's Café cafe\u0301 12  345\n\n\tanna  lives 7\u00bd in <|im_start|>the house"


def section(path):
    return ModelSection(name=str(path), device="cpu")


def own(path):
    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXT).ids


def changed(tiny_path, folder, parts=(), settings=(), model=()):
    """The embedded model's folder with other parts in its tokenizer.json and settings beside it."""
    shutil.copytree(tiny_path, folder)
    for name, more in (
        ("tokenizer.json", parts),
        ("tokenizer_config.json", settings),
        ("config.json", model),
    ):
        said = json.loads((folder / name).read_text()) | dict(more)
        (folder / name).write_text(json.dumps(said))
    return folder


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
}
PARTS = {
    "digits": {"pre_tokenizer": DIGITS},
    "no digits": {"pre_tokenizer": BYTES | {"use_regex": True}},
    "lower": {"normalizer": {"type": "Lowercase"}},
    "none": {"normalizer": None},
    "stripped": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "prefix": {"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}},
    "decoder": {"decoder": {"type": "Fuse"}},
}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("part", list(PARTS))
def test_other_parts_are_used_as_the_file_has_them(tiny_path, tmp_path, kind, part):
    known = {"llama": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}}
    folder = changed(
        tiny_path, tmp_path / "model", PARTS[part], known.get(kind, {}), {"model_type": kind}
    )
    tokenizer, before = tokenizer_of(section(folder)), tokenizer_of(section(tiny_path))
    assert tokenizer(TEXT)["input_ids"] == own(folder)
    stated = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(own(folder)) == stated.decode(own(folder), skip_special_tokens=False)
    assert tokenizer.chat_template == before.chat_template
    assert tokenizer.special_tokens_map == before.special_tokens_map
    assert tokenizer.model_max_length == before.model_max_length
    assert tokenizer.padding_side == before.padding_side


def test_stock_classes_would_read_other_tokens(tiny_path, tmp_path):
    """Without this there would be nothing to mend, and the tests above could not fail."""
    for part in ("lower", "prefix", "stripped"):
        folder = changed(tiny_path, tmp_path / part, PARTS[part])
        assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != own(folder)


def test_a_way_to_split_that_no_merge_shows_is_seen(tiny_path, tmp_path):
    folder = changed(tiny_path, tmp_path / "model", PARTS["digits"])
    stock = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert not tokenizer_file.alike(stock, Tokenizer.from_file(str(folder / "tokenizer.json")))


REPLACED = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "horse"}
RARE = {
    "a word that is replaced": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, REPLACED]}
    },
    "a word that is cut off": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"String": "iv"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTES | {"use_regex": True},
            ],
        }
    },
}


@pytest.mark.parametrize("part", list(RARE))
def test_what_the_file_says_of_one_word_alone_is_seen(tiny_path, tmp_path, part):
    folder = changed(tiny_path, tmp_path / "model", RARE[part])
    text = "The zebra lives in the house."
    own = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert own != tokenizer_of(section(tiny_path))(text)["input_ids"]
    assert tokenizer_of(section(folder))(text)["input_ids"] == own


@pytest.mark.parametrize("share", [0.5, 1e-6])
def test_merges_that_are_dropped_at_random_are_refused(tiny_path, tmp_path, share):
    folder = changed(tiny_path, tmp_path / "model")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["dropout"] = share
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="drops merges at random; expected dropout: null in it"):
        tokenizer_of(section(folder))


def test_a_tokenizer_that_is_its_file_stays_what_it_is(tiny_path, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "PreTrainedTokenizerFast", None)  # nobody makes another
    assert type(tokenizer_of(section(tiny_path))).__name__ == "Qwen2Tokenizer"


def test_tokens_that_end_a_text_are_the_files(tiny_path, tmp_path):
    end, single = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"id": "A", "type_id": 0}
    known = {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}
    form = [{"Sequence": single}, end]
    after = {"type": "TemplateProcessing", "single": form, "pair": form, "special_tokens": known}
    folder = changed(tiny_path, tmp_path / "model", PARTS["lower"] | {"post_processor": after})
    assert tokenizer_of(section(folder))(TEXT)["input_ids"] == own(folder)
    assert own(folder)[-1] == 2


def test_a_tokenizer_without_the_file_is_left_alone(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.name_or_path = str(tmp_path)
    assert tokenizer_file.as_stored(tokenizer) is tokenizer


def test_an_encoder_that_stock_libraries_would_read_otherwise_is_refused(tiny_path, tmp_path):
    tokenizer = tokenizer_of(section(changed(tiny_path, tmp_path / "model", PARTS["lower"])))
    model = random_model("qwen2", vocab_size=len(tokenizer))
    with pytest.raises(UserError, match="beside a model of type qwen2 stock libraries would read"):
        as_encoder(model, tokenizer, load_config(None, ["bi.prompt=null"]).bi)


def test_an_encoder_is_saved_and_read_with_the_files_own(tiny_path, tmp_path):
    known = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    folder = changed(tiny_path, tmp_path / "model", PARTS["lower"], known, {"model_type": "llama"})
    tokenizer = tokenizer_of(section(folder))
    model = random_model("llama", vocab_size=len(tokenizer))
    settings = load_config(None, ["bi.prompt=null"]).bi
    encoder = as_encoder(model, tokenizer, settings)
    save_encoder(encoder, model, tokenizer, settings, tmp_path / "bi")
    texts = ["Anna", "ANNA LIVES"]
    for actual in (load_saved(str(tmp_path / "bi")), SentenceTransformer(str(tmp_path / "bi"))):
        assert torch.equal(torch.tensor(actual.encode(texts)), torch.tensor(encoder.encode(texts)))
        assert actual.tokenizer(TEXT)["input_ids"] == own(folder)


def test_a_strangers_encoder_is_read_as_its_file_says(tiny_path, tmp_path):
    """A stock encoder whose class replaces what its tokenizer.json says."""
    tokenizer = tokenizer_of(section(tiny_path))
    model = random_model("qwen2", vocab_size=len(tokenizer))
    settings = load_config(None, ["bi.prompt=null"]).bi
    save_encoder(
        as_encoder(model, tokenizer, settings), model, tokenizer, settings, tmp_path / "bi"
    )
    said = json.loads((tmp_path / "bi" / "tokenizer.json").read_text()) | PARTS["lower"]
    (tmp_path / "bi" / "tokenizer.json").write_text(json.dumps(said))
    lower, upper = load_saved(str(tmp_path / "bi")).encode(["anna", "ANNA"])
    assert (lower == upper).all()
    lower, upper = SentenceTransformer(str(tmp_path / "bi")).encode(["anna", "ANNA"])
    assert (lower != upper).any()


def test_files_that_contradict_each_other_are_one_line(tiny_path, tmp_path, monkeypatch):
    folder = changed(tiny_path, tmp_path / "model", PARTS["lower"])
    monkeypatch.setattr(tokenizer_file, "alike", lambda *each: False)
    with pytest.raises(UserError, match="gives other tokens than alone; expected them"):
        tokenizer_of(section(folder))
