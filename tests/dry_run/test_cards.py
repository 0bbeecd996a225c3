"""Every command of a shipped YAML fits the card that its header names, by the dry run's estimate.

Shapes are the published ones of each model's config.json; nothing of the models is needed.
"""

import json
import re
import shlex

import pytest
from builders import ROOT, commands
from transformers import AutoConfig, AutoTokenizer

from ubmoe import cli
from ubmoe.config import with_keys
from ubmoe.dry_run import programs
from ubmoe.models import precision

# hidden size, FFN size, layers, heads, key-value heads, tokens, whether the head is tied
SHAPES = {
    "qwen1.5-0.5b": (1024, 2816, 24, 16, 16, 151936, True),
    "qwen1.5-1.8b": (2048, 5504, 24, 16, 16, 151936, False),
    "qwen1.5-4b": (2560, 6912, 40, 20, 20, 151936, False),
    "qwen1.5-7b": (4096, 11008, 32, 32, 32, 151936, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-coder-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-coder-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, False),
    "gemma-3-270m": (640, 2048, 18, 4, 1, 262144, True),
}
PROGRAMS = {
    "calculate_dp.py": programs.calculate_dp,
    "train_bi.py": programs.train_bi,
    "train_ubmoe.py": programs.train_ubmoe,
    "ubmoe.bitune": programs.bitune,
}


def test_every_shipped_model_is_here():
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert shipped == set(SHAPES) | {"tiny", "smollm2-135m"}


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
    hidden, ffn, layers, heads, key_value, tokens, tied = SHAPES[name]
    family = {"qwen3": "qwen3", "gemma": "gemma3_text"}.get(name.split("-")[0], "qwen2")
    AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        head_dim={"qwen3": 128, "gemma3_text": 256}.get(family, hidden // heads),
        vocab_size=tokens,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    ).save_pretrained(folder)
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
