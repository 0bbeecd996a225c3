"""What was read is known by its contents, wherever it lies."""

from ubmoe.config import load_config
from ubmoe.data.inputs import inputs


def test_a_folder_of_data_is_told_by_its_files(tmp_path):
    def read(folder):
        return inputs(load_config(None, [f"probing.data={folder}"]), "probing")["probing.data"]

    for folder in ("one", "other"):
        (tmp_path / folder / "task").mkdir(parents=True)
        (tmp_path / folder / "task" / "train.tsv").write_text("a word\n")
    before = read(tmp_path / "one")
    assert before == read(tmp_path / "other")
    (tmp_path / "other" / "task" / "train.tsv").write_text("another\n")
    assert read(tmp_path / "one") == before != read(tmp_path / "other")
    assert read(tmp_path / "none") is None
    (tmp_path / "one" / ".git").mkdir()
    (tmp_path / "one" / ".git" / "index").write_text("nobody's data")
    assert read(tmp_path / "one") == before
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "task").symlink_to(tmp_path / "one" / "task")
    assert read(tmp_path / "linked") == before
