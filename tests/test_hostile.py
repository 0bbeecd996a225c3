"""Models, tokenizers, checkpoints and data from strangers: no code of theirs runs, no file of
theirs is written outside output_dir.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from builders import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from ubmoe.config import BiSection
from ubmoe.encoder.sentence_encoder import as_encoder, save_encoder

SHORT = ["model.device=cpu", "dependence.max_texts=3"]
TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.mknod('MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% set x = messages.append({'role': 'user', 'content': 'a'}) %}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{% include '/etc/hostname' %}",
)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a stranger's code would leave."""
    return tmp_path / "marker"


@pytest.fixture
def model(tiny_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_path, tmp_path / "model")


def ends_well_or_in_one_line(result: tuple[int, str, str]) -> str:
    code, _, errors = result
    assert code in (0, 2) and "Traceback" not in errors, errors[-2000:]
    if code == 2:
        assert errors.splitlines()[-1].startswith("error: ")
    return errors


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("of_tokenizer", [True, False])
def test_a_template_is_rendered_in_a_sandbox(model, marker, tmp_path, template, of_tokenizer):
    text = template.replace("MARKER", str(marker))
    arguments = [*SHORT, f"model.name={model}", f"output_dir={tmp_path}/run"]
    (tmp_path / "own.jinja").write_text(text)
    if of_tokenizer:
        (model / "chat_template.jinja").write_text(text)
    else:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        arguments.append(f"dependence.chat_template={tmp_path}/own.jinja")
    code, _, errors = run(*arguments)
    assert code == 2 and "Traceback" not in errors, errors[-2000:]
    assert "chat template" in errors or "chat_template" in errors
    assert not marker.exists() and not (tmp_path / "run").exists()


def test_a_prompt_is_text_and_no_template(tiny_path):
    from ubmoe.encoder.sentence_encoder import rendered

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    prompt = '{{ 7 * 7 }} {% set a = 1 %} "{text}" \\ {# b #}'
    encoder = as_encoder(model, tokenizer, BiSection(prompt=prompt))
    assert rendered(encoder, "{{ 8 * 8 }}") == prompt.replace("{text}", "{{ 8 * 8 }}")


CODE = "open({0!r}, 'w').close()\nclass Mine:\n    pass\n"


