"""Every command of a shipped YAML fits the card that its header names, by the dry run's estimate.

Shapes are the shipped ones; nothing of the models is needed.
"""

import json
import re
import shlex

import pytest
from builders import ROOT, commands
from transformers import AutoTokenizer

from ubmoe import cli
from ubmoe.config import load_config, with_keys
from ubmoe.dry_run import programs
from ubmoe.dry_run.shipped import SHIPPED
from ubmoe.models import precision

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SHAPES = [name for name in NAMES if name not in ("tiny", "smollm2-135m")]  # a laptop's
PROGRAMS = {
    "calculate_dp.py": programs.calculate_dp,
    "train_bi.py": programs.train_bi,
    "train_ubmoe.py": programs.train_ubmoe,
    "ubmoe.bitune": programs.bitune,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences of about 40 tokens, as the prompt and a line of Wikipedia have, and long chats."""
    folder = tmp_path_factory.mktemp("data")
    sentences = ("the " * (20 + number % 30) + str(number) for number in range(1000))
    (folder / "sentences.txt").write_text("\n".join(sentences))
    turns = [("the " * (100 + n % 900), "the " * (100 + n % 400)) for n in range(0, 3000, 50)]
    with (folder / "chats.jsonl").open("w") as file:
        for asked, answered in turns:
            messages = [{"role": "user", "content": asked}]
            messages.append({"role": "assistant", "content": answered})
            print(json.dumps({"messages": messages}), file=file)
    return folder


def shaped(name, tiny_path, folder):
    model = load_config(ROOT / "configs" / f"{name}.yaml").model.name
    (folder / "config.json").write_text(json.dumps(SHIPPED["models"][model]["config"]))
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_every_command_of_the_header_fits_its_card(name, tiny_path, tmp_path, data, monkeypatch):
    monkeypatch.setattr(programs, "_smaller", lambda *_: [])
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)  # the card's
    header = (ROOT / "configs" / f"{name}.yaml").read_text().split("\n\n")[0]
    default = int(re.search(r"Meant for one (\d+) GB GPU", header)[1])
    keys = [
        *(f"model.name={shaped(name, tiny_path, tmp_path)}", "model.device=cuda"),
        *(f"{section}.dataset={data / 'chats.jsonl'}" for section in ("dependence", "ubmoe")),
        *(f"bitune.dataset={data / 'chats.jsonl'}", "bitune.held_out=2", "ubmoe.held_out=20"),
        f"bi.stages.0.dataset={data / 'sentences.txt'}",
    ]
    seen = set()
    for line in commands(header):
        words = shlex.split(line)
        program = next(word for word in words if word in PROGRAMS)
        devices = words[words.index("--nproc-per-node") + 1] if words[0] == "torchrun" else "true"
        given = [word for word in words[words.index(program) + 1 :]]
        config = cli.parse([str(ROOT / given[0]), *given[1:]])
        said = PROGRAMS[program](with_keys(config, [*keys, f"dry_run={devices}"]))
        peak = float(re.search(r"peak memory, estimated +([\d.]+) GB", said)[1])
        smaller = re.search(re.escape(line) + r" +# (\d+) GB", header)
        card = int(smaller[1]) if smaller else default
        assert peak <= card, f"{line}\n{said}"
        seen.add(program)
    assert seen == set(PROGRAMS) - ({"ubmoe.bitune"} if name.startswith("gemma") else set())
