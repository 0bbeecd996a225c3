"""Memory of joining a pair of models of Qwen2.5-14B's shapes, block by block.

python -m benchmarks.joining           the pair of 14B, in bfloat16: needs 55 GB of disk
python -m benchmarks.joining 7B        of 7B: 27 GB

The pair is of zeros in sparse files, so that reading it is fast on any disk, and what is written is
written whole. Claims: a process that checks the two and writes the mixture, or the two modes, takes
at most 1.5 GB above the largest tensor, and the pair of 14B joins within 6 GB. Seconds are without
a claim: they are the disk's.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen2Config

from benchmarks.common import write
from ubmoe.config import ModelSection
from ubmoe.models.source import ModelSource
from ubmoe.models.streams import open_weights, shaped
from ubmoe.models.tensors import Stream, write_model
from ubmoe.moe import export, pipeline
from ubmoe.moe.joining import check_alike
from ubmoe.recording import peak_memory_bytes

GB = 1e9
DTYPE = torch.bfloat16
ABOVE, ALL = 1.5, 6.0  # GB
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "14B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
WAYS: dict[str, Callable[..., None]] = {"mixture": export.save_mixture, "modes": export.save_modes}


def write_dense(folder: Path, size: str) -> int:
    """A model of zeros, its files sparse; returns the bytes of its largest tensor."""
    config = Qwen2Config(**SHAPES[size], tie_word_embeddings=False, dtype=DTYPE)
    model: Any = shaped(config)
    tensors = {
        name: Stream(value.shape, DTYPE, lambda: ()) for name, value in model.state_dict().items()
    }
    folder.mkdir()
    config.save_pretrained(folder)
    write_model({"": tensors}, folder)  # the headers alone
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__")
            end = max(entry["data_offsets"][1] for entry in header.values())
            file.truncate(8 + length + end)
    return max(tensor.nbytes for tensor in tensors.values())


def write_form(folder: Path) -> None:
    """Empty stand-ins for the files of an encoder's form."""
    for name in (*export.FORM_FILES, export.FORM):
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            (folder / name).mkdir()


def join(folder: Path, way: str) -> dict[str, float]:
    """As the program does it, with all that it imports: peak memory and seconds."""
    assert pipeline  # imported for what it takes
    tokenizer = ModelSource.of(ModelSection(name="tiny")).tokenizer
    began = time.monotonic()
    uni, bi = (open_weights(ModelSection(name=str(folder / name)), DTYPE) for name in ("uni", "bi"))
    before = peak_memory_bytes()
    check_alike(uni, bi)
    checked = time.monotonic()
    WAYS[way](uni, bi, tokenizer, folder / "bi", folder / way, "")
    seconds = {"checking": checked - began, "writing": time.monotonic() - checked}
    return {"peak": peak_memory_bytes(), "before": before, **seconds}


def row(claim: str, value: float, limit: float | None = None) -> dict[str, object]:
    holds = "no claim" if limit is None else "yes" if value <= limit else "no"
    return {"claim": claim, "value": value, "limit": f"<= {limit:g}" if limit else "none"} | {
        "holds": holds
    }


def rows_of(folder: Path, size: str, way: str, largest: int) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "benchmarks.joining", str(folder), way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in (folder / way).rglob("*.safetensors"))
    shutil.rmtree(folder / way)
    what = f"{size}, {way}"
    return [
        row(f"{what}: peak GB above the largest tensor", (rows["peak"] - largest) / GB, ABOVE),
        row(f"{what}: peak GB", rows["peak"] / GB, ALL if size == "14B" else None),
        row(f"{what}: of it before any number is read", rows["before"] / GB),
        row(f"{what}: GB written", written / GB),
        row(f"{what}: seconds to check", rows["checking"]),
        row(f"{what}: seconds to write", rows["writing"]),
    ]


def main(size: str = "14B") -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        largest = [write_dense(folder / kind, size) for kind in ("uni", "bi")][0]
        write_form(folder / "bi")
        rows = [row(f"{size}: GB of the largest tensor", largest / GB)]
        for way in WAYS:
            rows += rows_of(folder, size, way, largest)
    write("joining", rows, settings=SHAPES[size] | {"dtype": str(DTYPE)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:  # a child
        print(json.dumps(join(Path(sys.argv[1]), sys.argv[2])))
    else:
        main(*sys.argv[1:])
