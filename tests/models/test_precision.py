"""bfloat16 is used where it is asked for or pays, and changes little."""

import logging

import pytest
import torch
from builders import random_model

from ubmoe.config import DependenceSection
from ubmoe.dependence.measure import measure
from ubmoe.models import precision
from ubmoe.models.precision import autocast, uses_bfloat16, weights_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("flag", precision.CPU_FLAGS)
def test_auto_is_what_the_processor_has(monkeypatch, flag):
    monkeypatch.undo()  # the tests' own reference mode
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {flag: has})
        assert uses_bfloat16("auto", CPU) is has
        assert uses_bfloat16(True, CPU) and not uses_bfloat16(False, CPU)
        assert weights_dtype("auto", CPU) == (torch.bfloat16 if has else torch.float32)
        assert weights_dtype("bfloat16", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert not uses_bfloat16("auto", CPU) and not uses_bfloat16("auto", torch.device("mps"))


def test_autocast_says_what_auto_chose(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    product = torch.ones(2, 2)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    precision._say_once.cache_clear()
    for _ in range(3):
        with autocast("auto", CPU):
            assert (product @ product).dtype == torch.bfloat16
    assert caplog.text.count("bfloat16 autocast, which cpu has in hardware") == 1
    with autocast(False, CPU):
        assert (product @ product).dtype == torch.float32


def test_dependence_under_autocast_is_near_that_of_float32_and_its_sums_are_whole(tmp_path):
    """The flow is rounded, the sums are not: shares still sum to one to float32's precision."""
    model = random_model("llama")
    texts = [list(range(3, 60)), list(range(40, 90)), [5]]
    actual = {}
    for bf16 in (False, True):
        settings = DependenceSection(bf16=bf16)
        actual[bf16] = measure(model, texts, settings, tmp_path / str(bf16))["overall"]
        assert sum(actual[bf16].values()) == pytest.approx(100, abs=1e-4)
    assert actual[True] != actual[False]
    assert actual[True] == pytest.approx(actual[False], abs=1.0)
