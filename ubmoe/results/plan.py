"""Running a study: which of its runs are done, which are missing, and how long those would take.

Nothing here imports torch.
"""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ubmoe import owned
from ubmoe.cli import LIFELINE
from ubmoe.config import Config, TrainingSection, UserError
from ubmoe.data.bad_rows import dropping
from ubmoe.data.rows import read_texts
from ubmoe.results.records import ROOT, read_result, record
from ubmoe.results.study import LEFT, Step, as_value, slug, steps
from ubmoe.staging import locked

log = logging.getLogger(__name__)
# Folders of models, of checkpoints and of word vectors.
LARGE = ("bi", "ubmoe", "modes", "adapter", "bitune", "stages", "routers", "adapters", "vectors")


def plan(config: Config) -> str:
    """The commands, one a line, with the state of each as a comment above it."""
    _check_table(config, "plan")
    lines = []
    estimates: dict[tuple[str, str], str] = {}  # a row's seeds take as long as each other
    for step in steps(config):
        status = _status(step)
        if step.state() == "missing" and config.results.timed_steps:
            row = (step.row, step.result)
            if row not in estimates:
                estimates[row] = estimate(step, config.results.timed_steps)
            status += f"; {estimates[row]}"
        after = f", after {step.after.row}" if step.after else ""
        lines += [f"# {step.row}, seed {step.config.seed}{after}: {status}", step.command]
    return "\n".join(lines)


def _check_table(config: Config, verb: str) -> None:
    if config.results.table is None:
        raise UserError(f"results.table: {verb} needs one; expected 2, 3, 4 or all")


def _status(step: Step) -> str:
    """Whether the run is done, and the time and memory it took."""
    state, result = step.state(), step.kept()
    if result is None:
        return "not run"
    took = f"{result['seconds'] / 3600:.2f} h, {result['peak_memory_bytes'] / 1e9:.1f} GB"
    if state == "there":
        return f"done in {took}"
    return f"run with other keys, data, or of another model ({took}); runs again"


def run(config: Config) -> str:
    """Run the missing steps one after another, and record each. Raises UserError.

    A run that stopped half-way goes on from its checkpoint; a failed one ends the study, which goes
    on from there when it is called again.
    """
    _check_table(config, "run")
    planned = steps(config)
    with locked(Path(config.output_dir) / "study", "python -m ubmoe.results run"):
        for _ in range(2):  # a model that was made anew on another machine makes others stale
            _run(config, planned)
    return f"{len(planned)} runs in {Path(config.output_dir) / 'study'}"


def _run(config: Config, planned: list[Step]) -> None:
    missing = [step for step in planned if step.state() != "there"]
    keys: dict[str, Any] = {"desc": "study", "unit": "run", "disable": None if missing else True}
    with tqdm(total=len(missing), **keys) as bar:
        for number, step in enumerate(planned, 1):
            if step.state() != "there":
                say = f"{step.row}, seed {step.config.seed}, {step.result}"
                log.info("[%d/%d] %s", number, len(planned), say)
                _remake(step, config)
                execute(step)
                bar.update()
            _record(step, config)
            if not config.results.keep_models:
                _free_space(step, planned)


def _remake(step: Step, config: Config) -> None:
    """Run the step before again, where its model, which this one reads, or its result is gone."""
    if step.after is not None and not (step.after.left.exists() and step.after.path.exists()):
        _remake(step.after, config)
        execute(step.after)
        _record(step.after, config)


def _free_space(step: Step, planned: list[Step]) -> None:
    """Remove the models and checkpoints that no missing run reads."""
    for made in (step, step.after):
        if made is not None and made.result in LEFT:
            readers = [reader for reader in planned if reader.after == made]
            if all(reader.state() == "there" for reader in readers):
                _remove_folders(Path(made.config.output_dir))


def _remove_folders(folder: Path) -> None:
    """Remove a run's models and checkpoints; its results stay, and folders with files not ours."""
    stages = folder / "stages"
    inside = [] if stages.is_symlink() else sorted(stages.glob("*"))
    for place in (*inside, *(folder / name for name in LARGE)):
        if any(owned.strangers(place)):
            log.info("%s: kept, for what is not ours in it", place)
        else:
            owned.remove(place)


