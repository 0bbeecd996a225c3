"""Killed at any rename, a run has either not happened, or the next start makes it whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT

import train_bi
import train_ubmoe
from ubmoe import owned
from ubmoe.bitune import __main__ as bitune
from ubmoe.config import UserError, load_config
from ubmoe.evaluate import generation, sts
from ubmoe.staging import complete_moves, locked, move_into_place, staging

FILES = ("bi/config.json", "modes/config.json", "losses.png", "a.config.yaml", "sts.json")


KEYS = {".json": owned.RESULT, ".yaml": owned.RESOLVED}


def content(name, text):
    """What says by itself that it is ours; in a folder its mark does."""
    kind = "" if "/" in name else Path(name).suffix
    if kind == ".png":
        return f"tEXtCreator\0ubmoe {text}"
    return json.dumps(dict.fromkeys(KEYS[kind], text)) if kind else text


def write(folder, text):
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content(name, text))


def is_all(folder, text):
    return all((folder / name).read_text() == content(name, text) for name in FILES)


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
        directory.mkdir()
        whole_run(directory, "old")
        died = killed(lambda at=directory: whole_run(at, "new"), count, monkeypatch)
        again = tmp_path / f"{count}, killed again"
        subprocess.run(["cp", "-r", directory, again], check=True)
        killed(lambda at=again: staging(at, "x").__enter__(), count % 3, monkeypatch)
        for item in (directory, again):
            with staging(item, "calculate_dp"):  # another program of the same folder
                expected = "new" if count or not died else "old"
                assert is_all(item, expected), (count, item)
            with staging(item, "train_bi"):
                pass
            assert {path.name for path in item.iterdir()} == {name.split("/")[0] for name in FILES}
        if not died:
            break
    assert count == 1 + len(FILES) + 2  # its own name, each, and what two folders give way to


def test_nothing_is_moved_where_something_is_in_the_way(tmp_path):
    whole_run(tmp_path, "old")
    (tmp_path / "sts.json").unlink()
    (tmp_path / "sts.json").mkdir()
    with pytest.raises(IsADirectoryError):
        whole_run(tmp_path, "new")
    (tmp_path / "sts.json").rmdir()
    (tmp_path / "sts.json").write_text(content("sts.json", "old"))
    assert is_all(tmp_path, "old") and not list(tmp_path.glob(".*"))


def user_adds(kind, folder):
    """Something of a user's where a run is about to write; returns what it is called."""
    if kind == "a folder":
        shutil.rmtree(folder / "bi")
        (folder / "bi").mkdir()
        (folder / "bi" / "novel.txt").write_text("mine")
    elif kind == "a file in a model":
        (folder / "bi" / "notes.txt").write_text("mine")
    elif kind == "a link to a folder":
        (folder / "bi").rename(folder / "elsewhere")
        (folder / "bi").symlink_to(folder / "elsewhere")
    elif kind == "a link to a file":
        (folder / "sts.json").rename(folder / "elsewhere")
        (folder / "sts.json").symlink_to(folder / "elsewhere")
    elif kind == "a result":
        (folder / "sts.json").write_text('{"STS of mine": 84.3}')
    elif kind == "a picture":
        (folder / "losses.png").write_bytes(b"\x89PNG\r\n of a dog")
    else:
        name = {"what it writes in": ".unfinished-", "what it has written in": ".finished-"}[kind]
        (folder / f"{name}train_bi").mkdir()
        (folder / f"{name}train_bi" / "sts.json").write_text("mine")


@pytest.mark.parametrize("after_the_start", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        *("a folder", "a file in a model", "a link to a folder", "a link to a file", "a result"),
        *("a picture", "what it writes in", "what it has written in"),
    ],
)
def test_what_a_user_has_put_there_is_refused_and_stays(tmp_path, kind, after_the_start):
    whole_run(tmp_path, "old")
    if after_the_start and kind == "what it writes in":
        return  # it is the run's own by then

    def again():
        with staging(tmp_path, "train_bi") as folder:
            write(folder, "new")
            if after_the_start:
                user_adds(kind, tmp_path)
                before.update(contents(tmp_path, ".unfinished-"))
            move_into_place(folder)

    before = {}
    if not after_the_start:
        user_adds(kind, tmp_path)
        before.update(contents(tmp_path))
    with pytest.raises(UserError, match="is in the way, and not known to be made by this version"):
        again()
    assert contents(tmp_path) == before


def test_what_comes_in_the_way_of_a_killed_run_stays_and_its_result_is_kept(tmp_path, monkeypatch):
    whole_run(tmp_path, "old")
    assert killed(lambda: whole_run(tmp_path, "new"), 1, monkeypatch)  # it was finished
    user_adds("a file in a model", tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="bi/notes.txt is in the way"):
            complete_moves(tmp_path)
    (tmp_path / "bi" / "notes.txt").unlink()
    complete_moves(tmp_path)
    assert is_all(tmp_path, "new")


def test_folders_that_are_called_like_ours_are_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    for name in (".venv.new", ".photos.old", ".finished-books", ".unfinished-novel", "bi"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "a").write_text(name)
    elsewhere.mkdir()
    whole_run(elsewhere, "of another folder")
    (tmp_path / "run" / ".finished-x").symlink_to(elsewhere)
    before = contents(tmp_path)
    with staging(tmp_path / "run", "train_bi"):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["text", "link", "folder"])
def test_a_lock_that_is_none_is_left_alone(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / ".a.lock"
    make = {"text": lambda: path.write_text("mine"), "folder": path.mkdir}
    make.get(kind, lambda: path.symlink_to(tmp_path / "mine"))()
    with pytest.raises(UserError, match=r"\.a\.lock is in the way"), locked(tmp_path, "a"):
        pass
    assert os.path.lexists(path) and (tmp_path / "mine").read_text() == "mine"


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


def contents(folder, but="none"):
    """Files and links with what is in them, but for locks and what is below a folder so called."""
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink()) and path.suffix != ".lock"
        if but not in str(path.relative_to(folder))
    }


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
