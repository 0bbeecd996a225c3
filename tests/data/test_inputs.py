"""What was read is known by its contents, wherever it lies."""

from ubmoe.config import load_config
from ubmoe.data.inputs import inputs


def test_a_folder_of_data_is_identified_by_its_files(tmp_path):
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


def test_a_task_is_identified_by_the_data_that_it_names(tmp_path):
    data, task = tmp_path / "data", tmp_path / "task.yaml"
    (data / "exams").mkdir(parents=True)
    (data / "exams" / "law.csv").write_text("a question\n")
    (data / "other.csv").write_text("of another task\n")
    task.write_text("dataset_path: exams\n")
    keys = [f"evaluation.generation=[{task}]", f"evaluation.data={data}"]

    def read():
        return inputs(load_config(None, keys), "evaluation")["evaluation.generation"]

    before = read()
    for unread in ("other.csv", "exams/.backup"):
        (data / unread).write_text("changed\n")
        assert read() == before
    (data / "exams" / "law.csv").write_text("another\n")
    assert read() != before
