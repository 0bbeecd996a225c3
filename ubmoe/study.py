"""The paper's tables as runs: which programs with which keys, what is there yet, and what is not.

Every run is a command line of a program, so a cluster's array job can take the printed lines
instead. Nothing here imports torch.
"""

import dataclasses
import hashlib
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ubmoe.config import (
    READS,
    Config,
    ResultsSection,
    TrainingSection,
    UserError,
    dump_config,
    load_config,
)
from ubmoe.results import read_result, record, replace

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent  # where the three scripts are
CAUSAL = " causal"  # after a row's modules: tuned under the causal mask, a control
# The mixtures of Table 4 and the controls that it lacks: their encoder's row, and their own keys.
MIXTURES = {
    "ubmoe": ("ffn", ["ubmoe.routes=[learned, half, average, uni, bi, mode]"]),
    "ubmoe-top-1": ("ffn", ["ubmoe.top_k=1", "ubmoe.router_init=uni", "ubmoe.routes=[learned]"]),
    "ubmoe-causal": ("ffn causal", ["ubmoe.routes=[learned, bi]"]),
}
BITUNE = ("lora", "full")


@dataclass(frozen=True)
class Step:
    """One run of one program; `row` names its line in the tables, over the seeds.

    made_by: the sections of the configuration that an earlier run made its model by.
    """

    program: tuple[str, ...]
    row: str
    result: str
    config_file: str
    keys: tuple[str, ...]
    made_by: tuple[str, ...] = ()

    @cached_property
    def config(self) -> Config:
        return load_config(self.config_file, list(self.keys))

    @property
    def path(self) -> Path:
        return Path(self.config.output_dir) / f"{self.result}.json"

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.program, self.config_file, *self.keys])

    def state(self) -> str:
        """`there`, with this very configuration; `other`, with another; or `missing`."""
        if not self.path.exists():
            return "missing"
        kept = read_result(self.path)["config"]
        own = self.config.model_dump()
        read = ("seed", *READS[self.result], *self.made_by)
        same = all(kept.get(key) == own[key] for key in read)
        return "there" if same else "other"


def steps(config: Config) -> list[Step]:
    """The runs of `results.table`, in an order in which each finds what it needs.

    They read a file of the study's own, what this program was given; its name holds a digest, so
    that another plan does not change what waiting runs will read.
    """
    text = dump_config(config.model_copy(update={"results": ResultsSection()}))
    name = f"study-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    file = Path(config.output_dir) / "study" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, lambda path: path.write_text(text, encoding="utf-8"))
    first, *others = config.results.seeds
    rows = config.results.rows
    without_base = [row for row in rows if row != "base"]  # it has no seeds
    made = [*_of_seed(config, str(file), first, rows)]
    return made + [
        each for seed in others for each in _of_seed(config, str(file), seed, without_base)
    ]


def _of_seed(config: Config, config_file: str, seed: int, rows: Sequence[str]) -> Iterator[Step]:
    table = config.results.table

    def step(
        program: str, name: str, result: str, *keys: str, made_by: tuple[str, ...] = ()
    ) -> Step:
        given = (f"seed={seed}", f"output_dir={folder(name)}", *keys)
        return Step(tuple(program.split()), name, result, config_file, given, made_by)

    def folder(name: str) -> Path:
        slug = name.replace("+", "-").replace(" ", "-")
        return Path(config.output_dir) / "study" / f"seed{seed}" / f"{label(config)}-{slug}"

    needed = {encoder for encoder, _ in MIXTURES.values()} if table == 4 else set(rows)
    for row in [row for row in rows if row in needed]:
        yield step("train_bi.py", row, "sts", *_trains(config, row))
        tuned = () if row == "base" else (f"model.name={folder(row)}/bi",)
        made_by: tuple[str, ...] = ("bi",) if tuned else ()
        if table in (3, "all"):
            yield step("calculate_dp.py", row, "dependence", *tuned, made_by=made_by)
        if table == "all":
            both = "evaluation.language_model=true"
            yield step("-m ubmoe.evaluate", row, "evaluation", both, *tuned, made_by=made_by)
    if table in (4, "all"):
        for name, (encoder, keys) in MIXTURES.items():
            if encoder not in rows:
                raise UserError(f"results.rows: {name} needs {encoder!r}; add it")
            bi = f"ubmoe.bi={folder(encoder)}/bi"
            yield step("train_ubmoe.py", name, "generation", bi, *keys)
    if table == "all":
        mixture = f"model.name={folder('ubmoe')}/ubmoe"
        made_by = ("bi", "ubmoe")
        yield step("calculate_dp.py", "ubmoe", "dependence", mixture, made_by=made_by)
        for variant in BITUNE:
            key = f"bitune.variant={variant}"
            yield step("-m ubmoe.bitune", f"bitune {variant}", "bitune", key)


def _trains(config: Config, row: str) -> list[str]:
    """The keys by which train_bi.py makes a row of Table 2."""
    if row == "base":
        return ["bi.stages=[]"]
    modules = row.removesuffix(CAUSAL).replace("+", ", ")
    keys = [f"bi.stages.{number}.train=[{modules}]" for number in range(len(config.bi.stages))]
    return keys + (["bi.attention=causal"] if row.endswith(CAUSAL) else [])


def label(config: Config) -> str:
    """What a study is called: its output_dir's last part."""
    return Path(config.output_dir).name


