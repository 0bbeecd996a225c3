"""What tests of several modules are made of: random models, runs of the programs, records."""

import copy
import io
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from studies.compare import noise
from studies.compare.published import published
from ubmoe import cli
from ubmoe.bitune import model as prefill
from ubmoe.bitune.model import attach
from ubmoe.config import BituneSection, ModelSection
from ubmoe.data.prompts import Example
from ubmoe.models.source import ModelSource
from ubmoe.models.streams import of_model
from ubmoe.moe import joining
from ubmoe.moe.routers import router_weights
from ubmoe.recording import recording
from ubmoe.results.__main__ import VERBS

ROOT = Path(__file__).parent.parent
# Of sentences of many lengths, for what several processes train on.
WORDS = [
    "The",
    "cat",
    "saw",
    "a",
    "small",
    "old",
    "horse",
    "near",
    "the",
    "cold",
    "river",
    "in",
    "winter",
    "and",
    "was",
    "glad",
]

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    # a window in every other layer, and two bases of its positions
    "gemma3_text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "sliding_window_pattern": 2,
    },
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """A two-layer random model in eval mode, with weights large enough that attention has
    preferences.
    """
    settings = SIZES | FAMILIES.get(family, {}) | changes
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def metaspace_tokenizer(first=("<s>",), last=(), once=False):
    """A tokenizer as SentencePiece's: a text begins with a word's mark, own tokens around it.

    once: nothing but the beginning of a text gets a mark, not what stands behind a special token.
    """
    letters = [*"▁abcdefgQA:?.\n01234", "<unk>", "<s>", "</s>"]
    inner = Tokenizer(BPE({x: n for n, x in enumerate(letters)}, [], unk_token="<unk>"))
    if once:
        inner.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    inner.add_special_tokens(["<s>", "</s>"])
    ids = [(x, inner.token_to_id(x)) for x in ("<s>", "</s>")]
    form = " ".join([*first, "$A", *last])
    inner.post_processor = TemplateProcessing(single=form, special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


ARCHITECTURES = {"gemma3_text": "gemma3"}  # of GGUF files, where they are called otherwise


def write_gguf(directory, path, keys=(), pre="qwen2"):
    """The embedded model as a GGUF file of float32 tensors, its tokenizer in it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    own = AutoTokenizer.from_pretrained(directory)
    tokens = own.convert_ids_to_tokens(range(model.config.vocab_size))
    special = set(own.all_special_tokens)
    said = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": own.eos_token_id,
        "tokenizer.chat_template": own.chat_template,
    }
    write_gguf_model(model, path, said | dict(keys))


def write_gguf_model(model, path, keys=(), tensors=(), packed=None):
    """Any model of float32 tensors as llama.cpp's converter lays it out.

    keys, tensors: further ones; a key of None is left out. packed: kinds of quantised tensors, by
    the end of their names.
    """
    config = model.config
    family = ARCHITECTURES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.sliding_window": config.sliding_window if "gemma" in family else None,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    writer = gguf.GGUFWriter(path, family)
    for key, value in (
        {f"{family}.{key}": size for key, size in sizes.items()} | dict(keys)
    ).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    kinds = {name: item for item, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family], config.num_hidden_layers)
    held = dict(model.state_dict())
    if config.tie_word_embeddings:
        del held["lm_head.weight"]
    for name, value in held.items():
        base, _, kind = name.rpartition(".")
        if family.startswith("gemma") and "norm" in name:
            value = value + 1
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if family == "llama" and part in name:  # pairs of a head lie side by side
                shape = (getattr(config, heads), 2, -1, *value.shape[1:])
                value = value.reshape(shape).swapaxes(1, 2).reshape(value.shape)
        place, values = f"{names.get_name(base)}.{kind}", value.contiguous().numpy()
        sort = next((item for end, item in (packed or {}).items() if place.endswith(end)), None)
        if sort is not None:
            values = gguf.quantize(values, sort)
        writer.add_tensor(place, values, raw_dtype=sort)
    for name, value in dict(tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class KilledError(Exception):
    """What a trainer dies of in `dying`."""


# --- programs -------------------------------------------------------------------------------------


def start(*arguments, script="calculate_dp.py", folder=ROOT, environment=None, **keys):
    """A program in a process of its own."""
    command = [sys.executable, *script.split(), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = environment or os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, **keys)


def run(*arguments, script="calculate_dp.py", folder=ROOT):
    """(exit status, stdout, stderr) of a program, run in this process, in a folder.

    In a process of its own (`run_apart`) the imports alone would take seconds, each time.
    """
    out, err, log = io.StringIO(), io.StringIO(), logging.getLogger()
    before = sys.argv, os.getcwd(), log.handlers
    name = script.removeprefix("-m ")
    sys.argv, log.handlers = [name, *map(str, arguments)], []
    os.chdir(folder)
    status = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            if name == script:
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv, log.handlers = before[0], before[2]
        os.chdir(before[1])
    return status, out.getvalue(), err.getvalue()


def run_apart(*arguments, script="calculate_dp.py"):
    """As `run`, in a process of its own."""
    process = start(*arguments, script=script)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


# --- pages ----------------------------------------------------------------------------------------


def commands(text):
    """Lines that start a program of ours, continued lines joined."""
    joined = text.replace("\\\n", " ")
    actual = re.findall(r"^[#$ ]*((?:python|torchrun) .*)$", joined, flags=re.MULTILINE)
    actual += re.findall(r"^\| `((?:python|torchrun) [^`]*)`", joined, flags=re.MULTILINE)
    return [line.split("  #")[0].strip() for line in actual]


def check_commands(text):
    """Every command of a page or a config names a program, files that are there, and real keys."""
    for line in commands(text):
        words = shlex.split(line)
        program = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        arguments = words[program + 1 :]
        name = words[program]
        if name == "-m":
            module, *arguments = arguments
            name = module.replace(".", "/")
            name += ".py" if (ROOT / f"{name}.py").is_file() else "/__main__.py"
            if module == "ubmoe.results":
                assert arguments[0] in VERBS, line
                arguments = arguments[1:]
        assert (ROOT / name).is_file(), line
        if name == "studies/compare/noise.py":
            noise.parts(arguments.pop(1))
        if not name.startswith("benchmarks/"):
            given = [word for word in arguments if word != "CONFIG"]
            cli.parse([word if "=" in word else str(ROOT / word) for word in given])


# --- mixtures -------------------------------------------------------------------------------------

IDS = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(1))


WINDOW = {"use_sliding_window": True, "sliding_window": 4}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# Families that are joined, and what of them a mixture's class might lose.
JOINED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2, a window in one layer": (
        "qwen2",
        WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen2, scaled rope": ("qwen2", {"rope_parameters": ROPE}),
    "llama": ("llama", {}),
    "llama, scaled rope": ("llama", {"rope_parameters": ROPE}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "mistral, a window": ("mistral", {"sliding_window": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 16}),
    "qwen3, a window": ("qwen3", WINDOW | {"layer_types": ["sliding_attention"] * 2}),
}


def pair(tied=True, family="qwen2", **keys):
    """(uni, bi): two dense models that differ in every FFN."""
    uni = random_model(family, tie_word_embeddings=tied, **keys)
    bi = copy.deepcopy(uni)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in bi.named_parameters():
            if ".mlp." in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return uni, bi


def tokenizer_of(section):
    """The tokenizer of a section `model`, as programs get it."""
    return ModelSource.of(section).tokenizer


def weights(*models):
    """Models in memory as tensors, named as the two that are joined."""
    return [of_model(model, name) for name, model in zip(("uni", "bi"), models, strict=True)]


def join(uni, bi, top_k=2):
    """The mixture of two models in memory: checked, written and loaded as train_ubmoe.py does."""
    dtype = str(uni.dtype).removeprefix("torch.")
    uni, bi = weights(uni, bi)
    joining.check_alike(uni, bi)
    with TemporaryDirectory() as folder:
        joining.write_mixture(uni, bi, Path(folder), top_k)
        section = ModelSection(name=folder, dtype=dtype, device="cpu")
        return joining.load_mixture(section, "bidirectional")


def drawn(model, seed=0, scale=1.0):
    """The model with routers that prefer now this expert and now that."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in router_weights(model).values():
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


# --- Bitune ---------------------------------------------------------------------------------------

EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10, 11], [12, 13, 14]),
    Example([15, 16], [17]),
    Example([18], [19, 20, 21, 22]),  # a prompt of one token: nothing to prefill
    Example([23, 24, 25, 26], [27, 28]),
]
RANK, ALPHA = 2, 3.0


