"""Damaged checkpoints, and output directories that are somebody's folder, over the programs.

python -m benchmarks.damage
python -m benchmarks.damage 60

Each program runs once undisturbed. Then one file of its newest checkpoint is damaged, drawn with
the kind of damage, and the run goes on. Claims: every number and every saved weight is the
undisturbed run's, or one line says what is wrong, with exit status 2. Into folders with something
of a user's, under a name that the program needs or one like its own, the program is run as well.
Claim: the user's file is there and as it was.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks import kills
from benchmarks.common import write

DAMAGED, SEED = 30, 0
UNSCORED = ("evaluation.sts=[]", "evaluation.generation=[]", "bitune.generation=[]")
SECTIONS = {"train_bi.py": "bi.stages.0", "train_ubmoe.py": "ubmoe", "-m ubmoe.bitune": "bitune"}
# What each program needs to write; and what none of them does, all in one folder.
NEEDED = {
    "train_bi.py": (
        *("bi/a", "sts.json", "training.png", "train_bi.config.yaml", ".unfinished-train_bi/a"),
        *("stages/0/checkpoint-4/a", ".train_bi.lock"),
    ),
    "train_ubmoe.py": (
        *("ubmoe/a", "modes/a", "adapter/a", "generation.json", "routing.png", "routers"),
        ".finished-train_ubmoe/a",
    ),
    "-m ubmoe.bitune": ("bitune/a", "bitune.json", "bitune.png", "adapters/stage.json"),
}
FREE = (
    *(".venv.new/a", ".photos.old/a", ".finished-books/a", ".unfinished-novel/a", ".bi.old/a"),
    *("stages/0/checkpoint-mine/a", "checkpoint-4/a", "routers/a", "adapters/checkpoint-abc/a"),
    *("dependence.partial-notes.txt", ".sts.json.1234", "notes.png"),
)


def _removed(path: Path, _: random.Random) -> None:
    path.unlink()


def _cut(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data))])


def _flipped(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def _of_another_step(path: Path, _: random.Random) -> None:
    shutil.copy(path.parent.parent / "checkpoint-2" / path.name, path)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(_removed, _cut, _flipped, _of_another_step),
)


def main(count: int = DAMAGED) -> None:
    generator = random.Random(SEED)
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as name, tqdm(total=count, unit="run") as bar:
        folder = Path(name)
        for number, program in enumerate(SECTIONS):
            whole = folder / str(number)
            code, said = _run(program, folder, whole)
            if code:
                sys.exit(f"{program}: exit {code}: {said}")
            for _ in range(number, count, len(SECTIONS)):
                results.append({"program": program, **_damaged(program, folder, whole, generator)})
                tqdm.write(str(results[-1]), sys.stderr)
                bar.update()
            for theirs in (*((needed,) for needed in NEEDED[program]), FREE):
                results.append({"program": program, **_in_somebodys(program, folder, *theirs)})
                tqdm.write(str(results[-1]), sys.stderr)
    rows = [_summed(program, results) for program in SECTIONS]
    write("damage", rows, seed=SEED, failed=[result for result in results if not result["right"]])
    sys.exit(not all(result["right"] for result in results))


def _summed(program: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    of_program = [result for result in results if result["program"] == program]
    damaged, folders = (
        [result for result in of_program if name in result] for name in ("file", "theirs")
    )
    return {
        "program": program,
        "damaged checkpoints": len(damaged),
        "equal after going on, or refused": sum(result["right"] for result in damaged),
        "folders of a user's": len(folders),
        "as they were": sum(folder["right"] for folder in folders),
    }


def _run(program: str, folder: Path, out: Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    steps = ("max_steps=6", "save_steps=2", "save_total_limit=3", "logging_steps=1")
    keys = [*kills.COMMON, *UNSCORED, *kills.PROGRAMS[program], f"output_dir={out}", "resume=auto"]
    keys += [f"{SECTIONS[program]}.{count}" for count in steps]
    keys += [f"ubmoe.bi={folder / '0' / 'bi'}"] if program == "train_ubmoe.py" else []
    command = [sys.executable, *program.split(), *keys]
    done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def _damaged(program: str, folder: Path, whole: Path, generator: random.Random) -> dict[str, Any]:
    out = folder / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    [newest] = out.rglob("checkpoint-6")
    shutil.rmtree(newest)
    path = generator.choice(sorted(newest.with_name("checkpoint-4").glob("[!.]*")))
    damage = generator.choice(DAMAGES)
    damage(path, generator)
    code, said = _run(program, folder, out)
    last = said.strip().splitlines()[-1]
    refused = code == 2 and last.startswith("error: ") and "Traceback" not in said
    equal = code == 0 and kills.contents(out) == kills.contents(whole)
    right = {"right": equal or refused, "equal": equal}
    return {"file": path.name, "damage": damage.__name__.replace("_", " ").strip(), **right}


def _in_somebodys(program: str, folder: Path, *theirs: str) -> dict[str, Any]:
    out = folder / "somebodys"
    shutil.rmtree(out, ignore_errors=True)
    for name in theirs:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    code, said = _run(program, folder, out)
    kept = all((out / name).is_file() and (out / name).read_text() == "mine" for name in theirs)
    right = kept and code == (0 if theirs == FREE else 2) and "Traceback" not in said
    return {"theirs": ", ".join(theirs), "right": right, "exit": code}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