def plan(config: Config) -> str:
    """The commands, one a line, with what is there yet as a comment above each."""
    lines = []
    estimates: dict[tuple[str, str], str] = {}  # a row's seeds take as long as each other
    for step in steps(config):
        known = _known(step)
        if step.state() == "missing" and config.results.timed_steps:
            row = (step.row, step.result)
            if row not in estimates:
                estimates[row] = estimate(step, config.results.timed_steps)
            known += f"; {estimates[row]}"
        lines += [f"# {step.row}, seed {step.config.seed}: {known}", step.command]
    return "\n".join(lines)


def _short(step: Step, count: int) -> list[str] | None:
    """Keys for a few steps of a run, without any scoring; None where scoring is all it does."""
    stages = range(len(step.config.bi.stages))
    scoring = ["evaluation.sts=[]", "evaluation.generation=[]"]
    return {
        "sts": [*(f"bi.stages.{each}.max_steps={count}" for each in stages), *scoring],
        "generation": [f"ubmoe.max_steps={count}", "ubmoe.export=[]", *scoring],
        "bitune": [f"bitune.max_steps={count}", "bitune.generation=[]"],
        "dependence": [f"dependence.max_texts={count}"],
        "evaluation": None,
    }[step.result]


def estimate(step: Step, count: int) -> str:
    """Hours and memory of a run, from a few of its steps; scoring is not counted."""
    keys = _short(step, count)
    if keys is None:
        return "not timed: it only scores"
    for needed in (step.config.model.name, step.config.ubmoe.bi):
        if needed and "/study/" in needed and not Path(needed).exists():
            return f"not timed: {needed} is not there yet"
    folder = f"output_dir={Path(step.config.output_dir).parent.parent / 'timed' / step.row}"
    timed = replace_keys(step, [*keys, folder])
    if timed.state() != "there":
        _execute(timed)
    result = read_result(timed.path)
    hours = _extrapolated(step, result, count) / 3600
    memory = result["peak_memory_bytes"] / 1e9
    return f"about {hours:.2g} h and {memory:.1f} GB, from {count} steps, without scoring"


def replace_keys(step: Step, keys: list[str]) -> Step:
    """The same run with further keys; later ones win."""
    return dataclasses.replace(step, keys=(*step.keys, *keys))


def _extrapolated(step: Step, result: dict[str, Any], count: int) -> float:
    """Seconds: what does not grow with the steps, and the steps at the pace of the few."""
    section, config = result[step.result], step.config
    if step.result == "dependence":
        wanted = config.dependence.max_texts or count
        return result["seconds"] * max(1.0, wanted / max(1, section["texts"]))
    seconds = result["seconds"]
    for settings, log_rows, rows in _trained(config, section):
        seconds += log_rows[-1]["train_runtime"] * (settings.steps(rows) / count - 1)
    return float(seconds)


def _trained(
    config: Config, section: dict[str, Any]
) -> list[tuple[TrainingSection, list[dict[str, Any]], int]]:
    """(settings, log, rows) of whatever a result says that it trained."""
    if "stages" in section:
        reports = zip(config.bi.stages, section["stages"], strict=True)
        return [(stage, report["log"], report["rows"]) for stage, report in reports]
    if "router" in section:
        router = section["router"]
        return [(config.ubmoe, router["log"], router["counts"]["chats"])]
    return [(config.bitune, section["log"], section["counts"]["examples"])]


def _known(step: Step) -> str:
    """Whether it is there, and what it took."""
    state = step.state()
    if state == "missing":
        return "not run"
    result = read_result(step.path)
    took = f"{result['seconds'] / 3600:.2f} h, {result['peak_memory_bytes'] / 1e9:.1f} GB"
    return f"done in {took}" if state == "there" else f"run with other keys ({took}); runs again"


def run(config: Config) -> str:
    """Run what is not there yet, one after another, and record each. Raises UserError.

    A run that stopped half-way goes on from its checkpoint; a failed one ends the study, which goes
    on from there when it is called again.
    """
    wanted = steps(config)
    there = [step.state() == "there" for step in wanted]
    keys: dict[str, Any] = {"desc": "study", "unit": "run", "disable": None}
    with tqdm(total=len(wanted), initial=sum(there), **keys) as bar:
        for number, (step, before) in enumerate(zip(wanted, there, strict=True), 1):
            say = f"[{number}/{len(wanted)}] {step.row}, seed {step.config.seed}, {step.result}"
            done = step.state() == "there"  # now: another process may have made it meanwhile
            log.info("%s%s", say, ": done" if done else "")
            if not done:
                _execute(step)
            record(step.config.model_copy(update={"results": config.results}), [step.path])
            bar.update(not before)
    return f"{len(wanted)} runs in {Path(config.output_dir) / 'study'}"


def _execute(step: Step) -> None:
    folder = Path(step.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / f"{step.result}.log"
    program = [str(ROOT / each) if each.endswith(".py") else each for each in step.program]
    command = [sys.executable, *program, step.config_file, *step.keys]
    with log_file.open("a") as file:
        done = subprocess.run([*command, "resume=auto"], stdout=file, stderr=file)
    if done.returncode:
        last: Any = log_file.read_text().strip().splitlines()[-1:]
        raise UserError(f"{step.command} failed ({' '.join(last)}); see {log_file}")
