import pytest

from ubmoe.config import ScanSection
from ubmoe.scan.patterns import patterns


def test_every_mask_stands_there_once_by_its_first_name():
    found = {each.name: each.both for each in patterns(ScanSection(every=3), 3)}
    no, yes = False, True
    assert found == {
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
    asked = patterns(ScanSection(patterns=[kind]), 2)
    assert [each.name for each in asked] == ["none", "all", *names]


def test_smollm2_has_69_patterns():
    assert len(patterns(ScanSection(), 30)) == 2 + 29 + 29 + 9
