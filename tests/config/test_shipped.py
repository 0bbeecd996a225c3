"""Every shipped YAML and every command that the README or a YAML shows is one that works."""

import re
import shlex

import pytest
from builders import ROOT

from ubmoe import cli as command
from ubmoe.config import load_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = {"tiny"} | {
    f"{family}-{size}"
    for family, sizes in {
        "qwen2.5": ("0.5b", "1.5b", "3b", "7b", "14b"),
        "qwen1.5": ("0.5b", "1.8b", "4b", "7b"),
    }.items()
    for size in sizes
}


def commands(text):
    """Lines that start a program of ours, continued lines joined."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^[#$ ]*((?:python|torchrun) .*)$", joined, flags=re.MULTILINE)
    return [line.split("  #")[0].strip() for line in found]


def test_all_sizes_of_the_study_are_there():
    assert {path.stem for path in CONFIGS} == NAMES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_opens_like_a_lab_record(path):
    config = load_config(path)
    size = path.stem.rpartition("-")[2]
    if path.stem != "tiny":
        assert f"-{size.upper()}-" in config.model.name
        assert config.model.name.startswith(f"Qwen/Q{path.stem[1:7]}-")
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ") and len(commands(header)) >= 2
    assert "Meant for" in header and "Expected: " in header
    assert re.search(r"not run|measured", header)


@pytest.mark.parametrize("path", [ROOT / "README.md", *CONFIGS], ids=lambda path: path.name)
def test_every_command_shown_is_one_that_works(path):
    shown = commands(path.read_text())
    assert shown
    for line in shown:
        words = shlex.split(line)
        program = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        if words[program] == "-m" and words[program + 1].split(".")[0] in ("ubmoe", "benchmarks"):
            name = words[program + 1].replace(".", "/") + ".py"
            arguments = words[program + 2 :]
        else:
            name, arguments = words[program], words[program + 1 :]
        assert (ROOT / name).is_file(), line
        if not name.startswith("benchmarks/"):
            command.parse([word if "=" in word else str(ROOT / word) for word in arguments])


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^ +|`)make (\w+)", readme, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