def tuned(variant="full", family="qwen2", theta_init=0.01, **keys):
    """A model in the middle of its training: nothing of it is at its start."""
    model = random_model(family, **keys)
    settings = BituneSection(variant=variant, rank=RANK, alpha=ALPHA, theta_init=theta_init)
    bitune = attach(model, settings, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in bitune.named_parameters():
            if prefill.OF_ADAPTER.search(name):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            elif name.startswith("theta_"):
                value.copy_(torch.randn(value.shape, generator=generator) * 2 * theta_init)
    return bitune.eval()


# --- records --------------------------------------------------------------------------------------

MODEL = "Qwen1.5-0.5B-Chat"
TEN = published("ubmoe")["sts"]["columns"][:10]


def encoder(name, seed, average, train, attention="bidirectional"):
    stages = [{"objective": "simcse", "train": train, "learning_rate": 1.0}] if train else []
    config = {"model": {"name": f"Qwen/{MODEL}"}, "seed": seed}
    config["bi"] = {"stages": stages, "attention": attention, "prompt": "p"}
    section = {"tasks": dict.fromkeys(TEN, average + 1), "average": average}
    return {f"{name}.sts.seed{seed}": {"config": config, "sts": section}}


def dependence(name, seed, model, after):
    buckets = [
        {"range": [0, 256], "main": 2.0, "before": 98 - after, "after": after},
        {"range": [256, 512], "main": None, "before": None, "after": None},
    ]
    config = {"model": {"name": model}, "seed": seed, "dependence": {"max_tokens": 32}}
    section = {"buckets": buckets, "overall": {"after": after}}
    return {f"{name}.dependence.seed{seed}": {"config": config, "dependence": section}}


def scores(value, perplexity):
    tasks = {"mmlu": {"acc": value, "acc_norm": 0.0}}
    return {"tasks": tasks, "average": value, "perplexity": perplexity}


RECORDS = {
    **encoder("a", 0, 60.0, ["ffn"]),
    **encoder("a", 1, 62.0, ["ffn"]),
    **encoder("b", 0, 40.0, ["ffn"], "causal"),
    **encoder("c", 0, 34.0, []),
    **dependence("a", 0, "bi", 40.0),
    **dependence("a", 1, "bi", 42.0),
    **dependence("c", 0, f"Qwen/{MODEL}", 30.0),
    **dependence("m", 0, "ubmoe", 33.0),
    "a.evaluation.seed0": {
        "config": {"model": {"name": "bi"}, "seed": 0},
        "generation": {**scores(20.0, 9.0), "metrics": {"mmlu": "acc"}},
    },
    "m.generation.seed0": {
        "config": {
            "model": {"name": MODEL},
            "seed": 0,
            "ubmoe": {"top_k": 2, "objective": "chat"},
        },
        "generation": {
            "routes": {"learned": scores(30.0, 5.0), "uni": scores(32.5, 4.0)},
            "metrics": {"mmlu": "acc"},
            "bi_attention": "bidirectional",
        },
        "sts": [],
    },
    "t.bitune.seed0": {
        "config": {"model": {"name": MODEL}, "seed": 0, "bitune": {"max_steps": 9, "rank": 8}},
        "bitune": {**scores(31.0, 1.0), "variant": "full", "metrics": {"mmlu": "acc"}},
    },
}


def study(rows):
    """Records of encoders {row: (DP-after, perplexity)}, the base at 30 and 4."""
    actual = {}
    for number, (row, (after, perplexity)) in enumerate({"base": (30.0, 4.0), **rows}.items()):
        name, train = f"r{number}", [] if row == "base" else row.split("+")
        model = f"Qwen/{MODEL}" if row == "base" else "bi"
        actual |= encoder(name, 0, 50.0 + number, train) | dependence(name, 0, model, after)
        generation = {**scores(40.0 - number, perplexity), "metrics": {"mmlu": "acc"}}
        config = {"model": {"name": model}, "seed": 0}
        actual[f"{name}.evaluation.seed0"] = {"config": config, "generation": generation}
    return actual


ROWS = {"ffn": (31.0, 5.0), "attention": (33.0, 8.0), "all": (36.0, 7.0)}
SEEDS = [0, 1, 2]


TOKENS = [5, 9, 12, 30]


def shares(shift=0.0):
    """A difference of `shift` in each text, whose own values are far apart."""
    texts = {"tokens": TOKENS}
    for name in ("after", "first", "without_first.after"):
        texts[name] = [10 + shift, 90 + shift, 30 + shift, 50 + shift]
    return texts


def answers(losses):
    return {"losses": losses, "tokens": [2, 3, 4, 1]}


def measured(name, seed, train, by_text, losses):
    """Records of an encoder, or of the base."""
    model = "bi" if train else f"Qwen/{MODEL}"
    actual = encoder(name, seed, 50.0, train) | dependence(name, seed, model, 40.0)
    actual[f"{name}.dependence.seed{seed}"]["dependence"]["by_text"] = by_text
    generation = scores(40.0, 2.0) | {"metrics": {"mmlu": "acc"}, "answers": answers(losses)}
    config = {"model": {"name": model}, "seed": seed}
    return actual | {f"{name}.evaluation.seed{seed}": {"config": config, "generation": generation}}


def causal(records, sts):
    """The same, tuned under the causal mask, and with another STS."""
    for record in records.values():
        if "sts" in record:
            record["config"]["bi"]["attention"] = "causal"
            record["sts"] |= {"tasks": dict.fromkeys(record["sts"]["tasks"], sts)}
    return records


SECTION = {
    "overall": {"main": 10.0, "before": 60.0, "after": 30.0},
    "stderr": {"main": 1.0, "before": 2.0, "after": 3.0},
    "uniform": {"main": 20.0, "before": 40.0, "after": 40.0},
    "buckets": [
        {
            "range": [0, 256],
            "texts": 7,
            "main": 10.0,
            "before": 60.0,
            "after": 30.0,
            "stderr": {"main": 1.0, "before": 2.0, "after": 3.0},
            "uniform": {"main": 20.0, "before": 40.0, "after": 40.0},
        },
        {
            "range": [256, 512],
            "texts": 0,
            "main": None,
            "before": None,
            "after": None,
            "stderr": {"main": None, "before": None, "after": None},
            "uniform": {"main": None, "before": None, "after": None},
        },
    ],
    "layers": [],
    "texts": 7,
    "outside_buckets": 0,
    "truncated": 2,
    "tokens": 70,
}


def recorded(config, section=SECTION):
    with recording("calculate_dp", "dependence", config) as run:
        run.model = random_model("qwen2")
        run.section = section
    return run.path
