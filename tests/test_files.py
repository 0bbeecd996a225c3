"""Files that are written whole or not at all."""

import json

import pytest

from ubmoe import files


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def disk_full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device", str(temporary))

    with pytest.raises(OSError, match="No space"):
        files.replace(path, disk_full)
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_full_disk_names_the_file_and_not_the_one_beside_it(tmp_path):
    def disk_full(_):
        raise OSError(28, "No space left on device")  # as write says it

    for replace in (files.replace, files.replace_directory):
        with pytest.raises(OSError, match="No space") as caught:
            replace(tmp_path / "a", disk_full)
        assert caught.value.filename == str(tmp_path / "a")


def test_files_that_belong_together_give_way_together(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("old")
    second.mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace_all({first: lambda p: p.write_text("new"), second: lambda p: None})
    assert first.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
