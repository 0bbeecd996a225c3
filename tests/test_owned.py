"""Only what a mark names, or what says so itself, is ever replaced or removed."""

import json

import pytest
import yaml

from ubmoe import owned
from ubmoe.config import UserError, dump_config, load_config
from ubmoe.files import replace_directory


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_a_mark_names_is_removed_and_nothing_beside_it(tmp_path):
    folder = tmp_path / "model"
    owned.claim(folder, "*")
    (folder / "1_Pooling").mkdir()
    for name in ("weights", "1_Pooling/config.json"):
        (folder / name).write_text("1")
    owned.name_all(folder)
    assert owned.claimed(folder) == ["1_Pooling", "1_Pooling/config.json", "weights"]
    for name in ("notes.txt", "1_Pooling/notes.txt", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name} is in the way"):
            owned.remove(folder)
        assert files(folder) == {".ubmoe", "weights", "1_Pooling/config.json", name}
        (folder / name).unlink()
    owned.remove(folder)
    assert not folder.exists()


def test_a_link_is_neither_followed_nor_removed(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "model"
    owned.claim(elsewhere, "*")
    (elsewhere / "a").write_text("mine")
    folder.symlink_to(elsewhere)
    for act in (owned.remove, owned.claim, owned.check_within):
        with pytest.raises(UserError, match="model is in the way"):
            act(folder)
    folder.unlink()
    owned.claim(folder, "*")
    (folder / "a").symlink_to(elsewhere / "a")
    with pytest.raises(UserError, match="model/a is in the way"):
        owned.remove(folder)
    (folder / "a").unlink()
    (folder / ".ubmoe").unlink()
    (folder / ".ubmoe").symlink_to(elsewhere / ".ubmoe")
    with pytest.raises(UserError, match="model is in the way"):
        owned.remove(folder)
    assert (elsewhere / "a").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "*", f"{owned.TITLE} ", f"*\n{owned.TITLE}\n*", "\xff"])
def test_half_a_mark_or_another_file_so_called_is_none(tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".ubmoe").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="mine is in the way"):
        owned.remove(tmp_path / "mine")
    assert files(tmp_path / "mine") == {".ubmoe"}


def test_a_name_is_claimed_where_nothing_of_somebodys_has_it(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    owned.claim(tmp_path, "stage.json")  # beside what is theirs
    (tmp_path / "stage.json").write_text("1")
    owned.claim(tmp_path, "stage.json", "checkpoint-2")
    assert owned.claimed(tmp_path) == ["stage.json", "checkpoint-2"]
    for name in ("mine.txt", "*"):
        with pytest.raises(UserError, match="mine.txt is in the way"):
            owned.claim(tmp_path, name)
    owned.claim(tmp_path / "checkpoint-2", "*")
    (tmp_path / "checkpoint-2" / "a").write_text("1")
    owned.claim(tmp_path / "copy", "*")  # with a mark, as a copy has one, and not named here
    (tmp_path / "copy" / "a").write_text("mine")
    owned.check_within(tmp_path, "checkpoint-*")
    with pytest.raises(UserError, match="copy is in the way"):
        owned.check_within(tmp_path, "c*")
    assert [path.name for path in owned.strangers(tmp_path)] == ["copy", "mine.txt"]


def test_a_folder_gives_way_to_a_whole_one_if_it_is_ours(tmp_path):
    def write(folder):
        (folder / "a").write_text("new")

    theirs = [".bi.new", ".bi.old"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("mine")
    (tmp_path / "bi").mkdir()
    replace_directory(tmp_path / "bi", write)  # an empty one is nothing to lose
    replace_directory(tmp_path / "bi", write)
    (tmp_path / "bi" / "b").write_text("mine")
    with pytest.raises(UserError, match="bi/b is in the way"):
        replace_directory(tmp_path / "bi", write)
    assert files(tmp_path) == {"bi/.ubmoe", "bi/a", "bi/b", *(f"{name}/a" for name in theirs)}


RESULT = {"config": {}, "environment": {}, "seconds": 1.0, "sts": {}}


@pytest.mark.parametrize(
    ("name", "text", "ours"),
    [
        ("sts.json", json.dumps(RESULT), True),
        ("prefetch.json", '{"fetched": []}', True),
        ("a.yaml", dump_config(load_config()), True),
        ("a.png", "\x89PNG tEXtCreator\0ubmoe", True),
        ("sts.json", '{"config": 1}', False),
        ("sts.json", json.dumps([RESULT]), False),
        *(("sts.json", text, False) for text in ("", "null", "[" * 100_000, "\xff")),
        ("a.yaml", "model: tiny", False),
        *(("a.yaml", text, False) for text in ("", "- a", "[" * 2_000, "a: [", "\xff")),
        ("a.png", "\x89PNG tEXtSoftware\0Matplotlib", False),
        ("a.txt", json.dumps(RESULT), False),
        ("a", json.dumps(RESULT), False),
    ],
)
def test_a_file_of_ours_says_so(tmp_path, name, text, ours):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert owned.is_ours(tmp_path / name) == ours
    if ours:
        owned.check(tmp_path / name)
    else:
        with pytest.raises(UserError, match=f"{name} is in the way"):
            owned.check(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="link is in the way"):
        owned.check(tmp_path / "link")


def test_a_resolved_config_is_known_by_keys_that_it_has():
    assert yaml.safe_load(dump_config(load_config())).keys() >= owned.RESOLVED
