"""The memory that `dry_run=true` predicts against the memory that the programs take.

python -m benchmarks.memory configs/tiny.yaml
python -m benchmarks.memory configs/smollm2-135m.yaml model.name=folder

The three scripts and Bitune, a few steps of each. Claim: between 1 / 1.3 and 1.3.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.common import write
from ubmoe.config import load_config

ROOT = Path(__file__).parent.parent
LIMIT = 1.3
SHORT = {
    "calculate_dp.py": ("dependence", ["dependence.max_texts=20"]),
    "train_bi.py": ("sts", ["bi.stages.0.max_steps=3"]),
    "train_ubmoe.py": ("generation", ["ubmoe.max_steps=2", "ubmoe.export=[modes]"]),
    "-m ubmoe.bitune": ("bitune", ["bitune.max_steps=2", "bitune.generation=[]"]),
}
UNSCORED = ["evaluation.sts=[]", "evaluation.generation=[]", "ubmoe.held_out=20"]
UNSCORED += ["bitune.held_out=20", "ubmoe.routes=[learned]", "model.device=cpu"]


def main(*given: str) -> None:
    model = Path(load_config(given[0], list(given[1:])).model.name).name
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for program, (result, short) in tqdm(SHORT.items(), unit="program"):
            keys = [*given, *UNSCORED, *short, f"output_dir={folder}"]
            said = run(program, [*keys, "dry_run=true"])
            estimate = re.search(r"peak memory, estimated +([\d.]+) GB", said)
            assert estimate is not None, said
            run(program, keys)
            record = json.loads((Path(folder) / f"{result}.json").read_text())
            estimated, measured = float(estimate[1]), record["peak_memory_bytes"] / 1e9
            ratio = measured / estimated
            row = {"model": model, "program": program, "estimated_GB": estimated}
            holds = "yes" if 1 / LIMIT <= ratio <= LIMIT else "no"
            rows.append(row | {"measured_GB": measured, "ratio": ratio, "holds": holds})
    write(f"memory-{model}", rows)


def run(program: str, keys: list[str]) -> str:
    command = [sys.executable, *program.split(), *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    return done.stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