def _record(step: Step, config: Config) -> None:
    if step.path.exists():  # else its record is what is there
        record(step.config.model_copy(update={"results": config.results}), [step.path])


def execute(step: Step, resume: str = "auto") -> None:
    folder = Path(step.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / f"{step.result}.log"
    if log_file.is_symlink() or (log_file.exists() and not log_file.is_file()):
        raise owned.refused(log_file)
    program = [str(ROOT / word) if word.endswith(".py") else word for word in step.program]
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise UserError(
            f"{step.program[0]} is not beside the package; expected a checkout of the repository, "
            "in which the study runs"
        )
    command = [sys.executable, *program, step.config_file, *step.keys, f"resume={resume}"]
    environment = os.environ | {LIFELINE: "1"}
    with (
        log_file.open("a") as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment
        ) as done,
    ):
        done.wait()  # its stdin is open until then
    if done.returncode:
        last: Any = log_file.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{step.command} failed ({' '.join(last)}); see {log_file}")


# --- hours and memory, from a few steps -----------------------------------------------------------


def estimate(step: Step, count: int) -> str:
    """Hours and memory of a run, from a few of its steps; scoring and checkpoints not counted."""
    keys = _few_steps(step, count)
    if keys is None:
        return "not timed: it only scores"
    if step.after is not None and not step.after.left.exists():
        return f"not timed: {step.after.left} is not there yet"
    folder = Path(step.config.output_dir).parent.parent / "timed" / slug(step.row)
    owned.check_within(folder.parent)  # no link
    place = f"output_dir={as_value(str(folder))}"
    timed = dataclasses.replace(step, keys=(*step.keys, *keys, place), after=None, records=None)
    if timed.state() != "there":
        execute(timed, resume="never")
        _remove_folders(folder)  # as large as the run's
    result = read_result(timed.path)
    seconds = extrapolated(step, result)
    took = f"{seconds / 3600:.1f} h" if seconds > 360 else f"{seconds / 60:.1f} min"
    memory = result["peak_memory_bytes"] / 1e9
    what = "texts" if step.result == "dependence" else "steps"
    return f"about {took} and {memory:.1f} GB, from {count} {what}, without scoring"


def _few_steps(step: Step, count: int) -> list[str] | None:
    """Keys for a few steps of a run, without any scoring; None where scoring is all it does."""
    if step.result == "generation" and not step.config.ubmoe.mixes:
        return None  # no router trains
    stages = range(len(step.config.bi.stages))
    scoring = ["evaluation.sts=[]", "evaluation.generation=[]"]
    return {
        "sts": [*(f"bi.stages.{number}.max_steps={count}" for number in stages), *scoring],
        "generation": [f"ubmoe.max_steps={count}", "ubmoe.export=[]", *scoring],
        "bitune": [f"bitune.max_steps={count}", "bitune.generation=[]"],
        "dependence": [f"dependence.max_texts={count}"],
    }.get(step.result)


def extrapolated(step: Step, result: dict[str, Any]) -> float:
    """Seconds: the fixed part as measured, and the steps at the pace of the timed ones."""
    section, config = result[step.result], step.config
    seconds = float(result["seconds"])
    if step.result == "dependence":
        with dropping(config.data.skip_bad_rows):
            texts = len(read_texts(config.dependence.dataset, config.dependence.max_texts))
        return seconds + section["seconds"] * (texts / section["texts"] - 1)
    for settings, log_rows, rows in _trained(config, section):
        if log_rows:  # none where nothing trains
            done = log_rows[-1]
            seconds += done["seconds_per_step"] * (settings.steps(rows) - done["step"])
    return seconds


def _trained(
    config: Config, section: dict[str, Any]
) -> list[tuple[TrainingSection, list[dict[str, Any]], int]]:
    """(settings, log, rows) of each stage that a result says it trained."""
    if "stages" in section:
        reports = zip(config.bi.stages, section["stages"], strict=True)
        return [(stage, report["log"], report["rows"]) for stage, report in reports]
    if "router" in section:
        router = section["router"]
        return [(config.ubmoe, router["log"], router["counts"]["chats"])]
    return [(config.bitune, section["log"], section["counts"]["examples"])]
