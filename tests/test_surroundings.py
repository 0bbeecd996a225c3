"""What is around a program: disk, folders, streams, signals. It ends well, or in one line."""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from builders import ROOT, run, run_apart, start

from ubmoe import owned

pytestmark = pytest.mark.slow
SHORT = ["model.device=cpu", "dependence.max_texts=3"]
TUNED = ["model.device=cpu", "bi.stages.0.max_steps=2", "evaluation.sts=[]"]


def ended(process) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def one_line(errors: str, *words: str) -> None:
    assert "Traceback" not in errors, errors[-2000:]
    [said] = [line for line in errors.splitlines() if line.startswith("error")]
    assert errors.rstrip("\n").splitlines()[-1] == said
    assert all(word in said for word in words), said


def test_a_disk_that_is_full_is_said_and_the_earlier_encoder_stays(tiny_path, tmp_path):
    (tmp_path / "run" / "bi").mkdir(parents=True)
    (tmp_path / "run" / "bi" / "earlier").write_text("mine")
    owned.name_all(tmp_path / "run" / "bi")
    owned.claim(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        code, output, errors = run(*TUNED, f"output_dir={tmp_path}/run", script="train_bi.py")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, output) == (2, "")
    one_line(errors, "no space left", "resume=auto")
    assert (tmp_path / "run" / "bi" / "earlier").read_text() == "mine"
    assert not (tmp_path / "run" / "sts.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_that_cannot_be_written_is_said_at_once():
    code, output, errors = run(*SHORT, "output_dir=/proc/none")
    assert (code, output) == (2, "")
    one_line(errors, "output_dir: /proc/none", "expected a folder of yours")


def test_without_a_home_the_embedded_models_place_is_said(tmp_path):
    home = {name: value for name, value in os.environ.items() if name != "UBMOE_CACHE"}
    home |= {"HOME": "/proc/none", "MPLCONFIGDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    home.pop("XDG_CACHE_HOME", None)
    process = start(*SHORT, f"output_dir={tmp_path}/run", environment=home)
    code, output, errors = ended(process)
    assert (code, output) == (2, "")
    one_line(errors, "set model.cache or UBMOE_CACHE")


@pytest.mark.parametrize("number", [1, 2])
def test_a_closed_stream_is_none_of_our_business(tiny_path, tmp_path, number):
    arguments = [*SHORT, f"output_dir={tmp_path}/run"]
    code, _, errors = ended(start(*arguments, preexec_fn=lambda: os.close(number)))
    assert code == 0 and "Traceback" not in errors
    json.loads((tmp_path / "run" / "dependence.json").read_text())
    code, output, _ = ended(start("seed=-1", preexec_fn=lambda: os.close(number)))
    assert (code, output) == (2, "")


@pytest.mark.parametrize("streams", [[1], [2], [1, 2]])
@pytest.mark.parametrize("arguments", [["--help"], ["seed=-1"]])
def test_a_stream_that_takes_nothing_changes_no_status(arguments, streams):
    def fill():
        for number in streams:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    code, _, errors = ended(start(*arguments, preexec_fn=fill))
    assert code == (0 if (arguments, streams) == (["--help"], [2]) else 2)
    if streams == [1]:
        expected = "seed: got -1" if "seed" in arguments[0] else "stdout: No space left on device"
        one_line(errors, expected)


def test_a_run_that_is_ended_leaves_no_result_and_goes_on(tiny_path, tmp_path):
    arguments = [*TUNED, "resume=auto", f"output_dir={tmp_path}/run"]
    process = start(*arguments, script="train_bi.py")
    while not list(tmp_path.glob("run/stages/0/*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # as a cluster does
    code, output, errors = ended(process)
    assert (code, output) == (-signal.SIGTERM, "") and "Traceback" not in errors
    assert not (tmp_path / "run" / "sts.json").exists()
    code, _, errors = run(*arguments, script="train_bi.py")
    assert code == 0, errors
    assert (tmp_path / "run" / "bi" / "model.safetensors").exists()


def test_spaces_other_alphabets_and_another_working_directory(tiny_path, tmp_path):
    here = tmp_path / "my data" / "Größe 猫 😀"
    here.mkdir(parents=True)
    (here / "chats é.jsonl").write_text('{"text": "The cat sleeps in the garden."}\n' * 3)
    keys = [*SHORT, "dependence.dataset=chats é.jsonl", "output_dir=out put/ü"]
    code, output, errors = run(*keys, script=str(ROOT / "calculate_dp.py"), folder=here)
    assert code == 0, errors
    assert output == "out put/ü/dependence.json\n"
    record = json.loads((here / "out put" / "ü" / "dependence.json").read_text())
    assert record["dependence"]["texts"] == 3
    assert sorted(item.name for item in here.iterdir()) == ["chats é.jsonl", "out put"]


def test_what_the_environment_sets_for_accelerate_changes_no_weight(
    tiny_path, tmp_path, monkeypatch
):
    actual = []
    for name, given in {
        "without": {},
        "with": {"MIXED_PRECISION": "bf16", "USE_FSDP": "no"},
    }.items():
        for key, value in given.items():
            monkeypatch.setenv(f"ACCELERATE_{key}", value)
        code, _, errors = run(*TUNED, f"output_dir={tmp_path}/{name}", script="train_bi.py")
        assert code == 0, errors
        actual.append((tmp_path / name / "bi" / "model.safetensors").read_bytes())
    assert actual[0] == actual[1]
    assert "ACCELERATE_MIXED_PRECISION=bf16: ignored" in errors
    assert "ACCELERATE_USE_FSDP" not in errors


def test_bytes_that_are_no_text_are_refused_on_the_command_line(tmp_path):
    name = os.fsdecode(os.fsencode(f"output_dir={tmp_path}/caf") + b"\xe9")
    code, output, errors = run_apart(*SHORT, name)
    assert (code, output) == (2, "")
    one_line(errors, "caf\\udce9", "is not UTF-8")
    assert not list(Path(tmp_path).iterdir())
