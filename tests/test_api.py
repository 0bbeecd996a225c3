"""The four ideas from Python: what the documentation of `ubmoe` shows, and where it is exact."""

import doctest
import importlib
import json
import subprocess
import sys

import pytest
import torch
from builders import ROOT, pair, random_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import ubmoe
from ubmoe.layered import partial_layers

IDS = torch.tensor([[5, 6, 7, 8, 9]])
HEAVY = {"torch", "transformers", "pydantic", "numpy", "yaml"}
PROBE = f"import sys, ubmoe; print(sorted({HEAVY} & set(sys.modules)))"


@pytest.mark.parametrize("module", ["ubmoe", "ubmoe.encoder"])
def test_the_documentation_runs(tiny_path, module):
    module = importlib.import_module(module)
    actual = doctest.testmod(module)
    assert actual.failed == 0 and actual.attempted >= 5


def test_nothing_heavy_is_imported_before_a_call():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there_whatever_was_imported_before():
    import ubmoe.encoder.sentence_encoder  # noqa: F401  # which sets ubmoe.encoder

    for name in ubmoe.__all__:
        assert callable(getattr(ubmoe, name)), name


def test_a_mask_replaces_the_one_before():
    model = random_model("qwen2")
    ubmoe.make_bidirectional(model, layers=[1], keep_sink=True)
    assert partial_layers(model.config) == [1]
    ubmoe.make_bidirectional(model)
    assert partial_layers(model.config) is None and model.config.is_causal is False
    with pytest.raises(ubmoe.UserError, match="expected some of the layers 0 to 1"):
        ubmoe.make_bidirectional(model, layers=[7])


@pytest.mark.parametrize("headless", [False, True])
@torch.no_grad()
def test_a_joined_model_is_exactly_both(tiny_path, headless):
    uni, bi = (ubmoe.load("tiny", device="cpu") for _ in range(2))
    for layer in bi.model.layers:
        layer.mlp.up_proj.weight.mul_(1.5)
    ubmoe.make_bidirectional(bi)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    given = ubmoe.encoder(bi, tokenizer, form="plain") if headless else bi
    mixture = ubmoe.join(uni, given)
    assert torch.equal(mixture(IDS).logits, uni(IDS).logits)
    ubmoe.make_bidirectional(mixture)
    assert torch.equal(mixture.model(IDS)[0], bi.model(IDS)[0])


@torch.no_grad()
def test_a_saved_mixture_is_loaded_with_a_route(tmp_path):
    uni, bi = pair()
    ubmoe.join(uni, bi).save_pretrained(tmp_path)
    for route, model in (("uni", uni), ("bi", bi), ("mode", uni)):
        loaded = ubmoe.load(tmp_path, route=route, device="cpu")
        assert torch.equal(loaded(IDS).logits, model(IDS).logits), route
    learned = ubmoe.load(tmp_path, device="cpu")(IDS).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    torch.testing.assert_close(learned, stock)
    assert not torch.allclose(learned, uni(IDS).logits, atol=1e-3)


def test_an_encoder_saved_by_its_library_reads_as_before(tiny_path, tmp_path):
    model, tokenizer = ubmoe.load("tiny"), AutoTokenizer.from_pretrained(tiny_path)
    encoder = ubmoe.encoder(ubmoe.make_bidirectional(model), tokenizer)
    encoder.save(str(tmp_path))
    [one], [other] = (
        item.encode(["The dog sleeps."]) for item in (encoder, SentenceTransformer(str(tmp_path)))
    )
    assert one == pytest.approx(other, abs=1e-5)


def test_dependence_of_texts_and_chats(tiny_path):
    model, tokenizer = ubmoe.load("tiny"), AutoTokenizer.from_pretrained(tiny_path)
    chat = [{"role": "user", "content": "Where does Anna live?"}]
    actual = ubmoe.attention_dependence(model, tokenizer, ["The dog sleeps.", chat], max_tokens=8)
    assert max(actual["by_text"]["tokens"]) == 8 and actual["texts"] == 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda *_: ubmoe.load("tiny", route="bi"), "is no mixture of two experts"),
        (lambda *_: ubmoe.load("tiny", dtyp="x"), "did you mean model.dtype"),
        (lambda *m: ubmoe.encoder(*m, form="eos"), "bi.form: got 'eos', expected"),
        (lambda *m: ubmoe.attention_dependence(*m, []), "expected a list of texts or chats"),
        (lambda *m: ubmoe.attention_dependence(*m, ["a"], batch=1), "unknown key"),
        (lambda m, _: ubmoe.join(m, random_model("qwen2")), "other shapes than model.name"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny_path, call, said):
    model, tokenizer = ubmoe.load("tiny"), AutoTokenizer.from_pretrained(tiny_path)
    with pytest.raises(ubmoe.UserError, match=said) as raised:
        call(model, tokenizer)
    assert "\n" not in str(raised.value)


def test_the_notebook_runs_and_its_outputs_are_small(tiny_path, monkeypatch, capsys):
    path = ROOT / "docs" / "notebook.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(path), "exec"), names)
        written = "".join("".join(output["text"]) for output in cell["outputs"])
        assert capsys.readouterr().out == written
    assert len(cells) >= 4 and path.stat().st_size < 20_000
