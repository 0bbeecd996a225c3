import pytest

from ubmoe.config import ScanSection, UserError
from ubmoe.interventions.patterns import patterns


def test_every_mask_stands_there_once_by_its_first_name():
    actual = {
        pattern.name: pattern.both for pattern in patterns(ScanSection(every=3), 3, keep_sink=False)
    }
    no, yes = False, True
    assert actual == {
        "none": (no, no, no),
        "all": (yes, yes, yes),
        "from 1": (no, yes, yes),
        "from 2": (no, no, yes),
        "to 0": (yes, no, no),
        "to 1": (yes, yes, no),
        "every 2 from 0": (yes, no, yes),
        "every 2 from 1": (no, yes, no),
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [("only", ["[0]", "[1]"]), ("from", ["from 1"]), ("every", [])],
)
def test_kinds_are_asked_for_one_by_one(kind, names):
    asked = patterns(ScanSection(patterns=[kind]), 2, keep_sink=False)
    assert [item.name for item in asked] == ["none", "all", *names]


def test_smollm2_has_69_patterns():
    assert len(patterns(ScanSection(), 30, keep_sink=False)) == 2 + 29 + 29 + 9


def test_layers_of_ones_own_stand_beside_them():
    settings = ScanSection(patterns=[], layers=[{"from": 2}, [0, 1, 2]], first_token=["kept"])
    asked = patterns(settings, 3, keep_sink=False)
    assert [(item.name, item.first_token) for item in asked] == [
        ("none", "kept"),
        ("all", "kept"),
        ("from 2", "kept"),
    ]
    with pytest.raises(UserError, match="scan.layers: got"):
        patterns(ScanSection(layers=[[7]]), 3, keep_sink=False)
