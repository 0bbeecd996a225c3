"""The scripts as their users run them: a result at the end, or one line and exit status 2."""

import json
import shutil
import signal
import time
from itertools import combinations
from pathlib import Path

import pytest
from builders import random_model, run, start
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from ubmoe.config import EOL, load_config
from ubmoe.report import tables
from ubmoe.results.__main__ import table
from ubmoe.tiny import language

FAST = ["dependence.max_texts=12", "model.device=cpu"]
CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}


def test_a_newcomer_gets_a_result_figures_and_a_table(tiny_path, tmp_path):
    code, output, errors = run(*FAST, f"output_dir={tmp_path}/run")
    assert code == 0, errors
    path = output.splitlines()[-1]
    assert path == f"{tmp_path}/run/dependence.json"
    result = json.loads((tmp_path / "run" / "dependence.json").read_text())
    overall = result["dependence"]["overall"]
    assert sum(overall.values()) == pytest.approx(100, abs=1e-4)
    assert result["dependence"]["texts"] == 12
    assert len(result["dependence"]["layers"]) == 4
    assert "attention causal, verified" in errors
    assert {item.name for item in (tmp_path / "run").iterdir()} == {
        "dependence.json",
        "calculate_dp.config.yaml",
        "dependence_buckets.png",
        "dependence_heads.png",
        "dependence_map.png",
        "dependence_norms.png",
    }
    shown = table(load_config(None, [f"output_dir={tmp_path}/run"]))
    assert f"{overall['after']:.2f}" in shown and "dependence_map.png" in shown