@pytest.mark.parametrize("script", ["calculate_dp.py", "train_bi.py", "-m ubmoe.evaluate"])
def test_code_beside_a_model_is_not_imported(model, marker, tmp_path, monkeypatch, script):
    (model / "mine.py").write_text(CODE.format(str(marker)))
    config = json.loads((model / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config |= {"auto_map": {name: "mine.Mine" for name in names}, "trust_remote_code": True}
    (model / "config.json").write_text(json.dumps(config))
    for path in model.glob("tokenizer_config.json"):
        settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.Mine"] * 2}}
        path.write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    arguments = [*SHORT, "bi.stages.0.max_steps=1", "evaluation.sts=[]"]
    result = run(*arguments, f"model.name={model}", f"output_dir={tmp_path}/run", script=script)
    ends_well_or_in_one_line(result)
    assert not marker.exists()


def test_a_module_that_an_encoder_names_is_not_imported(tiny_path, marker, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    inner = AutoModelForCausalLM.from_pretrained(tiny_path)
    save_encoder(
        as_encoder(inner, tokenizer, BiSection()), inner, tokenizer, BiSection(), tmp_path / "bi"
    )
    (tmp_path / "bi" / "mine.py").write_text(CODE.format(str(marker)))
    modules = json.loads((tmp_path / "bi" / "modules.json").read_text())
    modules[0]["type"] = "mine.Mine"
    (tmp_path / "bi" / "modules.json").write_text(json.dumps(modules))
    form = json.loads((tmp_path / "bi" / "sentence_bert_config.json").read_text())
    form["config_kwargs"] = form["model_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "bi" / "sentence_bert_config.json").write_text(json.dumps(form))
    arguments = [f"model.name={tmp_path}/bi", f"output_dir={tmp_path}/run", *SHORT]
    code, _, errors = run(*arguments, script="-m ubmoe.evaluate")
    assert code == 2 and "Traceback" not in errors, errors[-2000:]
    assert not marker.exists()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_not_unpickled(model, marker, tmp_path, zipped):
    import torch

    (model / "model.safetensors").unlink()
    if zipped:
        torch.save(Bomb(marker), model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    code, _, errors = run(*SHORT, f"model.name={model}", f"output_dir={tmp_path}/run")
    assert code == 2 and "Traceback" not in errors, errors[-2000:]
    assert str(model) in errors.splitlines()[-1]
    assert not marker.exists()


@pytest.fixture(
    scope="module", params=[("train_bi.py", "bi.stages.0"), ("-m ubmoe.bitune", "bitune")]
)
def interrupted(request, tiny_path, tmp_path_factory):
    """(a program, its keys, the folder) of a run that has a checkpoint to go on from."""
    (script, section), folder = request.param, tmp_path_factory.mktemp("interrupted") / "run"
    arguments = ["model.device=cpu", f"{section}.max_steps=3", f"{section}.save_steps=2"]
    arguments += ["evaluation.sts=[]", "evaluation.generation=[]", "bitune.generation=[]"]
    assert run(*arguments, f"output_dir={folder}", script=script)[0] == 0
    for last in folder.rglob("checkpoint-3"):
        shutil.rmtree(last)
    return script, arguments, folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["code", "cut"])
def test_a_checkpoint_that_was_damaged_is_said_not_used_and_runs_no_code(
    interrupted, marker, tmp_path, damage
):
    import torch

    script, arguments, whole = interrupted
    arguments = [*arguments, f"output_dir={tmp_path}/run", "resume=auto"]
    shutil.copytree(whole, tmp_path / "run")
    [checkpoint] = (tmp_path / "run").rglob("checkpoint-2")
    for path in checkpoint.iterdir():
        if damage == "code" and path.suffix in (".pt", ".pth", ".bin"):
            torch.save(Bomb(marker), path)
        elif damage == "cut" and path.suffix not in (".json", ""):
            path.write_bytes(path.read_bytes()[:50])
    code, _, errors = run(*arguments, script=script)
    assert not marker.exists()
    assert code == 0, errors[-2000:]
    assert "is not as it was written; not used" in errors and "; starting afresh" in errors
    models = [path for name in ("bi", "bitune") for path in (whole / name).rglob("*.safetensors")]
    for path in models:
        again = tmp_path / "run" / path.relative_to(whole)
        assert again.read_bytes() == path.read_bytes(), path
    assert models


THEIRS = (
    *(".venv.new/a", ".photos.old/a", ".finished-books/a", ".unfinished-novel/a", "bi/a"),
    *("ubmoe/a", "stages/0/checkpoint-mine/a", "checkpoint-mine/a", ".sts.json.1234"),
    *("dependence.partial-notes.txt", "sts.json", "training.png", "routers"),
)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An output directory that is somebody's folder."""
    folder = tmp_path / "theirs"
    for name in THEIRS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("mine")
    for name in (".finished-swap", "vectors", "dependence.partial-0-of-1.npz"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    return folder


def is_as_it_was(folder: Path) -> bool:
    links = [folder / name for name in (".finished-swap", "vectors")]
    same = all((folder / name).read_text() == name for name in THEIRS)
    return same and all((link / "a").read_text() == "mine" for link in links)


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("train_bi.py", "bi"),
        ("train_ubmoe.py", "ubmoe"),
        ("-m ubmoe.probing", "vectors"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused_at_once(theirs, script, named):
    code, output, errors = run(f"output_dir={theirs}", "model.device=cpu", script=script)
    assert (code, output) == (2, "") and errors.count("\n") == 1, errors
    assert errors.startswith(f"error: output_dir: {theirs}/{named} is in the way, and not known")
    assert is_as_it_was(theirs)


def test_what_is_nobodys_business_is_left_as_it_was(tiny_path, theirs):
    code, _, errors = run(f"output_dir={theirs}", *SHORT)
    assert code == 0, errors
    assert is_as_it_was(theirs) and (theirs / "dependence.json").is_file()
    (theirs / "dependence_map.png").write_text("a drawing")
    code, _, errors = run(f"output_dir={theirs}", *SHORT)
    assert code == 2 and "dependence_map.png is in the way" in errors
    assert (theirs / "dependence_map.png").read_text() == "a drawing"
