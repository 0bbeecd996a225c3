"""A scan of the embedded model, against encoders of each pattern alone and a slow bootstrap."""

import json

import numpy as np
import pytest
from builders import run
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from ubmoe import bootstrap, unfinished
from ubmoe.config import UserError, with_keys
from ubmoe.encoder.sentence_encoder import load_encoder
from ubmoe.evaluate.sts import sts_scores, sts_task
from ubmoe.interventions import scan
from ubmoe.models.loading import load_model
from ubmoe.models.source import ModelSource
from ubmoe.tiny import language


@pytest.fixture
def asked(tmp_path, config):
    """A scan of 24 pairs of two lengths."""
    rows = [f"{p.score}\t{p.sentence1}\t{p.sentence2}" for p in language.pairs(24, 9)]
    path = tmp_path / "some.tsv"
    path.write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n")
    return with_keys(config, [f"scan.pairs={path}", "scan.batch_tokens=100", "resume=auto"])


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 50)


def scanned(config, folder):
    folder.mkdir(exist_ok=True)
    source = ModelSource.of(config.model)
    task = sts_task(config.scan.pairs)
    return scan.scan(load_model(source), source.tokenizer, config, task, folder)


@pytest.mark.parametrize(
    "keys",
    [["bi.prompt=null", "bi.keep_sink=true"], ["bi.prompt={text} =", "bi.max_tokens=6"]],
)
def test_a_pattern_scores_what_its_encoder_scores(asked, tmp_path, keys):
    config = with_keys(asked, keys)
    source = ModelSource.of(config.model)
    actual = scanned(config, tmp_path / "scan")["patterns"]
    for row in (actual[0], actual[1], actual[3], actual[-1]):
        for pooling in ("mean", "weighted_mean"):
            own = [f"bi.layers={json.dumps(row['layers'])}", f"bi.pooling={pooling}"]
            if row["layers"] == "none":
                own.append("bi.keep_sink=false")
            encoder = load_encoder(with_keys(config, own), source)
            alone = sts_scores(encoder, [sts_task(config.scan.pairs)], 8)
            assert row[pooling]["score"] == pytest.approx(alone["average"], abs=1e-2), row["name"]


def test_every_form_scores_what_its_encoder_scores(asked, tmp_path):
    forms = ["eol", "echo"]
    config = with_keys(asked, [f"scan.forms={forms}", "scan.patterns=[from]", "scan.centre=true"])
    actual = scanned(config, tmp_path / "scan")["patterns"]
    assert [row["form"] for row in actual[::5]] == forms and len(actual) == 10
    task = sts_task(config.scan.pairs)
    for row in (actual[0], actual[3], actual[-4]):  # none, from 2, all
        for pooling in ("mean", "last"):
            keys = [f"bi.form={row['form']}", f"bi.pooling={pooling}"]
            own = with_keys(config, [*keys, f"bi.layers={row['layers']}".replace("'", "")])
            encoder = load_encoder(own, ModelSource.of(own.model))
            alone = sts_scores(encoder, [task], 8)
            assert row[pooling]["score"] == pytest.approx(alone["average"], abs=1e-2), row
            vectors = [encoder.encode(task.dataset["test"][f"sentence{n}"]) for n in (1, 2)]
            every = np.concatenate(vectors).astype(float)
            components = PCA(1).fit(every)
            every -= components.inverse_transform(components.transform(every))
            one, other = np.split(every / np.linalg.norm(every, axis=1, keepdims=True), 2)
            expected = spearmanr((one * other).sum(1), task.dataset["test"]["score"]).statistic
            assert row[pooling]["centred"] == pytest.approx(100 * expected, abs=0.1), row


