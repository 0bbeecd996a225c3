"""What Python says of a value of another kind is no message to whoever wrote the file."""

import json
import operator

import pytest

from ubmoe.config import error_reason

OF_PYTHON = {
    "list index": lambda: [1]["a"],
    "text index": lambda: "abc"["a"],
    "no such place": lambda: [][0],
    "number": lambda: float([]),
    "size": lambda: int({}),
    "member": lambda: "a" in 5,
    "attribute": lambda: None.items(),
    "call": lambda: (5)(),
    "loop": lambda: list(5),
    "unpacked": lambda: (lambda a, b: a)(*7),
    "two of three": lambda: exec("a, b = 1, 2, 3"),
    "two of one": lambda: exec("a, b = [1]"),
    "two of a number": lambda: exec("a, b = 5"),
    "sum": lambda: "a" + 5,
    "other sum": lambda: 5 + "a",
    "order": lambda: sorted([1, "a"]),
    "key": lambda: {[]: 1},
    "object": lambda: dict([1]),
    "pairs": lambda: dict(["abc"]),
    "text of JSON": lambda: json.loads([]),
    "joined": lambda: "".join([1]),
    "place": lambda: operator.index("a"),
    "range": lambda: range("a"),
}


@pytest.mark.parametrize("case", OF_PYTHON)
def test_no_message_names_a_python_type(case):
    with pytest.raises((TypeError, ValueError, AttributeError, IndexError)) as caught:
        OF_PYTHON[case]()
    expected = "something in it is missing or of an unexpected kind"
    assert error_reason(caught.value) == expected


@pytest.mark.parametrize(
    "said",
    [
        "Expecting value: line 1 column 1 (char 0)",
        "Is a directory",
        "it was trained on other weights of the same shape",
        "Error while deserializing header: header too large",
        "expected a list of messages",
        "Found missing adapter keys while loading the checkpoint",
        "size mismatch for weight: copying a param with shape torch.Size([2]) from checkpoint",
    ],
)
def test_what_is_said_to_people_stays(said):
    assert error_reason(ValueError(said)) == said