def test_the_bidirectional_flow_says_so(tiny_path, tmp_path):
    code, _, errors = run(*FAST, "dependence.flow=bidirectional", f"output_dir={tmp_path}/run")
    assert code == 0, errors
    assert "attention bidirectional, verified" in errors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_path):
    """Everything that can be wrong, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    files = {
        "good.jsonl": json.dumps(CHAT),
        "empty.jsonl": "",
        "rows.jsonl": json.dumps(CHAT) + '\n{"prompt": "x"}',
        "broken.jsonl": json.dumps(CHAT) + '\n{"messages": [',
        "blank.jsonl": '{"text": "  "}',
        "file": "",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    shutil.copytree(tiny_path, folder / "plain")
    shutil.copytree(
        tiny_path, folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors")
    )
    for path in (folder / "plain").glob("chat_template*"):
        path.unlink()
    settings = json.loads((folder / "plain" / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(folder / "weightless", folder / "encoder")
    random_model("bert", vocab_size=1000).save_pretrained(folder / "encoder")
    broken = random_model("qwen2", vocab_size=1000)
    broken.lm_head.weight.data.fill_(float("nan"))
    shutil.copytree(folder / "weightless", folder / "nan")
    broken.save_pretrained(folder / "nan")
    return folder


CASES = {
    "missing dataset": (["dependence.dataset={0}/none.jsonl"], "none.jsonl: cannot be read"),
    "empty dataset": (["dependence.dataset={0}/empty.jsonl"], "empty.jsonl: empty; expected"),
    "row without messages": (["dependence.dataset={0}/rows.jsonl"], "rows.jsonl:2: has no mess"),
    "malformed JSON": (["dependence.dataset={0}/broken.jsonl"], "broken.jsonl:2: malformed JSON"),
    "empty text": (["dependence.dataset={0}/blank.jsonl"], "blank.jsonl:1: empty text"),
    "invalid UTF-8": (["dependence.dataset={0}/latin.txt"], "latin.txt:1: not UTF-8"),
    "no weights": (["model.name={0}/weightless"], "weightless has no weights; expected model"),
    "no decoder": (["model.name={0}/encoder"], "BertLMHeadModel (sdpa) sees later tokens"),
    "NaN weights": (["model.name={0}/nan"], "has NaN or infinite weights in "),
    "unknown key": (["dependence.bucket=[0, 5]"], "did you mean dependence.buckets?"),
    "buckets": (["dependence.buckets=[256, 0]"], "expected at least two ascending edges"),
    "unwritable": (["output_dir={0}/file/run"], "file/run cannot be written"),
    "missing config": (["{0}/none.yaml"], "none.yaml: cannot be read"),
}


def test_chats_without_a_template_are_measured_as_texts_and_that_is_recorded(inputs, tmp_path):
    code, output, errors = run(*FAST, f"output_dir={tmp_path}", f"model.name={inputs}/plain")
    assert code == 0 and "no chat template; chats are read as texts" in errors
    assert json.loads(Path(output.strip()).read_text())["chat_form"] == "question"


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(inputs, tmp_path, case):
    arguments, expected = CASES[case]
    arguments = [f"output_dir={tmp_path}/run", *(argument.format(inputs) for argument in arguments)]
    code, output, errors = run(*FAST, *arguments)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith("error: "), errors
    assert expected in errors
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_the_earlier_result(inputs, tmp_path):
    good = f"dependence.dataset={inputs}/good.jsonl"
    assert run(*FAST, good, f"output_dir={tmp_path}")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = f"dependence.dataset={inputs}/rows.jsonl"
    assert run(*FAST, bad, f"output_dir={tmp_path}")[0] == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(tiny_path, tmp_path):
    process = start("dependence.batch_tokens=1", "model.device=cpu", f"output_dir={tmp_path}/run")
    seen = ""
    while "verified" not in seen:
        seen += process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: interrupted")


STAGE = "bi.stages.0.max_steps=6"


@pytest.mark.slow
def test_an_encoder_is_trained_saved_and_scored(tiny_path, tmp_path):
    common = ["model.device=cpu", f"output_dir={tmp_path}/run"]
    code, output, errors = run(*common, STAGE, script="train_bi.py")
    assert code == 0, errors
    assert output == f"{tmp_path}/run/sts.json\n"
    result = json.loads((tmp_path / "run" / "sts.json").read_text())
    assert result["sts"]["stages"][0]["trainable"] == {"ffn": 4 * 3 * 128 * 384}
    assert (tmp_path / "run" / "training.png").stat().st_size > 10_000
    assert "attention bidirectional, verified" in errors
    assert "stage simcse (full): 12 tensors train, ffn 589,824 parameters, float32" in errors
    assert "negatives per anchor: 63" in errors and "wrapped in SentenceTransformer" in errors
    assert "one text, as the model reads it: A small example." in errors
    assert "collapsed" not in errors
    shown = table(load_config(None, [f"output_dir={tmp_path}/run"]))
    assert f"{result['sts']['average']:.2f}" in shown
    code, output, errors = run(
        f"model.name={tmp_path}/run/bi", f"output_dir={tmp_path}/again", script="-m ubmoe.evaluate"
    )
    assert code == 0, errors
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert again["evaluation"]["average"] == pytest.approx(result["sts"]["average"], abs=1e-3)


@pytest.mark.slow
def test_an_encoder_that_has_collapsed_is_said(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COLLAPSED_BELOW", 1.0)  # then any has
    keys = ["model.device=cpu", "evaluation.sts=[]", "bi.stages.0.max_steps=2"]
    code, _, errors = run(*keys, f"output_dir={tmp_path}/run", script="train_bi.py")
    assert code == 0
    assert "collapsed: all texts are alike to this encoder" in errors, errors


def test_the_context_bounds_training_saving_and_scoring_alike(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.save_pretrained(tmp_path / "model")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    keys = {"max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    random_model("gpt2", vocab_size=8192, **keys, **ends).save_pretrained(tmp_path / "model")
    texts = [f"The {word} sleeps." + " It wakes." * n for n in (0, 30) for word in ("cat", "dog")]
    rows = [{"anchor": text, "positive": f"{text} again"} for text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [(n, one, other) for n, (one, other) in enumerate(combinations(texts, 2))]
    lines = ["score\tsentence1\tsentence2", *("\t".join(map(str, row)) for row in pairs)]
    (tmp_path / "long.tsv").write_text("\n".join(lines))
    stage = f"objective: supervised, dataset: {tmp_path}/pairs.jsonl, train: [embedding]"
    code, _, errors = run(
        *(f"model.name={tmp_path}/model", "model.device=cpu", f"output_dir={tmp_path}/run"),
        *("bi.attention=causal", f"evaluation.sts=[{tmp_path}/long.tsv]", "bi.max_tokens=4096"),
        f"bi.stages=[{{{stage}, max_steps: 1, per_device_train_batch_size: 2}}]",
        script="train_bi.py",
    )
    assert code == 0, errors
    assert errors.count("bi.max_tokens: 64, the model's context, not 4096") == 1
    actual = json.loads((tmp_path / "run" / "sts.json").read_text())["sts"]
    stock = SentenceTransformer(f"{tmp_path}/run/bi", device="cpu")
    assert stock.max_seq_length == stock.tokenizer.model_max_length == actual["max_tokens"] == 64
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "bi").model_max_length == 64
    one, other = (stock.encode([row[place] for row in pairs]) for place in (1, 2))
    cosines = stock.similarity_pairwise(one, other)
    expected = 100 * spearmanr(cosines, [row[0] for row in pairs]).statistic
    assert actual["tasks"]["long"] == pytest.approx(expected, abs=1e-4)
    assert actual["truncated"]["long"] == 6  # of both columns, those of 30 sentences
    assert actual["stages"][0]["truncated_percent"] == 50.0


def test_a_form_and_a_whitening_are_saved_as_they_were_scored(tiny_path, tmp_path):
    common = [f"evaluation.sts=[{tmp_path}/pairs.tsv]", "model.device=cpu"]
    pairs = language.pairs(40, 9)
    rows = [f"{pair.score}\t{pair.sentence1}\t{pair.sentence2}" for pair in pairs]
    (tmp_path / "pairs.tsv").write_text("\n".join(["score\tsentence1\tsentence2", *rows]))
    keys = ["bi.stages=[]", "bi.form=eol", "bi.whiten={rows: 60, remove: 1}"]
    code, _, errors = run(*common, *keys, f"output_dir={tmp_path}/run", script="train_bi.py")
    assert code == 0, errors
    result = json.loads((tmp_path / "run" / "sts.json").read_text())
    bi, actual = result["config"]["bi"], result["sts"]
    assert (bi["form"], bi["prompt"], bi["pooling"]) == ("eol", EOL, "last")
    assert actual["whiten"]["sentences"] <= 60 and actual["whiten"]["variance_removed"] > 1
    assert "bi.whiten.dataset" in result["inputs"]
    code, _, errors = run(
        *(*common, f"model.name={tmp_path}/run/bi", f"output_dir={tmp_path}/again"),
        script="-m ubmoe.evaluate",
    )
    assert code == 0, errors
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    again = again["evaluation"]
    assert again["tasks"] == actual["tasks"]


@pytest.mark.slow
def test_the_chain_of_llm2vec_runs_with_adapters(tiny_path, tmp_path):
    chain = (
        "bi.stages=[{objective: mntp, max_tokens: 32, max_steps: 2, logging_steps: 1},"
        "{objective: simcse, lora: {rank: 2}, max_steps: 2, logging_steps: 1}]"
    )
    common = ["model.device=cpu", "evaluation.sts=[]", f"output_dir={tmp_path}/run"]
    code, _, errors = run(*common, chain, script="train_bi.py")
    assert code == 0, errors
    stages = json.loads((tmp_path / "run" / "sts.json").read_text())["sts"]["stages"]
    assert [stage["objective"] for stage in stages] == ["mntp", "simcse"]
    modes = [tmp_path / "run" / "stages" / str(n) / "adapter" / "ubmoe.json" for n in (0, 1)]
    assert [json.loads(mode.read_text())["stages_before"] for mode in modes] == [0, 1]


@pytest.fixture(scope="module")
def encoder(tiny_path, tmp_path_factory):
    """The encoder of a few steps, as train_bi.py leaves it in an output directory."""
    folder = tmp_path_factory.mktemp("encoder")
    keys = ["model.device=cpu", "evaluation.sts=[]", "bi.stages.0.max_steps=3"]
    code, _, errors = run(*keys, f"output_dir={folder}", script="train_bi.py")
    assert code == 0, errors
    return folder / "bi"


@pytest.mark.slow
def test_the_mixture_is_trained_saved_and_scored(encoder, tmp_path):
    (tmp_path / "pairs.tsv").write_text(
        "score\tsentence1\tsentence2\n5\tThe dog sleeps.\tThe dog sleeps.\n"
        "3\tThe dog sleeps.\tThe cat sleeps.\n0\tThe dog sleeps.\tAnna eats bread.\n"
    )
    keys = ["model.device=cpu", f"output_dir={tmp_path}/run", f"ubmoe.bi={encoder}"]
    keys += ["ubmoe.max_steps=4", "ubmoe.held_out=20", "evaluation.limit=5"]
    keys += [f"evaluation.sts=[{tmp_path}/pairs.tsv]", "ubmoe.export=[mixture, modes, adapter]"]
    keys += ["ubmoe.rank=4"]
    code, output, errors = run(*keys, script="train_ubmoe.py")
    assert code == 0, errors
    assert output == f"{tmp_path}/run/generation.json\n"
    result = json.loads((tmp_path / "run" / "generation.json").read_text())
    section = result["generation"]
    assert set(section["tasks"]) == {"tiny_facts", "tiny_grammar"}
    assert section["perplexity"] == section["routes"]["learned"]["perplexity"] > 1
    assert len(section["router"]["bi_weight_by_role"]) == 4
    places = {(row["route"], row["attention"]) for row in result["sts"]}
    routes = ("learned", "half", "average", "uni", "bi")
    expected = {(route, mask) for route in routes for mask in ("causal", "bidirectional")}
    assert places == expected | {("adapter", "bidirectional")}
    encoded = json.loads((encoder.parent / "sts.json").read_text())["sts"]
    parts = {"stages"}  # how it was trained
    assert all(set(row) - {"route"} == set(encoded) - parts for row in result["sts"])
    assert encoded["attention"] == "bidirectional"
    assert result["adapter"]["rank"] == 4 and 0 < result["adapter"]["kept"] < 1
    assert {item.name for item in (tmp_path / "run").iterdir()} == {
        *("generation.json", "train_ubmoe.config.yaml", "routing.png"),
        *("ubmoe", "modes", "adapter", "routers"),
    }
    shown = table(load_config(None, [f"output_dir={tmp_path}/run"]))
    assert f"{section['perplexity']:.2f}" in shown and "routing.png" in shown


@pytest.mark.slow
def test_bitune_is_trained_saved_and_scored(tmp_path):
    keys = ["model.device=cpu", f"output_dir={tmp_path}/run", "bitune.max_steps=3"]
    keys += ["evaluation.limit=5"]
    code, output, errors = run(*keys, script="-m ubmoe.bitune")
    assert code == 0, errors
    assert output == f"{tmp_path}/run/bitune.json\n"
    section = json.loads((tmp_path / "run" / "bitune.json").read_text())["bitune"]
    assert set(section["tasks"]) == {"tiny_facts", "tiny_grammar"} and section["perplexity"] > 1
    assert len(section["alpha_keys"]) == len(section["alpha_values"]) == 4
    assert section["counts"]["held_out"] >= 100 and section["variant"] == "full"
    saved = {item.name for item in (tmp_path / "run" / "bitune").iterdir()}
    assert saved >= {"causal", "bidirectional", "theta.safetensors", "bitune.json"}
    shown = table(load_config(None, [f"output_dir={tmp_path}/run"]))
    assert f"{section['perplexity']:.2f}" in shown and "bitune.png" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ubmoe.bi={0}/none"], "none has no modules.json; run train_bi.py with the same config"),
        (["ubmoe.dataset={1}/blank.jsonl"], "blank.jsonl:1: empty text"),
        (["ubmoe.held_out=100000"], "100000 of 400 rows; expected fewer"),
        (["evaluation.generation=[arc_chalenge]"], "no lm-eval task; did you mean arc_challenge"),
        (["ubmoe.top_k=1"], "expected router_init: uni"),
    ],
)
@pytest.mark.slow
def test_bad_mixture_input_is_one_last_line_and_exit_2(
    inputs, encoder, tmp_path, arguments, expected
):
    arguments = [argument.format(tmp_path, inputs) for argument in arguments]
    common = ["model.device=cpu", f"output_dir={tmp_path}/run", f"ubmoe.bi={encoder}"]
    code, output, errors = run(*common, *arguments, script="train_ubmoe.py")
    assert (code, output) == (2, ""), errors
    assert "Traceback" not in errors and expected in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bi.stages.0.lora={{}}", "bi.stages.0.train=[all]"], "lora cannot train all"),
        (["bi.stages.0.objective=mntp", "bi.stages.0.mask_token=a mask"], "expected one"),
        (["bi.prompt=no place"], "expected {text} once"),
        (
            ["bi.whiten={{rows: 3, remove: 9}}"],
            "3 different sentences of tiny have fewer",
        ),
        (["bi.form=echo", "bi.max_tokens=9"], "bi.max_tokens: 9 leaves no room for a text"),
        (["bi.stages.0.train=[fnn]"], "got 'fnn', expected 'ffn', 'attention'"),
        (["bi.stages.0.optim=adamw_8bit"], "adamw_8bit needs the package bitsandbytes"),
        (["bi.stages.0.report_to=wand"], "report_to: 'wand' is not known or not installed"),
        (["bi.stages.0.dropout=0"], "the two views of every sentence are identical"),
        (["bi.stages.0.dataset={0}/rows.jsonl"], "rows.jsonl:1: lacks a column text or sentence"),
        (["evaluation.sts=[{0}/none.tsv]"], "none.tsv: cannot be read"),
    ],
)
def test_bad_training_input_is_one_last_line_and_exit_2(inputs, tmp_path, arguments, expected):
    arguments = [argument.format(inputs) for argument in arguments]
    arguments += ["model.device=cpu", f"output_dir={tmp_path}/run", STAGE]
    code, output, errors = run(*arguments, script="train_bi.py")
    assert (code, output) == (2, ""), errors
    assert "Traceback" not in errors and expected in errors.splitlines()[-1]
    assert not (tmp_path / "run" / "sts.json").exists()
