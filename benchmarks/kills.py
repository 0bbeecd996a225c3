"""kill -9 at random moments over all programs, and what is there after it and after going on.

python -m benchmarks.kills
python -m benchmarks.kills 60

Each program runs once undisturbed. Then it is killed in a folder that holds a finished result of
another seed: half of the times at a moment drawn evenly over its run, half of the times when a
drawn number of new files has appeared in the folder, which finds the saving. Claims: after a kill,
and the moves that the next start makes up for, the earlier result is whole, or else the new one is;
after `resume=auto` every number equals the undisturbed run's, and every saved weight is bit-equal.
"""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.common import write
from ubmoe.staging import complete_moves

ROOT = Path(__file__).parent.parent
KILLS, SEED = 30, 0
SHORT = ["max_steps=6", "save_steps=2", "logging_steps=1"]
PROGRAMS = {
    "calculate_dp.py": ["dependence.max_texts=120", "dependence.batch_tokens=512"],
    "train_bi.py": [f"bi.stages.0.{key}" for key in SHORT],
    "train_ubmoe.py": [
        *(f"ubmoe.{key}" for key in SHORT),
        "ubmoe.export=[mixture, modes, adapter]",
    ],
    "-m ubmoe.bitune": [f"bitune.{key}" for key in SHORT],
    "-m ubmoe.probing": [
        *("probing.tasks=[wic]", "probing.seeds=[0]", "probing.jobs=1"),
        *("probing.probes=[linear]", "probing.controls=false"),
    ],
    "-m ubmoe.evaluate": ["evaluation.language_model=true"],
}
COMMON = ["model.device=cpu", "evaluation.limit=10", "ubmoe.held_out=20", "bitune.held_out=20"]
VOLATILE = re.compile(
    "seconds|peak_memory_bytes|environment|output_dir|.*(_runtime|_per_second|_per_step)"
)
Watch = Callable[[float, set[Path]], bool]


def main(kills: int = KILLS) -> None:
    generator = random.Random(SEED)
    with TemporaryDirectory() as name:
        folder = Path(name)
        references = {program: _undisturbed(program, folder) for program in PROGRAMS}
        results: list[dict[str, Any]] = []
        for number in tqdm(range(kills), unit="kill"):
            program = list(PROGRAMS)[number % len(PROGRAMS)]
            reference = references[program]
            watch, moment = _moment(generator, number // len(PROGRAMS) % 2, reference)
            result = {"program": program, **_killed(program, folder, reference, watch, moment)}
            results.append(result)
            tqdm.write(str(result), sys.stderr)
    rows = [_summed(program, results) for program in PROGRAMS]
    failed = [result for result in results if not result["kept"] or not result["equal"]]
    write("kills", rows, seed=SEED, failed=failed)
    sys.exit(bool(failed))


def _summed(program: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    of_program = [result for result in results if result["program"] == program]
    return {
        "program": program,
        "kills": len(of_program),
        "earlier or new result whole": sum(result["kept"] for result in of_program),
        "equal after going on": sum(result["equal"] for result in of_program),
    }


def _moment(
    generator: random.Random, on_files: int, reference: dict[str, Any]
) -> tuple[Watch, str]:
    """When to kill: whether the time has come, or enough new files have."""
    if on_files:
        count = generator.randint(1, max(1, reference["new_paths"]))
        return (lambda seconds, new: len(new) >= count), f"{count} new paths"
    limit = generator.uniform(0, reference["seconds"])
    return (lambda seconds, new: seconds >= limit), f"{limit:.2f} s"


def _undisturbed(program: str, folder: Path) -> dict[str, Any]:
    """A run of the seed, its numbers; and a finished one of another seed, kept beside."""
    name = program.split(".")[-2 if program.endswith(".py") else -1].replace("-m ", "")
    output, earlier = folder / name, folder / f"{name}-earlier"
    _run(program, folder, earlier, 1)
    start = time.monotonic()
    new_paths = _run(program, folder, output, 0)
    measured = {"seconds": time.monotonic() - start, "new_paths": len(new_paths)}
    return measured | {"earlier": earlier, "own": contents(output), "before": contents(earlier)}


def _killed(
    program: str, folder: Path, reference: dict[str, Any], watch: Watch, moment: str
) -> dict[str, Any]:
    out = folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(reference["earlier"], out)
    _run(program, folder, out, 0, watch)
    complete_moves(out)
    left = contents(out)
    kept = all(left.get(name) == value for name, value in reference["before"].items())
    new = all(left.get(name) == value for name, value in reference["own"].items())
    _run(program, folder, out, 0)
    again = contents(out)
    return {
        "moment": moment,
        "kept": kept or new,
        "equal": again == reference["own"],
        "differ": sorted(
            name for name, value in reference["own"].items() if again.get(name) != value
        ),
    }


def _run(program: str, folder: Path, out: Path, seed: int, watch: Watch | None = None) -> set[Path]:
    """Run to the end, or until `watch` says so; returns the new paths that were seen in `out`."""
    keys = [*COMMON, *PROGRAMS[program], f"seed={seed}", "resume=auto", f"output_dir={out}"]
    if program == "train_ubmoe.py":
        keys.append(f"ubmoe.bi={folder / 'train_bi' / 'bi'}")
    before = set(out.rglob("*")) if out.exists() else set()
    seen: set[Path] = set()
    start = time.monotonic()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *program.split(), *keys], cwd=ROOT, stdout=log, stderr=log
        )
        while process.poll() is None:
            seen |= _paths(out) - before
            if watch is not None and watch(time.monotonic() - start, seen):
                process.kill()
            time.sleep(0.002)
        if watch is None and process.returncode:
            sys.exit(
                f"{program}: exit {process.returncode}\n{(folder / 'log').read_text()[-3000:]}"
            )
    return seen


def _paths(out: Path) -> set[Path]:
    try:
        return set(out.rglob("*"))
    except OSError:  # of what is moved while it is listed
        return set()


def contents(out: Path) -> dict[str, str]:
    """Digest of each result's numbers, and of each saved model's weights."""
    digests = {}
    for path in out.glob("*.json"):
        text = json.dumps(_lasting(json.loads(path.read_text())), sort_keys=True)
        text = text.replace(str(out), "")
        digests[path.name] = hashlib.sha256(text.encode()).hexdigest()
    for model in ("bi", "ubmoe", "modes", "adapter", "bitune"):
        for path in (out / model).rglob("*.safetensors"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            digests[str(path.relative_to(out))] = digest
    return digests


def _lasting(value: Any) -> Any:
    """Without what differs between two undisturbed runs: times, memory and places."""
    if isinstance(value, dict):
        items = value.items()
        return {name: _lasting(item) for name, item in items if not VOLATILE.fullmatch(name)}
    if isinstance(value, list):  # the row of times is of a process that trained to the end
        return [
            _lasting(item)
            for item in value
            if not (isinstance(item, dict) and "train_runtime" in item)
        ]
    return value


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
