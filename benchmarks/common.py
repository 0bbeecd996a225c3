"""Shared by every benchmark: interleaved medians, peak memory in a fresh process, one JSON in
results/.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from ubmoe.files import write_json
from ubmoe.recording import git_commit
from ubmoe.report.tables import aligned

RESULTS = Path(__file__).parent.parent / "results"


def device_name() -> str:
    """The accelerator's name, or the processor's kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def qwen_layers(layers: int) -> Qwen2Config:
    """Qwen2.5-0.5B's layer shape; the vocabulary is small, since the embedding is in no claim."""
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=1024,
        max_position_embeddings=32768,
    )


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a noisy machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_of_child(module: str, *arguments: object) -> int:
    """Peak memory in bytes that `python -m module arguments...` prints as its last line."""
    return int(last_line_of_child(module, *arguments))


def last_line_of_child(module: str, *arguments: object) -> str:
    """The last line of `python -m module arguments...`, in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout.splitlines()[-1]


def write(name: str, rows: list[dict[str, Any]], **details: Any) -> None:
    """results/benchmark.<name>.<device>.json with `details`, and the rows as a table on stdout."""
    print(aligned([list(rows[0]), *([_shown(cell) for cell in row.values()] for row in rows)]))
    device = device_name()
    record = {
        "device": device,
        "torch": torch.__version__,
        "git_commit": git_commit(),
        **details,
        "rows": rows,
    }
    path = RESULTS / f"benchmark.{name}.{device.lower().replace(' ', '-')}.json"
    write_json(path, record)
    print(path.name)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
