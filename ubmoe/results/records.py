"""Results of runs, and records of them: one file a program, run and seed."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubmoe.bounds import read_json
from ubmoe.config import MADE, SCORED, Config, UserError, error_reason, leaves, listed
from ubmoe.files import write_json
from ubmoe.report.tables import TEXT, model_of
from ubmoe.results import packed
from ubmoe.staging import complete_moves

KINDS = tuple(TEXT)  # one JSON a program, so that none overwrites another's
NAME = re.compile(rf"(?P<label>.+)\.(?P<kind>{'|'.join(KINDS)})\.seed(?P<seed>\d+)")
EXCHANGES = ("swap", "shift")  # between a model and what was tuned from it
BENCHMARK = "benchmark."
ROOT = Path(__file__).resolve().parents[2]  # of a checkout, or where a wheel puts the scripts


@dataclass(frozen=True)
class Record:
    """The result of one program in one run.

    label: of the run, its output_dir's last part. kind: the program's result, one of KINDS. data:
    the result, with config and environment.
    """

    label: str
    kind: str
    seed: int
    data: dict[str, Any]

    @classmethod
    def named(cls, name: str, data: dict[str, Any]) -> "Record":
        """The record of a file's name without `.json`. Raises UserError for one that is none."""
        match = NAME.fullmatch(name)
        if match is None or match["seed"] != str(int(match["seed"])):  # seed00 would hide seed0
            raise UserError(
                f"results.directory: {name}.json is no record's name; expected "
                "<run>.<result>.seed<number>.json, as python -m ubmoe.results record writes it"
            )
        return cls(match["label"], match["kind"], int(match["seed"]), data)

    @property
    def name(self) -> str:
        return f"{self.label}.{self.kind}.seed{self.seed}"

    @property
    def section(self) -> dict[str, Any]:
        """The program's own section of the result."""
        return self.data[self.kind]

    @property
    def config(self) -> dict[str, Any]:
        return self.data["config"]

    @property
    def model(self) -> str:
        return model_of(self.data)

    @property
    def weights(self) -> str | None:
        """Digest of the model's weights; None of an older version, which did not say it."""
        return self.data.get("environment", {}).get("weights")


def stored(directory: str | Path, name: str) -> dict[str, Any] | None:
    """The record of this name, as `studies.compare.records` finds it; None where there is none."""
    for folder in folders(directory):
        if (path := folder / f"{name}.json").exists():
            return read_result(path)
        if (result := packed.read(folder).get(name)) is not None:
            return result
    return None


def folders(directory: str | Path) -> list[Path]:
    """The folder; if it is the checkout's own `results`, behind it those of the studies beside."""
    folder = Path(directory)
    if folder.resolve() != ROOT / "results":
        return [folder]
    return [folder, *sorted(study for study in (ROOT / "studies").glob("*/") if study.is_dir())]


def loose(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(BENCHMARK)]


def checked(path: Path, record: Record) -> Record:
    if not isinstance(record.data.get(record.kind), dict):
        raise UserError(f"{path}: no {record.kind} in it; remove it, and record again")
    as_text(path, record.kind, record.data)
    return record


def pack(config: Config) -> str:
    """Put the files of `results.directory` into its packed records, and remove them. UserError."""
    folder = Path(config.results.directory)
    paths = loose(folder)
    if not paths:
        raise UserError(f"results.directory: {folder} holds no record that is a file of its own")
    results = {path.stem: read_result(path) for path in paths}
    for path in paths:
        checked(path, Record.named(path.stem, results[path.stem]))
    packed.write(folder, packed.read(folder) | results)
    for path in paths:
        path.unlink()
    return str(folder / packed.LINES)


def as_text(path: Path, kind: str, result: dict[str, Any]) -> str:
    """The table of one result. Raises UserError, naming the file, where it lacks a part of it."""
    try:
        return TEXT[kind](result)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{path}: no {kind} as a run writes it ({error_reason(error)}); remove it, and record "
            "again"
        ) from error


def read_result(path: Path, needed: str = "config") -> dict[str, Any]:
    """Raises UserError for a file that is not a result."""
    try:
        result = read_json(path)
        if not isinstance(result, dict) or not result.get(needed):
            raise ValueError(f"no {needed} in it")
        if needed == "config":
            _check_config(result["config"])
        if not isinstance(result.get("environment", {}), dict):
            raise ValueError("its environment is no object")
    except (OSError, ValueError) as error:
        said = error_reason(error)
        raise UserError(
            f"{path}: no result ({said}); expected what a run wrote: remove it, and run again"
        ) from error
    return result


def _check_config(config: Any) -> None:
    """Raises ValueError for a config without model name or seed."""
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise ValueError("no model.name in its config")
    if type(config.get("seed")) is not int:
        raise ValueError("no seed in its config")


def as_it_ran(result: dict[str, Any]) -> dict[str, Any]:
    """The result with every `bf16: auto` of its config resolved as on the run's device."""
    environment = result.get("environment")
    was = environment.get("bfloat16") if isinstance(environment, dict) else None
    return result if was is None else result | {"config": _resolved(result["config"], was)}


def _resolved(value: Any, was: bool) -> Any:
    if isinstance(value, list):
        return [_resolved(item, was) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: was if name == "bf16" and item == "auto" else _resolved(item, was)
        for name, item in value.items()
    }


def existing(config: Config) -> list[Path]:
    """The results in output_dir. Raises UserError where there is none."""
    complete_moves(Path(config.output_dir))
    paths = [path for kind in KINDS if (path := Path(config.output_dir) / f"{kind}.json").exists()]
    if not paths:
        raise UserError(
            f"output_dir: {config.output_dir} holds no result; run calculate_dp.py with the same "
            "config first, or of a study ubmoe.results run, and add results.table=all"
        )
    return paths


def record(config: Config, paths: list[Path] | None = None) -> str:
    """Copy results (None: all of output_dir) to the folder of records, one a program and seed."""
    written = []
    for path in paths or existing(config):
        result = read_result(path)
        seed = result["config"]["seed"]
        new = Record(label(config), path.stem, seed, without_paths(result))
        target = Path(config.results.directory) / f"{new.name}.json"
        if paths is None:  # a study's runs are its own, and run again where they differ
            _check_same_run(target, new)
        elif target.exists():
            read_result(target)  # what is none is not ours
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, new.data)
        written.append(str(target))
    return "\n".join(written)


def label(config: Config) -> str:
    """The name of a run or a study: its output_dir's last part."""
    return Path(os.path.abspath(config.output_dir)).name


def _check_same_run(target: Path, candidate: Record) -> None:
    """Raises UserError for a record of another run: two folders may end in one name."""
    kept = stored(target.parent, candidate.name)
    if kept is None:
        return
    names = (
        (*SCORED[candidate.kind], *MADE.get(candidate.kind, ()))
        if candidate.kind in SCORED
        else (candidate.kind,)
    )
    old, new = (leaves(config, names) for config in (kept["config"], candidate.config))
    unlike = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if unlike:
        raise UserError(
            f"{target}: is of another run ({listed(unlike)}); remove it to replace it, or let "
            "output_dir end in another name"
        )


def without_paths(value: Any) -> Any:
    """Every string that is a path, reduced to its last part; hub ids and texts stay."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value and "\n" not in value:
        path = Path(value)
        local = path.is_absolute() or value.startswith((".", "~")) or path.exists()
        return path.name if local else value
    return value
