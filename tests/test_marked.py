"""Arrays come back under their own mark alone."""

import numpy as np
import pytest

from ubmoe import marked
from ubmoe.config import UserError

MARK = {"model": "a", "edges": (1, 2)}


@pytest.fixture
def path(tmp_path):
    marked.write(tmp_path / "some.npz", MARK, first=np.arange(3), done=4)
    return tmp_path / "some.npz"


def test_what_was_written_is_read(path):
    first, done = marked.read(path, MARK, "first", "done")
    assert first.tolist() == [0, 1, 2] and int(done) == 4
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("mark", "names", "said"),
    [
        ({**MARK, "model": "b"}, ["first"], "of another run (other model); starting afresh"),
        (MARK, ["second"], "not whole, or of an older version; starting afresh"),
    ],
)
def test_what_is_of_another_run_or_form_is_not_taken(path, caplog, mark, names, said):
    caplog.set_level("INFO", logger="ubmoe")
    assert marked.read(path, mark, *names) is None
    assert said in caplog.text


@pytest.mark.parametrize("size", [0, 1, 100])
def test_half_a_file_is_not_taken(path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert marked.read(path, MARK, "first") is None


@pytest.mark.parametrize(
    "other", [np.arange(1, 4), np.arange(3.0), np.arange(1), np.arange(3)[None], np.array(10**9)]
)
def test_other_numbers_shapes_or_dtypes_are_not_taken(path, other, caplog):
    caplog.set_level("INFO", logger="ubmoe")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | {"first": other})
    assert marked.read(path, MARK, "first", "done") is None
    assert "not whole, or of an older version; starting afresh" in caplog.text


def test_nothing_is_read_where_nothing_was_written(tmp_path, caplog):
    assert marked.read(tmp_path / "none.npz", MARK, "first") is None
    assert not caplog.text


@pytest.mark.parametrize("kind", ["array", "link"])
def test_an_array_of_somebody_elses_does_not_give_way(path, kind):
    theirs = path.with_name("theirs.npz")
    np.savez(theirs, mine=np.arange(3))
    before = theirs.read_bytes()
    if kind == "link":
        path.unlink()
        path.symlink_to(theirs)
    with pytest.raises(UserError, match="is in the way"):
        marked.write(path if kind == "link" else theirs, MARK, first=np.arange(3))
    assert theirs.read_bytes() == before
