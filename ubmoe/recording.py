"""A run as one JSON with its figures, whole or not at all; records; tables.

Nothing heavy is imported at the top: tables come from the JSON alone.
"""

import errno
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ubmoe.config import Config, UserError, dump_config
from ubmoe.report import tables
from ubmoe.results import pages as readme
from ubmoe.results import paper

log = logging.getLogger(__name__)
PACKAGES = (
    "ubmoe",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "numpy",
)
# Of git, seen from this package: it and the scripts; a study that records its runs changes neither.
CODE = (".", ":(top,glob)*.py")
# One JSON a program, so that none overwrites another's.
RESULTS = ("dependence", "sts", "generation", "bitune", "probing", "evaluation")


@dataclass
class Run:
    """What a script fills in while it runs; written when it ends well."""

    program: str
    name: str
    config: Config
    directory: Path
    started: float = field(default_factory=time.monotonic)
    model: Any = None
    section: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # further sections of the result
    figures: dict[str, Any] = field(default_factory=dict)  # file name -> matplotlib figure

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def is_main(self) -> bool:
        """Whether this process writes and scores; under torchrun only the first one does."""
        from accelerate import PartialState

        return PartialState().is_main_process

    def log(self, message: str, *values: object) -> None:
        """A line for the people who watch the run."""
        log.info(message, *values)

    def write(self) -> None:
        """The resolved config, the figures, and last the result itself, each by rename."""
        record = {
            "config": self.config.model_dump(),
            "environment": environment(self.model, self.config.seed),
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            self.name: self.section,
            **self.more,
        }
        text = json_text(record)  # fails before anything is written
        writes: dict[Path, Callable[[Path], object]] = {
            self.directory / f"{self.program}.config.yaml": partial(
                _write_text, text=dump_config(self.config)
            )
        }
        for name, figure in self.figures.items():
            writes[self.directory / name] = partial(save_figure, figure)
        replace_all({**writes, self.path: partial(_write_text, text=text)})
        for leftover in self.directory.glob(f"{self.name}.partial-*"):
            leftover.unlink()


@contextmanager
def recording(program: str, name: str, config: Config) -> Iterator[Run]:
    """A run that writes `<output_dir>/<name>.json` when its body ends well, on the main process.

    Raises UserError at once for an output directory that cannot be written; a failed run leaves an
    earlier result as it was.
    """
    directory = Path(config.output_dir)
    made = _make_writable(directory)
    run = Run(program, name, config, directory)
    try:
        yield run
        if run.is_main:
            run.write()
    except BaseException:
        for folder in made:  # deepest first; what holds the sums of an interrupted run stays
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _make_writable(directory: Path) -> list[Path]:
    """Make the directory where it is missing; returns the folders made, deepest first."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"output_dir: {directory} cannot be written ({reason}); expected a folder of yours"
        ) from error
    return missing


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it: nobody reads half. Raises OSError."""
    replace_all({path: write})


def replace_all(writes: dict[Path, Callable[[Path], object]]) -> None:
    """Like `replace`, for files that belong together: none gives way before all are written."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in writes}
    try:
        for path, write in writes.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            write(temporary[path])
        for path in writes:
            temporary[path].replace(path)
    finally:
        for remains in temporary.values():
            remains.unlink(missing_ok=True)


def replace_directory(path: Path, write: Callable[[Path], object]) -> None:
    """Like `replace`, for a folder: the old one gives way only to a whole new one."""
    temporary, old = (path.with_name(f".{path.name}.{word}") for word in ("new", "old"))
    for remains in (temporary, old):
        shutil.rmtree(remains, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        for remains in (temporary, old):
            shutil.rmtree(remains, ignore_errors=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Atomic; a NaN is an error, since it is no JSON and no result."""
    replace(path, partial(_write_text, text=json_text(record)))


def json_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs that the font lacks
        figure.savefig(path, format="png")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def environment(model: Any, seed: int) -> dict[str, Any]:
    """Versions, device, dtype, commit and seed: what a number depends on besides its config."""
    from ubmoe.models.loading import environment as of_model

    return {
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "platform": f"{platform.system()} {platform.machine()}",
        "git_commit": git_commit(),
        "seeds": [seed],
        **of_model(model),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of this package's checkout, `+changes` where edited; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *CODE],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def peak_memory_bytes() -> int:
    """Most memory of this process: allocated on CUDA, resident set on CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # ru_maxrss of a child begins at what its parent had; VmHWM is the process's own
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- recorded runs and tables ---------------------------------------------------------------------


def read_result(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is not a result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not ({"config", "rows"} & set(found)):
            raise ValueError("no config in it")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no result ({error}); expected what a run wrote: remove it, and run again"
        ) from error
    return found


def existing(config: Config) -> list[Path]:
    """The results in output_dir. Raises UserError where there is none."""
    found = [
        path for name in RESULTS if (path := Path(config.output_dir) / f"{name}.json").exists()
    ]
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
        name = f"{Path(config.output_dir).name}.{path.stem}.seed{result['config']['seed']}.json"
        target = Path(config.results.directory) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, _without_paths(result))
        written.append(str(target))
    return "\n".join(written)


def _without_paths(value: Any) -> Any:
    """Every string that is a path, reduced to its last part; hub ids and texts stay."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and "/" in value and "\n" not in value:
        path = Path(value)
        return (
            path.name
            if path.is_absolute() or value.startswith((".", "~")) or path.exists()
            else value
        )
    return value


def table(config: Config) -> str:
    """The results of output_dir as text, and the paths of their figures."""
    parts = [tables.TEXT[path.stem](read_result(path)) for path in existing(config)]
    figures = sorted(str(path) for path in Path(config.output_dir).glob("*.png"))
    return "\n\n".join([*parts, "\n".join(["figures:", *(f"  {path}" for path in figures)])])


def renew_readme(config: Config) -> str:
    """Renew the generated tables of README.md from the recorded results of `results.seeds`."""
    path = Path("README.md")
    text = readme.renewed(path.read_text(encoding="utf-8"), recorded(config), config.results.seeds)
    replace(path, partial(_write_text, text=text))
    return str(path)


def recorded(config: Config) -> dict[str, dict[str, Any]]:
    """Every record by its file name without `.json`."""
    found = sorted(Path(config.results.directory).glob("*.json"))
    return {path.stem: read_result(path) for path in found}


def main(config: Config) -> str:
    from ubmoe.results import plan as study

    action = config.results.action
    if action in ("plan", "run"):
        if config.results.table is None:
            raise UserError(f"results.table: {action} needs one; expected 2, 3, 4 or all")
        return (study.plan if action == "plan" else study.run)(config)
    if action == "prefetch":
        from ubmoe import prefetch

        return prefetch.run(config)
    if action == "figure":
        from ubmoe.results import tradeoff

        return tradeoff.draw(config, recorded(config))
    if action == "table" and config.results.table is not None:
        return paper.text(config.results.table, config, recorded(config))
    return {"record": record, "table": table, "readme": renew_readme}[action](config)