def test_a_form_alone_goes_on(asked, tmp_path, monkeypatch):
    keys = [
        "scan.forms=[eol, echo]",
        "scan.patterns=[from]",
        "scan.centre=true",
        "scan.max_pairs=6",
    ]
    config = with_keys(asked, keys)
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    whole = scanned(config, tmp_path / "scan")
    (tmp_path / "scan" / "scan.partial-echo.npz").unlink()
    read, real = [], scan._read
    monkeypatch.setattr(scan, "_read", lambda *a: read.append(a[1]) or real(*a))
    assert scanned(config, tmp_path / "scan") == whole
    assert read and all(type(item[0]).__name__ == "EchoTransformer" for item in read)


def test_pairs_are_evenly_spaced(asked):
    rows, gold = scan.pairs(sts_task(asked.scan.pairs), with_keys(asked, ["scan.max_pairs=3"]).scan)
    every = language.pairs(24, 9)
    assert [row[0] for row in rows] == [every[place].sentence1 for place in (0, 11, 23)]
    assert gold.tolist() == [every[place].score for place in (0, 11, 23)]


def test_an_interrupted_scan_goes_on(asked, tmp_path, monkeypatch):
    whole = scanned(asked, tmp_path / "whole")
    real, batches = scan._read, []

    def dying(*arguments):
        batches.append(len(arguments[2]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_read", dying)
        with pytest.raises(KeyboardInterrupt):
            scanned(asked, tmp_path / "scan")
    done, before = sum(batches[:2]), len(batches)
    monkeypatch.setattr(scan, "_read", lambda *a: batches.append(len(a[2])) or real(*a))
    assert scanned(asked, tmp_path / "scan") == whole
    assert sum(batches[before:]) == 2 * 24 - done


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("scan.max_pairs=10", "of another run (other pairs)"),
        ("bi.prompt={text} =", "other bi.prompt"),
    ],
)
def test_what_another_scan_left_is_not_taken(asked, tmp_path, monkeypatch, caplog, key, said):
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    scanned(asked, tmp_path / "scan")
    caplog.set_level("INFO", "ubmoe")
    scanned(with_keys(asked, [key]), tmp_path / "scan")
    assert said in caplog.text


def test_a_file_that_is_not_whole_is_said(asked, tmp_path, caplog):
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "scan.partial-0.npz").write_bytes(b"half")
    caplog.set_level("INFO", "ubmoe")
    scanned(asked, tmp_path / "scan")
    assert "not whole, or of an older version; starting afresh" in caplog.text


def test_pairs_that_cannot_be_had_are_blamed_on_their_key(asked, monkeypatch):
    task = sts_task(asked.scan.pairs)

    def unreachable():
        raise ConnectionError("Couldn't reach 'some/pairs' on the Hub")

    monkeypatch.setattr(task, "load_data", unreachable)
    with pytest.raises(UserError, match="^scan.pairs: some cannot be loaded .Couldn't reach"):
        scan.pairs(task, asked.scan)


def test_equal_scores_are_refused(tmp_path, config):
    path = tmp_path / "equal.tsv"
    path.write_text("score\tsentence1\tsentence2\n" + "1\ta\tb\n" * 5)
    with pytest.raises(UserError, match="scan.pairs: equal: all scores are 1"):
        scan.pairs(sts_task(str(path)), config.scan)


def test_cosines_that_are_not_finite_are_refused():
    bad = np.full((3, 5), np.nan)
    with pytest.raises(UserError, match="scan: cosines that are not finite"):
        scan._scores(bad, bad, bad, np.arange(5.0))


@pytest.mark.slow
def test_the_program_writes_a_record_a_table_and_a_picture(tmp_path):
    keys = [f"output_dir={tmp_path}/some", "scan.max_pairs=12", "scan.forms=[plain, eol]"]
    status, said, _ = run("configs/tiny.yaml", *keys, script="-m ubmoe.scan")
    result = json.loads((tmp_path / "some" / "scan.json").read_text())
    assert status == 0 and said.strip().endswith("scan.json")
    assert {item.name for item in (tmp_path / "some").glob("*.*")} >= {"scan.json", "scan.png"}
    assert result["scan"]["pairs"] == 12 and result["inputs"]["scan.pairs"]
