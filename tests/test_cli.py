"""However a program fails, its user reads one line."""

import errno
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from builders import ROOT
from safetensors import SafetensorError

from ubmoe import cli as command
from ubmoe.config import UserError, keys, load_config


def outcome(monkeypatch, capsys, error=None, arguments=(), main=None):
    """Exit status, stdout and stderr of a program whose body raises `error`, or returns a path."""
    monkeypatch.setattr("sys.argv", ["program", *arguments])

    def one(config):
        if error is not None:
            raise error
        return f"{config.output_dir}/x.json"

    status = 0
    try:
        command.run("program", "Purpose.", main or one)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_last_line_is_the_path_of_the_result(monkeypatch, capsys):
    found = outcome(monkeypatch, capsys, arguments=["output_dir=a"])
    assert found == (0, "a/x.json\n", "")


def test_the_whole_configuration_is_shown_and_nothing_run(monkeypatch, capsys, tmp_path):
    arguments = ["seed=3", "--show-config", f"output_dir={tmp_path}/run"]
    error = AssertionError("it was run")
    status, output, _ = outcome(monkeypatch, capsys, error, arguments=arguments)
    assert status == 0 and not (tmp_path / "run").exists()
    (tmp_path / "shown.yaml").write_text(output)
    assert load_config(tmp_path / "shown.yaml") == command.parse([arguments[0], arguments[2]])


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (UserError("what:\n where"), 2, "what: where"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "a/b: No space left on device",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "runs/tiny: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; resume=auto goes on"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "lower the batch size"),
        (
            RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 3"),
            2,
            "no space",
        ),
        (SafetensorError("I/O error: No space left on device"), 2, "no space left for runs/tiny"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 2, "out of memory: lower"),
        (MemoryError(), 2, "out of memory: lower"),
    ],
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, status, expected):
    code, output, errors = outcome(monkeypatch, capsys, error)
    assert (code, output) == (status, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and expected in errors


def test_what_to_lower_is_the_programs_own():
    names = [name for name, _ in keys()]
    programs = ("calculate_dp", "train_bi", "train_ubmoe")
    wings = ("ubmoe.bitune.__main__", "ubmoe.probing.__main__", "ubmoe.evaluate.__main__")
    for program in (*programs, *wings):
        advice = import_module(program).LOWER
        words = re.findall(r"[a-zA-Z_]+(?:\.[a-zA-Z_]+)+", advice)
        assert words and all(word in names for word in words), (program, words)


def test_a_mistake_of_ours_is_not_hidden(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        outcome(monkeypatch, capsys, RuntimeError("shapes do not match"))


def test_real_memory_errors_are_recognised(monkeypatch, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    code, _, errors = outcome(monkeypatch, capsys, caught.value)
    assert code == 2 and "out of memory" in errors


def test_help_and_bad_arguments(monkeypatch, capsys):
    code, output, errors = outcome(monkeypatch, capsys, arguments=["seed=1", "--help"])
    assert (code, errors) == (0, "") and output.startswith(
        "usage: program [CONFIG] [key=value ...] [--show-config]"
    )
    code, _, errors = outcome(monkeypatch, capsys, arguments=["sed=1"])
    assert code == 2 and "did you mean seed?" in errors
    code, _, errors = outcome(monkeypatch, capsys, arguments=["seed", "1"])
    assert code == 2 and "got 2 config files (seed, 1), expected one; a key is given as" in errors


def test_a_line_of_the_hubs_library_is_said_once():
    code = (
        "from ubmoe import cli\n"
        "def main(config):\n"
        "    from huggingface_hub.utils import logging\n"
        "    logging.get_logger('huggingface_hub.utils').warning('Retrying in 1s')\n"
        "cli.run('program', 'Purpose.', main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count("Retrying in 1s")) == (0, 1), done.stderr


def test_a_dry_run_is_refused_where_there_is_none_and_never_runs(monkeypatch, capsys):
    code, output, errors = outcome(monkeypatch, capsys, arguments=["dry_run=true"])
    assert (code, output) == (2, "")
    assert "dry_run: program has none; expected false, or one of the three scripts" in errors


def test_a_program_of_several_verbs_names_them(monkeypatch, capsys):
    verbs = {"plan": lambda config: f"planned {config.seed}", "run": lambda config: None}
    code, output, _ = outcome(monkeypatch, capsys, arguments=["plan", "seed=7"], main=verbs)
    assert (code, output) == (0, "planned 7\n")
    for arguments in ([], ["seed=7"], ["plans"]):
        code, output, errors = outcome(monkeypatch, capsys, arguments=arguments, main=verbs)
        assert (code, output) == (2, "")
        assert "expected program plan|run [CONFIG] [key=value ...]" in errors
        assert (f"got {arguments[0]!r} first" if arguments else "got nothing first") in errors
    code, output, _ = outcome(monkeypatch, capsys, arguments=["--help"], main=verbs)
    assert code == 0 and output.startswith("usage: program plan|run [CONFIG] [key=value ...]")
    code, _, errors = outcome(
        monkeypatch, capsys, arguments=["plan", "results.action=run"], main=verbs
    )
    assert code == 2 and "results.action: unknown key; it is a word now: python -m" in errors


def test_another_process_says_what_the_first_one_did_not_meet(monkeypatch, capsys):
    monkeypatch.setattr(command, "WAIT", 0.01)
    of_torchrun = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in of_torchrun.items():
        monkeypatch.setenv(name, value)
    code, _, errors = outcome(monkeypatch, capsys, MemoryError())
    assert code == 2 and errors.startswith("error (process 3): out of memory")


PROGRAMS = ["calculate_dp", "train_bi", "train_ubmoe", "ubmoe.scan", "ubmoe.swap", "ubmoe.shift"]
PROGRAMS += [f"ubmoe.{name}.__main__" for name in ("bitune", "evaluate", "probing", "results")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_a_program_is_being_imported_is_quiet(program):
    code = f"""
import sys, runpy
class Impatient:
    def find_spec(self, name, *_):
        if name == "pydantic":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Impatient())
runpy.run_module({program!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


class PanicException(BaseException):  # noqa: N818  # as libraries in Rust call theirs
    pass


@pytest.mark.parametrize("error", [PanicException("no entry found"), Exception("Missing [UNK]")])
def test_a_tokenizer_that_panics_is_one_line(monkeypatch, capsys, error):
    code, output, errors = outcome(monkeypatch, capsys, error)
    assert (code, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("error: model.name: its tokenizer") and str(error) in errors


@pytest.mark.parametrize(
    ("given", "culprit"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"WORLD_SIZE": "٢"}, "WORLD_SIZE: got '٢'"),
        ({"RANK": "a"}, "RANK: got 'a'"),
        ({"RANK": "1"}, "RANK: got '1'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: got '-1'"),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "2"}, "LOCAL_RANK: got '3'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 in the environment, without RANK"),
    ],
)
def test_processes_that_no_torchrun_started_are_one_line(monkeypatch, capsys, given, culprit):
    monkeypatch.setenv("RANK", "0")  # put back afterwards
    for name in command.PROCESSES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code, output, errors = outcome(monkeypatch, capsys)
    assert (code, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith(f"error: {culprit}") and "torchrun" in errors


def test_a_shell_s_backend_of_pictures_is_not_used(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "no such thing")
    assert outcome(monkeypatch, capsys)[0] == 0
    assert os.environ["MPLBACKEND"] == "agg"
