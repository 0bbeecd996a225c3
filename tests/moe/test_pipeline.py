"""The run's mixture: joined by one process in little memory, and read by all."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from builders import ROOT, random_model, run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.bidirectional import make_bidirectional
from ubmoe.config import BiSection, load_config
from ubmoe.encoder.sentence_encoder import as_encoder, load_saved, save_encoder
from ubmoe.evaluate.sts import sts_scores, sts_tasks
from ubmoe.models import cards
from ubmoe.models.loading import load_model
from ubmoe.models.streams import open_weights
from ubmoe.moe import export, pipeline
from ubmoe.moe.joining import write_mixture
from ubmoe.results.__main__ import table


@pytest.fixture(scope="module")
def encoder(tiny_path, tmp_path_factory):
    """The embedded model as an encoder with other FFNs."""
    folder = tmp_path_factory.mktemp("encoder") / "bi"
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1.1
    model.config.is_causal = False
    tokenizer, settings = AutoTokenizer.from_pretrained(tiny_path), BiSection(prompt=None)
    save_encoder(as_encoder(model, tokenizer, settings), model, tokenizer, settings, folder)
    return folder


def keys(encoder, output, *more):
    common = ["ubmoe.max_steps=2", "ubmoe.held_out=8", "ubmoe.max_rows=40", "model.device=cpu"]
    common += ["evaluation.sts=[]", "evaluation.generation=[]", "ubmoe.routes=[]"]
    return [*common, f"ubmoe.bi={encoder}", f"output_dir={output}", *more]


def test_cards_have_the_scores_of_their_own_uses(tmp_path):
    folders = ("ubmoe", "modes", "adapter")
    for name in folders:
        (tmp_path / name).mkdir()
        cards.write(tmp_path / name, export.METADATA, "# Some\n")
    keys = ["ubmoe.export=[mixture, modes, adapter]", "ubmoe.dataset=org/chats", "output_dir=x"]
    config = load_config(None, [*keys, "model.name=org/base"])
    routes = {
        name: {"tasks": {"piqa": {"acc": score}}, "perplexity": score / 10}
        for name, score in (("learned", 60.0), ("uni", 70.0))
    }
    sts = [
        {"route": route, "attention": mask, "tasks": {"STS": score}, "sources": {"STS": {}}}
        for route, mask, score in (
            *(("learned", "bidirectional", 40.0), ("learned", "causal", 1.0)),
            *(("bi", "bidirectional", 50.0), ("adapter", "bidirectional", 49.0)),
        )
    ]
    record = {"generation": {"routes": routes, "metrics": {"piqa": "acc"}}, "sts": sts}
    inputs = SimpleNamespace(joins=True, attention="bidirectional")
    pipeline.complete_cards(config, inputs, tmp_path.joinpath, record)
    expected = {
        "ubmoe": [60.0, 6.0, 40.0],
        "modes": [70.0, 7.0, 50.0],
        "adapter": [70.0, 7.0, 49.0],
    }
    for name in folders:
        data = ModelCard.load(tmp_path / name / "README.md").data
        assert [eval_result.metric_value for eval_result in data.eval_results] == expected[name]
        assert data.base_model == "org/base"
        assert data.datasets == (["org/chats"] if name == "ubmoe" else None)


@pytest.mark.slow
def test_two_processes_train_the_mixture_that_the_first_has_written(encoder, tmp_path):
    more = ["ubmoe.per_device_train_batch_size=4", "ubmoe.export=[mixture]"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    launch += [str(ROOT / "train_ubmoe.py"), *keys(encoder, tmp_path / "run", *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrapped in DistributedDataParallel" in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("generation.json", "train_ubmoe.config.yaml", "routing.png", "ubmoe", "routers")
    }
    given = load_config(None, []).model
    uni, bi = (open_weights(given.model_copy(update=item), None) for item in ({}, named(encoder)))
    (tmp_path / "alone").mkdir()
    write_mixture(uni, bi, tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        actual = (tmp_path / "run" / "ubmoe" / path.name).read_bytes()
        assert (actual == path.read_bytes()) == (path.name != "model-routers.safetensors"), path
    model = load_model(given.model_copy(update=named(tmp_path / "run" / "ubmoe")))
    for name, value in load_file(tmp_path / "run" / "ubmoe" / "model-routers.safetensors").items():
        assert torch.equal(model.state_dict()[name], value) and value.any()


def named(folder):
    return {"name": str(folder), "device": "cpu"}


@pytest.mark.slow
def test_a_mixture_that_nobody_asked_for_is_trained_and_not_kept(encoder, tmp_path):
    code, _, errors = run(
        *keys(encoder, tmp_path / "run", "ubmoe.export=[modes]"), script="train_ubmoe.py"
    )
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("generation.json", "train_ubmoe.config.yaml", "routing.png", "modes", "routers")
    }
    result = json.loads((tmp_path / "run" / "generation.json").read_text())
    assert result["environment"]["model_class"] == "Qwen2MoeForCausalLM"
    assert "route uni: attention causal, verified" in errors
    assert "route bi: attention bidirectional, verified" in errors


@pytest.mark.slow
def test_an_adapter_alone_is_joined_to_nothing_and_trains_no_router(encoder, tmp_path):
    more = ["ubmoe.export=[adapter]", "ubmoe.rank=128", "ubmoe.objective=both"]
    given = [*keys(encoder, tmp_path / "run", *more), "evaluation.sts=[tiny]"]
    code, _, errors = run(*given, script="train_ubmoe.py")
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("generation.json", "train_ubmoe.config.yaml", "adapter")
    }
    result = json.loads((tmp_path / "run" / "generation.json").read_text())
    assert result["environment"]["model_class"] == "Qwen2ForCausalLM"
    assert list(result["generation"]["routes"]) == ["uni"] and "router" not in result["generation"]
    scored = sts_scores(load_saved(str(encoder), "cpu"), sts_tasks(["tiny"]), 32)
    [row] = result["sts"]
    assert row["route"] == "adapter"  # of full rank: nothing of the encoder is lost
    assert row["tasks"]["tiny"] == pytest.approx(scored["tasks"]["tiny"], abs=0.1)


@pytest.fixture(scope="module")
def gemma(tiny_path, tmp_path_factory):
    """A small Gemma 3, with a window in every other layer, and an encoder of it: (uni, bi)."""
    folder, tokenizer = tmp_path_factory.mktemp("gemma"), AutoTokenizer.from_pretrained(tiny_path)
    model = random_model("gemma3_text", vocab_size=len(tokenizer), tie_word_embeddings=True)
    for item in (model, tokenizer):
        item.save_pretrained(folder / "uni")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1.1
    make_bidirectional(model)
    settings = BiSection(prompt=None)
    encoder = as_encoder(model, tokenizer, settings)
    save_encoder(encoder, model, tokenizer, settings, folder / "bi")
    return folder / "uni", folder / "bi"


def test_a_model_without_a_mixture_is_exported_as_an_adapter(gemma, tmp_path):
    uni, bi = gemma
    more = [f"model.name={uni}", "ubmoe.export=[adapter]", "ubmoe.rank=32", "evaluation.sts=[tiny]"]
    given = keys(bi, tmp_path / "run", *more)
    code, _, errors = run(*given, script="train_ubmoe.py")
    assert code == 0, errors
    actual = {path.name for path in (tmp_path / "run").iterdir()}
    assert actual == {"generation.json", "train_ubmoe.config.yaml", "adapter"}
    result = json.loads((tmp_path / "run" / "generation.json").read_text())
    assert list(result["generation"]["routes"]) == ["uni"] and "router" not in result["generation"]
    [row] = result["sts"]
    adapter, ids = tmp_path / "run" / "adapter", torch.arange(60)[None]  # longer than the window
    with torch.no_grad():
        own, kept = (
            AutoModelForCausalLM.from_pretrained(item)(ids).logits for item in (uni, adapter)
        )
    assert torch.equal(own, kept) and row["route"] == "adapter"
    texts = ["Anna sleeps.", "The dog sees " * 20]
    one, other = (
        SentenceTransformer(str(item), device="cpu").encode(texts) for item in (bi, adapter)
    )
    torch.testing.assert_close(torch.tensor(other), torch.tensor(one), atol=1e-3, rtol=1e-3)
    base = SentenceTransformer(str(bi), device="cpu", config_kwargs={"is_causal": True})
    assert abs(base.encode(texts) - one).max() > 1e-2
    assert list(table(load_config(None, given)))


def test_a_mixture_of_a_class_that_has_none_is_refused_before_anything_is_loaded(gemma, tmp_path):
    uni, bi = gemma
    given = keys(bi, tmp_path / "run", f"model.name={uni}", "ubmoe.export=[adapter, modes]")
    code, _, errors = run(*given, script="train_ubmoe.py")
    assert code == 2 and errors.strip().splitlines()[-1] == (
        "error: ubmoe.export: gemma3_text has no stock mixture of experts, as qwen2, llama, "
        "mistral, qwen3 have; got adapter, modes, expected [adapter]"
    )


# --- memory ---------------------------------------------------------------------------------------

WIDTH, WORDS = 512, 40_000
LARGEST = 2 * WIDTH * WORDS  # bytes of the embedding in bfloat16
ALLOWED = 60e6  # blocks, a matrix' singular vectors, and what the libraries import on the way
CHILD = """
import sys
from pathlib import Path
from ubmoe.config import load_config
from ubmoe.moe import pipeline
from ubmoe.recording import peak_memory_bytes
from ubmoe.models.source import ModelSource
config = load_config(None, sys.argv[2:])
source = ModelSource.of(config.model)
source.tokenizer  # as pipeline.read has read it
inputs = pipeline.Inputs(
    source, source.at(config.ubmoe.bi), "bidirectional", [], [], [], [], {}
)
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before = peak_memory_bytes()
pipeline.join(config, inputs, lambda name: Path(sys.argv[1]) / name)
print(peak_memory_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is Linux'")
def test_joining_takes_no_more_memory_than_the_largest_tensor(tiny_path, tmp_path):
    """All three exports in float32 of a pair of 400 MB, which differs in one layer."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 1408, "vocab_size": WORDS}
    model = random_model("qwen2", num_hidden_layers=28, **shape, tie_word_embeddings=False)
    model.bfloat16().save_pretrained(tmp_path / "uni")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "uni")
    with torch.no_grad():
        model.model.layers[7].mlp.up_proj.weight += 0.5
    model.save_pretrained(tmp_path / "bi")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("uni", "bi")]
    assert min(sizes) > 180e6 > 1.3 * (1.5 * LARGEST + ALLOWED)  # one model would not fit
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (tmp_path / "bi" / name).write_text("{}")
    (tmp_path / "bi" / "modules.json").write_text('[{"type": "a.Transformer", "path": ""}]')
    (tmp_path / "bi" / "1_Pooling").mkdir()
    given = [f"model.name={tmp_path}/uni", f"ubmoe.bi={tmp_path}/bi", "model.dtype=float32"]
    given += ["ubmoe.export=[mixture, modes, adapter]", "ubmoe.rank=2"]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "made"), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"ubmoe", "modes", "adapter"}
    assert int(done.stdout.split()[-1]) < 1.5 * LARGEST + ALLOWED
