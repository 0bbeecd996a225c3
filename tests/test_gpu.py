"""Checks that need a GPU: the scripts, dependence and `modes` there, against a processor.

Not part of an ordinary run: every test is skipped without CUDA.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_model, run
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ubmoe.bidirectional import is_bidirectional
from ubmoe.dependence.kernels import Texts, parts_of
from ubmoe.dependence.recorder import dependence_of, observed
from ubmoe.dependence.shares import row_shares

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # of 32 numbers
SENTENCES = ["The dog sleeps.", "Anna eats bread.", "The old king of the sea saw a lamp."]


# --- dependence -----------------------------------------------------------------------------------


@contextmanager
def without_waiting(model: Any) -> Iterator[None]:
    """Any wait of the host inside the model's forward is an error."""

    def begin(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def end(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    hooks = [
        model.base_model.register_forward_pre_hook(begin),
        model.base_model.register_forward_hook(end, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Five texts, padded on the right."""
    ids = torch.randint(97, (5, 90), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([90, 70, 33, 2, 1])
    return ids, (torch.arange(90) < lengths[:, None]).long()


def measured(model: Any, device: str) -> torch.Tensor:
    ids, mask = (item.to(device) for item in batch())
    with observed(model) as recorder:
        if device == DEVICE:
            with without_waiting(model):
                return dependence_of(model, recorder, ids, mask)
        return dependence_of(model, recorder, ids, mask)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma2", "gemma3_text"])
def test_dependence_is_the_processors(family, bidirectional):
    model = random_model(family, **HEADS, head_dim=32)
    model.config.is_causal = not bidirectional
    expected = measured(model, "cpu")
    torch.testing.assert_close(measured(model.to(DEVICE), DEVICE), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_dependence_in_bfloat16_is_the_processors_but_for_its_rounding(family):
    """Of the same rounded weights; the flow between layers is rounded, and its order is a kernel's.

    The weights are drawn ten times as large as a model's, so that attention has preferences.
    """
    model = random_model(family, **HEADS).bfloat16()
    expected = measured(model, "cpu")
    actual = measured(model.to(DEVICE), DEVICE)
    torch.testing.assert_close(actual[:, 0], expected[:, 0], atol=2e-3, rtol=0)  # no flow before it
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
def test_kernels_give_what_blocks_of_rows_give(dtype, size):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 3000, size, device=DEVICE).to(dtype) for h in (8, 2, 2))
    texts = Texts(torch.ones(1, 3000, dtype=torch.long, device=DEVICE))
    scaling = 2 * size**-0.5
    expected = row_shares(query, key, scaling)
    for bidirectional in (False, True):
        parts = parts_of(query, key, value, scaling, texts, bidirectional)
        torch.testing.assert_close(parts.shares(texts), expected, atol=1e-5, rtol=0)
        flow = torch.nn.functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            is_causal=not bidirectional,
            scale=scaling,
            enable_gqa=True,
        )
        rounding = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(parts.flow(value).float(), flow, atol=rounding, rtol=rounding)


def layers(hidden: int, inner: int, heads: int, groups: int) -> Any:
    """Two layers of a model's shape in bfloat16, with a small vocabulary."""
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=1024,
        max_position_embeddings=32768,
    )
    model: Any = Qwen2ForCausalLM(config)
    return model.to(DEVICE, torch.bfloat16).eval()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(896, 4864, 14, 2), (3584, 18944, 28, 4)], ids=["0.5B", "7B"])
def test_a_text_of_the_whole_context_takes_less_memory_than_one_heads_map(shape):
    model, ids = layers(*shape), torch.randint(1024, (1, 32768), device=DEVICE)
    mask = torch.ones_like(ids)
    with observed(model) as recorder:
        recorded = peak_of(lambda: dependence_of(model, recorder, ids, mask))
    with torch.no_grad():
        plain = peak_of(lambda: model.base_model(input_ids=ids, use_cache=False))
    assert recorded - plain < 4 * 32768**2


def peak_of(call: Any) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


# --- the three scripts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2 under the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("gpu") / "base"
    weights = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(tiny_path, folder, ignore=weights)
    config = json.loads((tiny_path / "config.json").read_text())
    same = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")
    sizes = {name: config.get(name) for name in same} | {"max_position_embeddings": 1024}
    random_model("qwen2", **HEADS, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> tuple[Path, dict[str, Any]]:
    """The output directory of all three in bfloat16 with activation checkpointing, and results."""
    output, results = base.parent / "run", {}
    keys = [f"model.name={base}", f"model.device={DEVICE}", f"output_dir={output}"]
    keys += ["dependence.max_texts=20", "dependence.bf16=true", "evaluation.limit=5"]
    for section in ("bi.stages.0", "ubmoe"):
        keys += [f"{section}.bf16=true", f"{section}.activation_checkpointing=true"]
        keys += [f"{section}.max_steps=3", f"{section}.per_device_train_batch_size=8"]
        keys += [f"{section}.logging_steps=1"]
    keys += ["ubmoe.export=[mixture, modes]", "ubmoe.held_out=20"]
    files = ("dependence.json", "sts.json", "generation.json")
    scripts = ("calculate_dp.py", "train_bi.py", "train_ubmoe.py")
    for script, file in zip(scripts, files, strict=True):
        code, _, errors = run(*keys, script=script)
        assert code == 0, errors
        results[file.removesuffix(".json")] = json.loads((output / file).read_text())
    return output, results


@pytest.mark.slow
def test_dependence_of_the_script_is_the_processors(base, trained, tmp_path):
    keys = [f"model.name={base}", "model.device=cpu", f"output_dir={tmp_path}/run"]
    code, _, errors = run(*keys, "dependence.max_texts=20", "dependence.bf16=false")
    assert code == 0, errors
    expected = json.loads((tmp_path / "run" / "dependence.json").read_text())["dependence"]
    actual = trained[1]["dependence"]["dependence"]["overall"]
    assert actual == pytest.approx(expected["overall"], abs=0.5)  # percent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dependence", "sts", "generation"])
def test_the_scripts_ran_on_the_gpu(trained, name):
    result = trained[1][name]
    assert result["environment"]["device"].startswith(DEVICE)
    weights = sum(path.stat().st_size for path in trained[0].parent.glob("base/*.safetensors"))
    assert result["peak_memory_bytes"] > weights


@pytest.mark.slow
def test_modes_are_exactly_the_base_and_exactly_the_encoder(base, trained):
    output, _ = trained
    ids = torch.randint(97, (2, 40), device=DEVICE)
    own, both = (
        AutoModelForCausalLM.from_pretrained(path).to(DEVICE) for path in (base, output / "modes")
    )
    assert not is_bidirectional(both.config)
    with torch.no_grad():
        assert torch.equal(own(ids).logits, both(ids).logits)
    vectors, expected = (
        SentenceTransformer(str(output / name), device=DEVICE).encode(SENTENCES)
        for name in ("modes", "bi")
    )
    assert abs(vectors - expected).max() < 1e-5
