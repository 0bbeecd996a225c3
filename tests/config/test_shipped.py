"""Every shipped YAML and every command that the README or a YAML shows is one that works."""

import re

import pytest
from builders import ROOT, check_commands, commands

from ubmoe.config import load_config
from ubmoe.results.study import steps

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
STUDIES = sorted(ROOT.glob("studies/*/*.yaml"))
NAMES = {"tiny"} | {
    f"{family}-{size}"
    for family, sizes in {
        "qwen2.5": ("0.5b", "1.5b", "3b", "7b", "14b"),
        "qwen2.5-coder": ("0.5b", "1.5b"),
        "qwen1.5": ("0.5b", "1.8b", "4b", "7b"),
        "qwen3": ("0.6b", "1.7b", "4b", "8b"),
        "smollm2": ("135m",),
        "gemma-3": ("270m",),
    }.items()
    for size in sizes
}


def test_all_sizes_of_the_study_are_there():
    assert {path.stem for path in CONFIGS} == NAMES


@pytest.mark.parametrize("path", [*CONFIGS, *PAPER], ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_opens_like_a_lab_record(path):
    config = load_config(path)
    size = path.stem.rpartition("-")[2]
    if path.stem != "tiny":
        family = path.stem.rpartition("-")[0]
        assert f"/{family}-{size}" in config.model.name.lower()
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("# ") and len(commands(header)) >= 2
    assert "Meant for" in header and "Expected: " in header
    assert re.search(r"not run|measured", header)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_study_plans_its_rows(path, tmp_path):
    config = load_config(path, [f"output_dir={tmp_path}/study"])
    actual = steps(config)
    assert len({step.path for step in actual}) == len(actual)  # and all of their keys are known
    assert len({step.row for step in actual}) >= len(config.results.rows) // 2


@pytest.mark.parametrize("path", [*CONFIGS, *PAPER, *STUDIES], ids=lambda path: path.name)
def test_every_command_that_a_config_shows_works(path):
    check_commands(path.read_text())
