"""What is said is what the program would do, and nothing is written."""

import re

import pytest
from builders import random_model, run

from ubmoe.config import UserError, load_config
from ubmoe.dry_run import memory, programs


def test_parameters_are_counted_by_module_and_a_tied_head_once():
    model = random_model("qwen2", tie_word_embeddings=True)
    actual = programs.parameters(model)
    assert sum(actual.values()) == model.num_parameters()
    ffn = sum(value.numel() for name, value in model.named_parameters() if ".mlp." in name)
    assert actual["ffn"] == ffn
    assert actual["embedding"] == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (programs.calculate_dp, ["400 texts, 50603 tokens", "dependence.json"]),
        (programs.train_bi, ["trains ffn 589,824", "60 steps of 64 on one device", "/bi"]),
        (programs.train_ubmoe, ["trains routers 1,024", "40 steps of 16", "modes"]),
    ],
)
def test_it_says_what_would_be_done_and_does_nothing(tiny_path, tmp_path, script, said):
    output = script(load_config(None, [f"output_dir={tmp_path}/run", "model.device=cpu"]))
    assert output.endswith("nothing was run") and "peak memory, estimated" in output
    assert programs.MEASURED in output and all(item in output for item in said), output


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.device=cpu"], programs.CACHED),
        (["model.device=cuda"], programs.MEASURED),
        (["model.device=cpu", "bi.stages.0.max_steps=0"], programs.MEASURED),
    ],
)
def test_it_says_that_a_cached_run_may_take_more_on_a_cpu(tiny_path, tmp_path, keys, said):
    given = [f"output_dir={tmp_path}/run", "bi.stages.0.cached=true", *keys]
    output = programs.train_bi(load_config(None, given))
    assert [line for line in output.splitlines() if line.startswith("measured")] == [said]
    assert not (tmp_path / "run").exists()


def test_a_script_asked_so_says_it(tiny_path, tmp_path):
    code, output, errors = run(f"output_dir={tmp_path}/run", "model.device=cpu", "dry_run=true")
    assert code == 0 and output.endswith("nothing was run\n"), errors
    assert not (tmp_path / "run").exists()


def test_keys_that_save_memory_are_tried_one_by_one(tiny_path, monkeypatch):
    """Each with what the program itself says under it, Python's own memory left out: it grows."""
    monkeypatch.setattr(memory, "baseline", lambda *_: {})
    said = programs.train_bi(load_config(None, ["model.device=cpu"]))
    peaks = re.findall(r"peak memory, estimated +([\d.]+) GB", said)
    saving = dict(re.findall(r"^ *(bi\.stages\.0\S+) +([\d.]+) GB$", said, re.MULTILINE))
    keys = ("activation_checkpointing=true", "cached=true", "optim=adamw_8bit")
    assert set(saving) == {f"bi.stages.0.{key}" for key in keys}
    monkeypatch.setattr(programs, "_smaller", lambda *_: [])
    for key, peak in saving.items():
        alone = programs.train_bi(load_config(None, ["model.device=cpu", key]))
        actual = re.search(r"peak memory, estimated +([\d.]+) GB", alone)[1]
        assert float(actual) == pytest.approx(float(peak), abs=0.01)
        assert float(actual) <= float(peaks[0])


def test_memory_follows_the_prompt_and_each_stage_alone(tiny_path, monkeypatch):
    monkeypatch.setattr(programs, "_smaller", lambda *_: [])

    def parts(*keys):
        said = programs.train_bi(load_config(None, ["model.device=cpu", *keys]))
        actual = re.findall(r"(gradients|optimiser|activations of .* tokens) +([\d.]+) GB", said)
        return {name: float(value) for name, value in actual}, said

    plain, _ = parts("bi.prompt=null")
    [short] = [name for name in plain if "activations" in name]
    prompted, _ = parts(f"bi.prompt={'a word of many ' * 9}{{text}}")
    [long] = [name for name in prompted if "activations" in name]
    assert int(long.split()[4]) > int(short.split()[4]) + 128 * 30
    stage = "{objective: simcse, dataset: tiny, per_device_train_batch_size: 64, dropout: 0.3%s}"
    alone, _ = parts(f"bi.stages=[{stage % ''}]")
    checkpointed = stage % ", activation_checkpointing: true"
    assert (
        parts(f"bi.stages=[{checkpointed}, {stage % ''}]")[0]
        == alone
        != parts(f"bi.stages=[{checkpointed}]")[0]
    )
    for nothing in ("bi.stages=[]", "bi.stages.0.max_steps=0"):
        actual, none = parts(nothing)
        assert actual == {} and "trains" not in none
        assert "training.png" not in none and "stages/" not in none and "sts.json" in none


def test_a_backend_that_is_not_installed_is_one_line(tiny_path):
    keys = ["model.attn_implementation=flash_attention_2", "model.device=cpu"]
    with pytest.raises(UserError, match="cannot be loaded as a decoder: .*[Ff]lash"):
        programs.train_bi(load_config(None, keys))


def test_the_second_objective_of_routers_is_counted(tiny_path, monkeypatch):
    monkeypatch.setattr(programs, "_smaller", lambda *_: [])
    keys = ["ubmoe.objective=both", "ubmoe.export=[modes]", "model.device=cpu"]
    said = programs.train_ubmoe(load_config(None, keys))
    alone = programs.train_ubmoe(load_config(None, keys[1:]))
    sizes = [int(re.search(r"activations of (\d+) texts", item)[1]) for item in (said, alone)]
    assert sizes == [32, 16]
    assert "/modes" in said and "/ubmoe\n" not in said


def test_lora_and_masked_stages_are_estimated_too(tiny_path):
    stages = (
        "bi.stages=[{objective: mntp, train: [ffn], dataset: tiny, max_tokens: 64, lora: {rank: 4},"
        " per_device_train_batch_size: 8, mask_token: the}]"
    )
    said = programs.train_bi(load_config(None, [stages, "model.device=cpu"]))
    assert "stage 0 (mntp)" in said and "activations of 8 texts, 512 tokens" in said
    assert "trains adapters 24,576" in said  # 4 layers x 3 matrices x rank 4 x (128 + 384)
