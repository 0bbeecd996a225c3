"""A result is written whole or not at all, recorded without paths, and printed without torch."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from builders import SECTION, random_model, recorded

from ubmoe import owned
from ubmoe import recording as run_recording
from ubmoe.config import UserError, load_config
from ubmoe.data.rows import read_texts
from ubmoe.unfinished import Unfinished


def test_what_an_interrupted_run_left_goes_when_the_result_is_there(config):
    left = Path(config.output_dir) / "dependence.partial-0-of-1.npz"
    left.parent.mkdir(parents=True)
    left.write_text("")
    theirs = [left.with_name(f"dependence.partial-{name}") for name in ("notes.txt", "1-of-2.npz")]
    theirs[0].write_text("mine")
    np.savez(theirs[1], mine=np.arange(3))
    with pytest.raises(KeyError), run_recording.recording("calculate_dp", "dependence", config):
        raise KeyError
    assert left.exists()
    recorded(config)
    assert not left.exists() and all(path.exists() for path in theirs)


@pytest.mark.parametrize("number", [0, 12])
def test_a_file_of_yours_in_place_of_a_partial_result_is_refused_at_once(config, number):
    theirs = Path(config.output_dir) / f"dependence.partial-{number}.npz"
    theirs.parent.mkdir(parents=True)
    np.savez(theirs, mine=np.arange(3))
    begun = run_recording.recording("calculate_dp", "dependence", config)
    with pytest.raises(UserError, match=theirs.name), begun:
        raise AssertionError("it has begun")
    assert list(np.load(theirs)) == ["mine"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_partial_result_is_there_under_resume_auto_alone(config, resume):
    config = config.model_copy(update={"resume": resume})
    with run_recording.recording("evaluate", "dependence", config) as run:
        Unfinished(run.partial(3), {}).save(scores="{}")
        assert run.partial(3).exists() == (resume == "auto")
        assert run.partial(3) == run.directory / "dependence.partial-3.npz"
        theirs = run.partial(4)
        np.savez(theirs, mine=np.arange(3))
        assert run.partial(4).exists()
        run.model = random_model("qwen2")
    assert theirs.exists() and not (run.directory / "dependence.partial-3.npz").exists()


def test_a_result_says_what_its_numbers_depend_on(config):
    result = json.loads(recorded(config).read_text())
    assert set(result) == {
        "config",
        "inputs",
        "environment",
        "seconds",
        "peak_memory_bytes",
        "dependence",
    }
    assert result["dependence"] == SECTION
    assert result["config"] == config.model_dump()
    environment = result["environment"]
    assert environment["packages"]["torch"] and environment["seeds"] == [5]
    assert (environment["dtype"], environment["device"]) == ("float32", "cpu")
    assert result["peak_memory_bytes"] > 50e6  # torch alone takes more
    again = load_config(Path(config.output_dir) / "calculate_dp.config.yaml")
    assert again == config


def test_dropped_rows_are_counted_in_the_result_where_that_is_wanted(config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    data = config.data.model_copy(update={"skip_bad_rows": True})
    skipping = config.model_copy(update={"data": data})
    with run_recording.recording("evaluate", "dependence", skipping) as run:
        assert len(read_texts(str(path))) == 1
        run.model = random_model("qwen2")
    assert json.loads(run.path.read_text())["skipped_rows"] == 1
    with (
        pytest.raises(UserError, match=":2: empty text"),
        run_recording.recording("evaluate", "dependence", config),
    ):
        read_texts(str(path))


def test_the_commit_is_edited_where_code_is_and_not_where_records_are(tmp_path, monkeypatch):
    def git(*words):
        given = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        subprocess.run(["git", *given], check=True, capture_output=True)

    files = [tmp_path / name for name in ("ubmoe/results.py", "train_bi.py", "results/a.json")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "a")
    monkeypatch.setattr(run_recording, "__file__", str(files[0]))
    files[2].write_text("2")
    commit = run_recording.git_commit()
    assert len(commit) == 40
    for path in files[:2]:
        path.write_text("2")
        assert run_recording.git_commit() == f"{commit}+changes"
        path.write_text("1")


def test_a_failed_run_leaves_an_earlier_result_as_it_was(config):
    before = recorded(config).read_bytes()
    with pytest.raises(KeyError), run_recording.recording("calculate_dp", "dependence", config):
        raise KeyError
    other = config.model_copy(update={"seed": 6})  # its resolved config would be another file
    with pytest.raises(ValueError, match="Out of range float"):
        recorded(other, SECTION | {"texts": float("nan")})
    folder = Path(config.output_dir)
    assert (folder / "dependence.json").read_bytes() == before
    assert load_config(folder / "calculate_dp.config.yaml") == config
    assert {path.name for path in folder.iterdir()} == {
        "dependence.json",
        "calculate_dp.config.yaml",
    }


def test_what_an_earlier_run_left_is_not_said_to_be_written(config, caplog):
    caplog.set_level("INFO", "ubmoe")
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    for name in ("ubmoe", "modes"):
        owned.claim(folder / name)
    made = ["ubmoe", "modes", "routing.png"]
    with run_recording.recording("train_ubmoe", "generation", config, *made) as run:
        owned.claim(run.place("modes"))
        run.model = random_model("qwen2")
    assert (folder / "ubmoe").is_dir()
    assert caplog.messages[-1] == f"wrote in {folder}: modes/, generation.json"


def test_a_failed_first_run_leaves_nothing(config, tmp_path):
    with pytest.raises(KeyError), run_recording.recording("calculate_dp", "dependence", config):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(None, [f"output_dir={tmp_path}/file/runs"])
    with (
        pytest.raises(UserError, match=r"output_dir: .*file/runs cannot be written \(Not a dir"),
        run_recording.recording("calculate_dp", "dependence", config),
    ):
        pass
