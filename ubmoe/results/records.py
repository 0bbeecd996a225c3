"""Results of runs, and records: what is kept of them, one file a program, run and seed."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubmoe.bounds import METADATA, read_text
from ubmoe.config import MADE, SCORED, Config, UserError, leaves, listed
from ubmoe.files import write_json
from ubmoe.report.tables import TEXT, model_of
from ubmoe.staging import complete_moves

KINDS = tuple(TEXT)  # one JSON a program, so that none overwrites another's
NAME = re.compile(rf"(?P<label>.+)\.(?P<kind>{'|'.join(KINDS)})\.seed(?P<seed>\d+)")
EXCHANGES = ("swap", "shift")  # between a model and what was tuned from it
BENCHMARK = "benchmark."


@dataclass(frozen=True)
class Record:
    """What one program found in one run.

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
        found = NAME.fullmatch(name)
        if found is None or found["seed"] != str(int(found["seed"])):  # seed00 would hide seed0
            raise UserError(
                f"results.directory: {name}.json is no record's name; expected "
                "<run>.<result>.seed<number>.json, as python -m ubmoe.results record writes it"
            )
        return cls(found["label"], found["kind"], int(found["seed"]), data)

    @property
    def name(self) -> str:
        return f"{self.label}.{self.kind}.seed{self.seed}"

    @property
    def section(self) -> dict[str, Any]:
        """What the program itself found."""
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


class Records:
    """The records of a folder, in the order of their names."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_name = {each.name: each for each in sorted(records, key=lambda each: each.name)}

    @classmethod
    def of_names(cls, results: Mapping[str, dict[str, Any]]) -> "Records":
        return cls(Record.named(name, data) for name, data in results.items())

    def of(self, kind: str, model: str | None = None, label: str | None = None) -> list[Record]:
        """Those of one result, and of a model or a run where it is named."""
        return [
            each
            for each in self.by_name.values()
            if each.kind == kind
            and (model is None or each.model == model)
            and (label is None or each.label == label)
        ]

    def beside(self, record: Record, kind: str) -> Record | None:
        """What another program recorded of the same run."""
        return self.by_name.get(Record(record.label, kind, record.seed, {}).name)


def recorded(config: Config) -> Records:
    """Every record of `results.directory`."""
    found = sorted(Path(config.results.directory).glob("*.json"))
    records = []
    for path in found:
        if not path.name.startswith(BENCHMARK):
            records.append(Record.named(path.stem, as_it_ran(read_result(path))))
            if not isinstance(records[-1].data.get(records[-1].kind), dict):
                raise UserError(f"{path}: no {records[-1].kind} in it; remove it, and record again")
    return Records(records)


def read_benchmarks(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The benchmarks of `results.directory` by their names, one for each device."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(config.results.directory).glob(f"{BENCHMARK}*.json")):
        name = path.name.removeprefix(BENCHMARK).partition(".")[0]
        found.setdefault(name, []).append(read_result(path, "rows"))
    return found


def read_result(path: Path, needed: str = "config") -> dict[str, Any]:
    """Raises UserError for a file that is not a result."""
    try:
        found = json.loads(read_text(path, METADATA))
        if not isinstance(found, dict) or not found.get(needed):
            raise ValueError(f"no {needed} in it")
        if needed == "config":
            _check_config(found["config"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no result ({error}); expected what a run wrote: remove it, and run again"
        ) from error
    return found


def _check_config(config: Any) -> None:
    """Raises ValueError for what does not say of which model and seed it is."""
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise ValueError("no model.name in its config")
    if not isinstance(config.get("seed"), int):
        raise ValueError("no seed in its config")


def as_it_ran(result: dict[str, Any]) -> dict[str, Any]:
    """Every `bf16: auto` of its config as what the device made of it, where the result says it."""
    environment = result.get("environment")
    was = environment.get("bfloat16") if isinstance(environment, dict) else None
    return result if was is None else result | {"config": _resolved(result["config"], was)}


def _resolved(value: Any, was: bool) -> Any:
    if isinstance(value, list):
        return [_resolved(each, was) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: was if name == "bf16" and each == "auto" else _resolved(each, was)
        for name, each in value.items()
    }


def existing(config: Config) -> list[Path]:
    """The results in output_dir. Raises UserError where there is none."""
    complete_moves(Path(config.output_dir))
    found = [path for kind in KINDS if (path := Path(config.output_dir) / f"{kind}.json").exists()]
    if not found:
        raise UserError(
            f"output_dir: {config.output_dir} holds no result; run calculate_dp.py with the same "
            "config first"
        )
    return found


def record(config: Config, paths: list[Path] | None = None) -> str:
    """Copy results (None: all of output_dir) to the folder of records, one a program and seed."""
    written = []
    for path in paths or existing(config):
        result = read_result(path)
        seed = result["config"]["seed"]
        own = Record(label(config), path.stem, seed, without_paths(result))
        target = Path(config.results.directory) / f"{own.name}.json"
        if paths is None:  # a study's runs are its own, and run again where they differ
            _check_same_run(target, own)
        elif target.exists():
            read_result(target)  # what is none is not ours
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, own.data)
        written.append(str(target))
    return "\n".join(written)


def label(config: Config) -> str:
    """What a run or a study is called: its output_dir's last part."""
    return Path(os.path.abspath(config.output_dir)).name


def _check_same_run(target: Path, own: Record) -> None:
    """Raises UserError for a record of another run: two folders may end in one name."""
    if not target.exists():
        return
    names = (*SCORED[own.kind], *MADE.get(own.kind, ())) if own.kind in SCORED else (own.kind,)
    old, new = (leaves(each, names) for each in (read_result(target)["config"], own.config))
    unlike = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if unlike:
        raise UserError(
            f"{target}: is of another run ({listed(unlike)}); remove it to replace it, or let "
            "output_dir end in another name"
        )


def without_paths(value: Any) -> Any:
    """Every string that is a path, reduced to its last part; hub ids and texts stay."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, str) and "/" in value and "\n" not in value:
        path = Path(value)
        local = path.is_absolute() or value.startswith((".", "~")) or path.exists()
        return path.name if local else value
    return value
