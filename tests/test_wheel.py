"""A wheel has one program, the scripts and the configs, and works far from any checkout."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from builders import ROOT

from ubmoe import __main__ as program

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ubmoe", "configs")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content, built from a copy: nothing of the checkout is written."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, "calculate_dp.py", "train_bi.py", "train_ubmoe.py"):
        put = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        put(ROOT / name, folder / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def asked(installed, *arguments):
    """What the installed program says, in a folder where nothing is."""
    empty = installed.parent / "empty"
    empty.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-P", "-m", "ubmoe", *arguments],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_a_wheel_has_the_program_the_scripts_and_the_configs(installed):
    [entry] = installed.glob("ubmoe-*.dist-info/entry_points.txt")
    assert "ubmoe = ubmoe.__main__:main" in entry.read_text()
    for name in ("calculate_dp.py", "train_bi.py", "train_ubmoe.py"):
        assert (installed / name).is_file()
    for path in (ROOT / "configs").rglob("*.*"):
        if "__pycache__" not in path.parts:
            assert (installed / "ubmoe" / path.relative_to(ROOT)).is_file(), path
    for path in [*(ROOT / "ubmoe").rglob("*.py"), *(ROOT / "ubmoe").rglob("*.json")]:
        assert (installed / path.relative_to(ROOT)).is_file(), path


def test_it_answers_where_no_checkout_is(installed):
    done = asked(installed, "--help")
    assert done.returncode == 0 and done.stdout == program.usage() + "\n"
    done = asked(installed, "encode", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ubmoe encode [CONFIG] [key=value ...]")
    done = asked(installed, "encode", "configs/qwen2.5-0.5b.yaml", "sed=1")
    assert done.returncode == 2 and "did you mean seed?" in done.stderr
    done = asked(installed, "results", "plan", "configs/tiny.yaml", "results.table=2")
    assert done.returncode == 0, done.stderr
    done = asked(installed, "dp", "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("did you mean configs/tiny.yaml?\n"), done.stderr


@pytest.mark.slow
def test_it_measures_and_encodes_to_the_end(installed, tiny_path):
    short = ["model.device=cpu", "dependence.max_texts=12", "bi.stages.0.max_steps=2"]
    for command, result in (("dp", "dependence"), ("encode", "sts")):
        done = asked(installed, command, "configs/tiny.yaml", *short)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"runs/tiny/{result}.json\n" and "Traceback" not in done.stderr
        written = json.loads((installed.parent / "empty" / done.stdout.strip()).read_text())
        assert written["environment"]["git_commit"] is None  # of no checkout


def test_the_commands_of_a_plan_are_those_of_the_wheel(installed):
    asked_for = ["configs/tiny.yaml", "results.table=2"]
    plan = asked(installed, "results", "plan", *asked_for).stdout
    lines = [shlex.split(line) for line in plan.splitlines() if line.startswith("python ")]
    assert {tuple(line[:3]) for line in lines} == {("python", "-m", "train_bi")}
    done = subprocess.run(
        [sys.executable, "-P", *lines[0][1:], "--help"],
        cwd=installed.parent / "empty",
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: train_bi.py"), done.stderr


def test_another_word_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ubmoe", "encoder"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert capsys.readouterr().err.startswith("error: ubmoe: got 'encoder'; expected dp, encode,")


def test_every_command_is_a_program(monkeypatch):
    ran = []
    monkeypatch.setattr(program.runpy, "run_module", lambda name, **keys: ran.append(name))
    for name, (module, _) in program.COMMANDS.items():
        monkeypatch.setattr("sys.argv", ["ubmoe", name, "seed=1"])
        program.main()
        assert sys.argv == [f"ubmoe {name}", "seed=1"] and ran[-1] == module
        path = module.replace(".", "/")
        assert (ROOT / f"{path}.py").is_file() or (ROOT / path / "__main__.py").is_file()


def test_the_cpu_line_takes_the_same_torch_from_its_cpu_index(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shown = subprocess.run(
        ["make", "-n", "demo", "TORCH=cpu"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert "https://download.pytorch.org/whl/cpu" in shown
    assert shown.index("whl/cpu") < shown.index("-r requirements.lock")
    lock = (ROOT / "requirements.lock").read_text()
    assert "\ntorch==" in lock and "nvidia" not in lock


def test_the_project_names_its_pages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ubmoe": "ubmoe.__main__:main"} and project["urls"]
