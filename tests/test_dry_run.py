"""Shapes instead of models: the same parameters, the same bytes kept, and nothing written."""

import re

import pytest
import torch
from builders import random_model, run
from torch import nn
from transformers import AutoModelForCausalLM

from ubmoe import dry_run
from ubmoe.config import UserError, load_config


class Toy(nn.Module):
    """A layer of 3 x 5 and one of 5 x 2 on (B, T) tokens of 3 numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)
        self.base_model = self

    def forward(self, input_ids, use_cache):
        states = input_ids[..., None].expand(*input_ids.shape, 3).float()
        return type("O", (), {"last_hidden_state": self.second(self.first(states).relu())})


def test_what_is_kept_is_what_paper_and_pencil_say():
    """Inputs of both layers (the first one's is a parameterless constant), relu's output shared."""
    found = dry_run.kept_for_backward(Toy(), dry_run.Batch(4, 6))
    assert found == 4 * (4 * 6 * 3 + 4 * 6 * 5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_shapes_keep_as_many_bytes_as_tensors_do(family):
    batch = dry_run.Batch(3, 7, predicted=5)
    real = random_model(family).train()
    expected = dry_run.kept_for_backward(real, batch)
    with dry_run.shapes():
        shaped = AutoModelForCausalLM.from_config(real.config, dtype=torch.float32).train()
        kept = dry_run.kept_for_backward(shaped, batch)
        # the mask, which a real pass leaves away where sdpa knows it
        assert expected <= kept == pytest.approx(expected, rel=0.1)
        assert dry_run.size(shaped) == dry_run.size(real)
        fewer = dry_run.kept_for_backward(shaped, batch, checkpointing=True)
    assert fewer < expected


def test_parameters_are_counted_by_module_and_a_tied_head_once():
    model = random_model("qwen2", tie_word_embeddings=True)
    found = dry_run.parameters(model)
    assert sum(found.values()) == model.num_parameters()
    ffn = sum(value.numel() for name, value in model.named_parameters() if ".mlp." in name)
    assert found["ffn"] == ffn
    assert found["embedding"] == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (dry_run.calculate_dp, ["400 texts, 50603 tokens", "dependence.json"]),
        (dry_run.train_bi, ["trains ffn 589,824", "60 steps of 64 on one device", "/bi"]),
        (dry_run.train_ubmoe, ["trains routers 1,024", "40 steps of 16", "modes"]),
    ],
)
def test_it_says_what_would_be_done_and_does_nothing(tiny_path, tmp_path, script, said):
    output = script(load_config(None, [f"output_dir={tmp_path}/run", "model.device=cpu"]))
    assert output.endswith("nothing was run") and "peak memory, estimated" in output
    assert dry_run.MEASURED in output and all(each in output for each in said), output
    assert not (tmp_path / "run").exists()


def test_a_script_asked_so_says_it(tiny_path, tmp_path):
    code, output, errors = run(f"output_dir={tmp_path}/run", "model.device=cpu", "dry_run=true")
    assert code == 0 and output.endswith("nothing was run\n"), errors
    assert not (tmp_path / "run").exists()


def test_memory_follows_the_prompt_the_dtype_and_each_stage_alone(tiny_path):
    def parts(*keys):
        said = dry_run.train_bi(load_config(None, ["model.device=cpu", *keys]))
        found = re.findall(r"(gradients|Adam|activations of \d+ x \d+ tokens) +([\d.]+) GB", said)
        return {name: float(value) for name, value in found}, said

    plain, _ = parts("bi.prompt=null")
    [short] = [name for name in plain if "activations" in name]
    prompted, _ = parts(f"bi.prompt={'a word of many ' * 9}{{text}}")
    [long] = [name for name in prompted if "activations" in name]
    assert int(long.split()[4]) > int(short.split()[4]) + 30
    for dtype, number in (("float32", 4), ("bfloat16", 2)):
        config = load_config(None, [f"model.dtype={dtype}", "model.device=cpu"])
        with dry_run.shapes():
            found = dry_run.training_memory(
                dry_run.fake(config), config.ubmoe, dry_run.Batch(1, 2), 0.0, False
            )
        assert found["gradients"] == 884_608 * number
        assert found["Adam"] == 2 * 884_608 * number
        for optim, moments in (("adamw_8bit", 2), ("adafactor", 0)):
            section = config.ubmoe.model_copy(update={"optim": optim})
            with dry_run.shapes():
                found = dry_run.training_memory(
                    dry_run.fake(config), section, dry_run.Batch(1, 2), 0.0, False
                )
            assert found["Adam"] == moments * 884_608
    stage = "{objective: simcse, dataset: tiny, per_device_train_batch_size: 64, dropout: 0.3%s}"
    alone, _ = parts(f"bi.stages=[{stage % ''}]")
    checkpointed = stage % ", activation_checkpointing: true"
    assert (
        parts(f"bi.stages=[{checkpointed}, {stage % ''}]")[0]
        == alone
        != parts(f"bi.stages=[{checkpointed}]")[0]
    )
    for nothing in ("bi.stages=[]", "bi.stages.0.max_steps=0"):
        found, none = parts(nothing)
        assert found == {} and "trains" not in none
        assert "training.png" not in none and "stages/" not in none and "sts.json" in none


def test_a_backend_that_is_not_installed_is_one_line(tiny_path):
    keys = ["model.attn_implementation=flash_attention_2", "model.device=cpu"]
    with pytest.raises(UserError, match="cannot be loaded as a decoder: .*[Ff]lash"):
        dry_run.train_bi(load_config(None, keys))


def test_the_second_objective_of_routers_is_counted(tiny_path):
    keys = ["ubmoe.objective=both", "ubmoe.export=[modes]", "model.device=cpu"]
    said = dry_run.train_ubmoe(load_config(None, keys))
    assert re.search(r"activations of 16 sentences of \d+ tokens", said)
    assert "/modes" in said and "/ubmoe\n" not in said
    assert re.search(r"^ *weights +0\.01 GB$", said, re.MULTILINE) and "joining" not in said


def test_lora_and_masked_stages_are_estimated_too(tiny_path):
    stages = (
        "bi.stages=[{objective: mntp, train: [ffn], dataset: tiny, max_tokens: 64, lora: {rank: 4},"
        " per_device_train_batch_size: 8, mask_token: the}]"
    )
    said = dry_run.train_bi(load_config(None, [stages, "model.device=cpu"]))
    assert "stage 0 (mntp)" in said and "activations of 8 x 64 tokens" in said
    assert "trains adapters 24,576" in said  # 4 layers x 3 matrices x rank 4 x (128 + 384)
