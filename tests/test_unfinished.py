"""Arrays come back under their own key alone, and what is complete stays on Ctrl-C."""

import numpy as np
import pytest

from ubmoe.config import UserError
from ubmoe.unfinished import Unfinished

KEY = {"model": "a", "edges": (1, 2)}


@pytest.fixture
def path(tmp_path):
    Unfinished(tmp_path / "some.npz", KEY).save(first=np.arange(3), done=4)
    return tmp_path / "some.npz"


def test_what_was_written_is_read(path):
    first, done = Unfinished(path, KEY).load("first", "done")
    assert first.tolist() == [0, 1, 2] and int(done) == 4
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "names", "said"),
    [
        ({**KEY, "model": "b"}, ["first"], "of another run (other model); starting afresh"),
        (KEY, ["second"], "not whole, or of an older version; starting afresh"),
    ],
)
def test_what_is_of_another_run_or_form_is_not_taken(path, caplog, key, names, said):
    caplog.set_level("INFO", logger="ubmoe")
    assert Unfinished(path, key).load(*names) is None
    assert said in caplog.text


@pytest.mark.parametrize("size", [0, 1, 100])
def test_half_a_file_is_not_taken(path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert Unfinished(path, KEY).load("first") is None


@pytest.mark.parametrize(
    "other", [np.arange(1, 4), np.arange(3.0), np.arange(1), np.arange(3)[None], np.array(10**9)]
)
def test_other_numbers_shapes_or_dtypes_are_not_taken(path, other, caplog):
    caplog.set_level("INFO", logger="ubmoe")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **arrays | {"first": other})
    assert Unfinished(path, KEY).load("first", "done") is None
    assert "not whole, or of an older version; starting afresh" in caplog.text


def test_nothing_is_read_where_nothing_was_written(tmp_path, caplog):
    assert Unfinished(tmp_path / "none.npz", KEY).load("first") is None
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
        Unfinished(path if kind == "link" else theirs, KEY).save(first=np.arange(3))
    assert theirs.read_bytes() == before


def test_what_is_complete_is_saved_on_an_interrupt_alone(path):
    unfinished = Unfinished(path, KEY)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), unfinished.kept_on_interrupt(lambda: unfinished.save(done=5)):
            raise error
        kept = unfinished.load("done")
        assert kept is not None and int(kept[0]) == (5 if error is KeyboardInterrupt else 4)


def test_without_a_path_nothing_is_written_or_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unfinished = Unfinished(None, KEY)
    unfinished.save(done=5)
    assert unfinished.load("done") is None and not list(tmp_path.iterdir())
