"""Killed at any rename, a run has either not happened, or the next start makes it whole."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT

import train_bi
import train_ubmoe
from ubmoe.bitune import __main__ as bitune
from ubmoe.config import UserError, load_config
from ubmoe.evaluate import generation, sts
from ubmoe.staging import locked, move_into_place, staging

FILES = ("bi/config.json", "modes/config.json", "losses.png", "a.config.yaml", "sts.json")


def write(folder, text):
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def whole_run(directory, text):
    with staging(directory, "train_bi") as folder:
        write(folder, text)
        move_into_place(folder)


def killed(work, count, monkeypatch):
    """Whether a process that does the work dies of its `count`-th rename, cleaning nothing up."""
    process = os.fork()
    if not process:
        try:
            real, calls = Path.rename, []

            def rename(path, target):
                calls.append(path)
                if len(calls) > count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(path, target)

            monkeypatch.setattr(Path, "rename", rename)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_run_that_is_killed_at_any_rename_is_whole_or_has_not_been(tmp_path, monkeypatch):
    for count in range(20):
        directory = tmp_path / str(count)
        write(directory, "old")
        died = killed(lambda at=directory: whole_run(at, "new"), count, monkeypatch)
        again = tmp_path / f"{count}, killed again"
        subprocess.run(["cp", "-r", directory, again], check=True)
        killed(lambda at=again: staging(at, "x").__enter__(), count % 3, monkeypatch)
        for each in (directory, again):
            with staging(each, "calculate_dp"):  # another program of the same folder
                expected = "new" if count or not died else "old"
                assert {(each / name).read_text() for name in FILES} == {expected}, (count, each)
            with staging(each, "train_bi"):
                pass
            assert {path.name for path in each.iterdir()} == {name.split("/")[0] for name in FILES}
        if not died:
            break
    assert count == 1 + len(FILES) + 2  # its own name, each, and what two folders give way to


def test_nothing_is_moved_where_something_is_in_the_way(tmp_path):
    write(tmp_path, "old")
    (tmp_path / "sts.json").unlink()
    (tmp_path / "sts.json").mkdir()
    with pytest.raises(IsADirectoryError):
        whole_run(tmp_path, "new")
    assert {(tmp_path / name).read_text() for name in FILES[:-1]} == {"old"}
    assert not list(tmp_path.glob(".*"))


def test_what_an_older_version_was_killed_over_is_put_in_order(tmp_path):
    for name in (".bi.new", ".modes.old", ".bi.old", "bi"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    with staging(tmp_path, "train_bi"):
        pass
    assert {each.name: (each / "a").read_text() for each in tmp_path.iterdir()} == {
        "bi": "bi",
        "modes": ".modes.old",  # there was no other
    }


def test_two_of_one_program_in_one_folder_are_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    code = "import sys, time, pathlib; from ubmoe.staging import locked\n"
    code += f"with locked(pathlib.Path({str(tmp_path)!r}), 'a'): print(flush=True), time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    process.stdout.readline()
    refused = pytest.raises(UserError, match="output_dir: a already runs in .*; expected another")
    with refused, locked(tmp_path, "a"):
        pass
    with locked(tmp_path, "b"):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / ".a.lock").exists()
    with locked(tmp_path, "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def boom(*_, **__):
    raise UserError("no score")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PROGRAMS = {
    "train_bi": (train_bi, sts, "sts_scores", ["bi"], "stages"),
    "train_ubmoe": (
        train_ubmoe,
        generation,
        "generation_scores",
        ["ubmoe", "modes"],
        "routers",
    ),
    "bitune": (bitune, generation, "generation_scores", ["bitune"], "adapters"),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_that_fails_in_scoring_touches_no_earlier_model_and_loses_no_work(
    program, tiny_path, tmp_path, monkeypatch, caplog
):
    module, scorer, function, models, checkpoints = PROGRAMS[program]
    caplog.set_level("INFO", "ubmoe")
    keys = ["model.device=cpu", f"output_dir={tmp_path}/run"]
    keys += ["evaluation.sts=[]", "evaluation.generation=[]", "bitune.generation=[]"]
    keys += ["bi.stages.0.max_steps=2", "ubmoe.max_steps=2", "bitune.max_steps=2"]
    for section in ("ubmoe", "bitune"):
        keys += [f"{section}.max_rows=40", f"{section}.held_out=8"]
    if program == "train_ubmoe":
        train_bi.main(load_config(None, keys))
    given = load_config(None, [*keys, "seed=1"])
    module.main(given)
    own = [tmp_path / "run" / name for name in models]
    assert all(folder.is_dir() for folder in own)
    before = {folder: contents(folder) for folder in own}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    other = load_config(None, [*keys, "seed=2", "resume=auto"])
    with monkeypatch.context() as patched:
        patched.setattr(scorer, function, boom)
        with pytest.raises(UserError, match="no score"):
            module.main(other)
    assert {folder: contents(folder) for folder in own} == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    caplog.clear()
    module.main(other)
    assert checkpoints in caplog.text and "trained to the end before" in caplog.text
    after = {folder: contents(folder) for folder in own}
    assert (program == "bitune" or after != before) and after.keys() == before.keys()
