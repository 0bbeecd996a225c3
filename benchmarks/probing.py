"""Cost of extracting word vectors, against a plain forward of the same sentences.

python -m benchmarks.probing

Qwen2.5-0.5B's layer shape with random weights, sentences of 3 to 40 words, length-sorted batches;
every word of every sentence is taken at both positions and written to disk. Claim: extraction does
>= 0.8 of the plain forward's tokens per second, with the last layer and with all layers.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from benchmarks.common import medians, qwen_layers, write
from ubmoe.data.padding import batches_by_length, padded_with_mask
from ubmoe.probing.word_vectors import Place, Sentences, word_vectors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 24 if DEVICE.type == "cuda" else 4
SENTENCES, LONGEST, BATCH_TOKENS = 300, 40, 4096
REPEATS = 5


def model() -> Any:
    torch.manual_seed(0)
    built: Any = Qwen2ForCausalLM(qwen_layers(LAYERS))
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return built.to(DEVICE, dtype).eval()


def sentences() -> Sentences:
    """Random tokens, every second word of two tokens; no tokenizer takes part."""
    generator = torch.Generator().manual_seed(1)
    made = object.__new__(Sentences)
    made.ids, made.places = [], []
    for row, words in enumerate(torch.randint(3, LONGEST, (SENTENCES,), generator=generator)):
        place = 0
        for word in range(int(words)):
            tokens = list(range(place, place + 1 + word % 2))
            place = tokens[-1] + 1
            made.places.append(Place(row, tokens, [max(0, token - 1) for token in tokens]))
        made.ids.append(torch.randint(1024, (place,), generator=generator).tolist())
    return made


@torch.no_grad()
def plain(decoder: Any, rows: list[list[int]]) -> None:
    for batch in batches_by_length(rows, BATCH_TOKENS):
        inputs = padded_with_mask([rows[index] for index in batch])
        decoder.model(**{key: value.to(DEVICE) for key, value in inputs.items()}, use_cache=False)


def extract(decoder: Any, read: Sentences, layers: list[int], folder: Path) -> None:
    path = folder / "vectors.npy"
    path.with_suffix(".json").unlink(missing_ok=True)  # or it would be reused
    word_vectors(decoder, read, path, layers, BATCH_TOKENS, "benchmark")


def main() -> None:
    torch.set_num_threads(1)
    decoder, read = model(), sentences()
    with tempfile.TemporaryDirectory() as name:
        run = partial(extract, decoder, read, folder=Path(name))
        runs: dict[str, Callable[[], object]] = {
            "plain": partial(plain, decoder, read.ids),
            "last layer": partial(run, [LAYERS]),
            "all layers": partial(run, list(range(LAYERS + 1))),
        }
        seconds = medians(runs, REPEATS)
    rows = []
    for what in ("last layer", "all layers"):
        ratio = seconds["plain"] / seconds[what]
        claim = {"claim": f"tokens/s, {what}", "over": "plain forward", "ratio": ratio}
        rows.append(claim | {"limit": ">= 0.8", "holds": "yes" if ratio >= 0.8 else "no"})
    tokens = sum(map(len, read.ids))
    settings = {"layers": LAYERS, "sentences": SENTENCES, "tokens": tokens, "repeats": REPEATS}
    write("probing", rows, settings=settings)


if __name__ == "__main__":
    main()
