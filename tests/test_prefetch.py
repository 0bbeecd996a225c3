"""What a config names is fetched, what is here is not, and what cannot be loaded is an error."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from builders import ROOT

from ubmoe import prefetch
from ubmoe.config import UserError, load_config
from ubmoe.evaluate import benchmark


def test_all_that_a_config_names_and_nothing_that_is_here():
    config = load_config("configs/qwen2.5-0.5b.yaml")
    actual = list(prefetch.needs(config))
    assert actual[0] == ("model", "Qwen/Qwen2.5-0.5B-Instruct")
    assert ("dataset", "sentence-transformers/wiki1m-for-simcse") in actual
    assert ("dataset", "HuggingFaceH4/ultrafeedback_binarized:default:train_sft") in actual
    assert ("sts", "STS22") in actual and ("generation", "truthfulqa_mc2") in actual
    assert len(actual) == len(set(actual))
    assert list(prefetch.needs(load_config(None))) == []


def test_data_of_every_program_are_fetched_where_they_are_read():
    keys = ["bi.stages.0.lm_dataset=a/lm", "trajectory.perplexity=[a/text]", "scan.pairs=STS12"]
    assert list(prefetch.needs(load_config(None, keys))) == [("sts", "STS12")]
    keys += ["bi.stages.0.lm_weight=1", "trajectory.steps=[1]", "evaluation.perplexity=[a/more]"]
    assert set(prefetch.needs(load_config(None, keys))) == {
        *(("dataset", name) for name in ("a/lm", "a/text", "a/more")),
        ("sts", "STS12"),
    }


def test_what_was_fetched_is_written_down(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    asked = {}

    def snapshot(name, **keys):
        asked[name] = keys
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    keys = ["model.name=some/model", "model.revision=abc", f"output_dir={tmp_path}/run"]
    path = Path(prefetch.run(load_config(None, keys)))
    assert json.loads(path.read_text()) == {
        "fetched": [{"kind": "model", "name": "some/model", "revision": "abc", "bytes": 5}]
    }
    assert asked["some/model"]["revision"] == "abc"
    assert not {"*.bin", "*.py"} & set(asked["some/model"]["allow_patterns"])
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(UserError, match="no .safetensors weights, and pickles are not fetched"):
        prefetch.run(load_config(None, keys))


def test_every_task_of_a_benchmark_is_fetched(monkeypatch):
    loaded = []

    class Task:
        def __init__(self, name):
            data = {"path": f"mteb/{name}", "revision": "1"}
            self.metadata = SimpleNamespace(name=name, dataset=data)

        def load_data(self):
            if self.metadata.name == "gone":
                raise ConnectionError("no network")
            loaded.append(self.metadata.name)

        def unload_data(self):
            loaded.append("unloaded")

    config = load_config(None, ["evaluation.mteb=[eng]"])
    assert list(prefetch.needs(config)) == [("mteb", "eng")]
    monkeypatch.setattr(benchmark, "mteb_tasks", lambda names: [Task("a"), Task("b")])
    assert prefetch.FETCH["mteb"]("eng") == {
        name: {"path": f"mteb/{name}", "revision": "1"} for name in "ab"
    }
    assert loaded == ["a", "unloaded", "b", "unloaded"]
    monkeypatch.setattr(benchmark, "mteb_tasks", lambda names: [Task("gone")])
    with pytest.raises(UserError, match="evaluation.mteb: gone cannot be loaded .no network."):
        prefetch.FETCH["mteb"]("gone")


def test_a_model_of_two_revisions_is_fetched_twice():
    probed = "probing.models=[{name: a/b, revision: one}, {name: a/b, revision: two}, {name: a/b}]"
    config = load_config(None, [probed, "model.name=a/b"])
    assert [name for _, name in prefetch.needs(config)] == ["a/b", "a/b@one", "a/b@two"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.name=some/model", "model.name: some/model cannot be loaded"),
        ("ubmoe.dataset=some/data", "some/data: cannot be loaded"),
        ("evaluation.sts=[STS12]", "evaluation.sts: STS12 cannot be loaded"),
    ],
)
def test_without_a_network_what_is_missing_is_named(tmp_path, key, said):
    with pytest.raises(UserError, match=said):
        prefetch.run(load_config(None, [key, f"output_dir={tmp_path}/run"]))


def test_it_is_a_program_with_help():
    command = [sys.executable, "-m", "ubmoe.prefetch", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m ubmoe.prefetch [CONFIG] [key=value ...]")
