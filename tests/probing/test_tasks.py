"""The files' quirks: words by index, by form, or not at all, and complaints that name the line."""

import pytest

from ubmoe.config import UserError
from ubmoe.probing.files import READERS
from ubmoe.probing.items import FEATURES, lemma, text
from ubmoe.probing.tasks import read_tasks
from ubmoe.probing.tiny import TINY

NORMS = [f"{item}.M" for item in ("Vision", "Hearing", "Olfaction", "Interoception", "Taste")]
NORMS += [f"{item}.M" for item in ("Touch", "Foot_leg", "Mouth_throat", "Torso", "Head")]
NORMS += ["Hand_arm.M"]


@pytest.fixture
def folder(tmp_path):
    files = {
        f"Task1_x/{name}/{split}.txt": "the dog chased the stone,1\nthe cat saw the bread,0\n"
        for name in FEATURES
        for split in ("train", "test")
    }
    files |= {
        "Task2_x/telicity_train.txt": "0\tHe ate and he ate .\tate\t4\t1\n"
        "1\tHe ate and left .\tleft\t40\t0\n2\tHe ran .\tate\t1\t0\n",
        "Task2_x/duration_train.txt": "0\tHe slept .\tslept\t1\t1\n",
        "Task3_x/c.txt": "i\tTARGET\tPOS\tINDEX\tTEXT\tAVG\n1\tcook\tV\t2\tit is cooked .\t5.8\n",
        "Task4_x/n.txt": f"word,sentence,{','.join(NORMS)}\n"
        f"break,He broke it.,{','.join('1' * 11)}\n"
        f'lap,"So, she lapped, twice.",{",".join("2" * 11)}\n'
        f"act,A comedic act.,{','.join('3' * 11)}\n"
        f"run,He sat.,{','.join('4' * 11)}\n",
        "Task5_x/test.data.txt": "defeat\tN\t1-2\tA defeat .\tThe only defeat .\n",
        "Task5_x/test.gold.txt": "T\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def by_name(tasks):
    return {task.name: task for task in tasks}


def said(task):
    return [tuple(text(word) for word in words) for words in task.words]


def test_every_task_is_read_with_its_words(folder):
    tasks = by_name(read_tasks(str(folder), list(READERS)))
    assert len(tasks) == 4 * 5 + 2 + 3
    objects = tasks["object_animacy@3"]
    assert said(objects) == [("chased",), ("saw",)] * 2
    assert objects.groups == ["stone", "bread"] * 2 and objects.targets.tolist() == [1, 0, 1, 0]
    assert objects.test.tolist() == [False, False, True, True]
    assert said(tasks["concreteness"]) == [("cooked",)]
    assert tasks["concreteness"].targets.tolist() == [[5.8]]
    assert said(tasks["word in context"]) == [("defeat", "defeat")]
    assert tasks["word in context"].words[0][1].start == len("The only ")


def test_a_wrong_index_falls_back_to_the_first_occurrence_and_a_lost_word_is_listed(folder):
    telicity = by_name(read_tasks(str(folder), ["aspect"]))["telicity"]
    assert [words[0].start for words in telicity.words] == [
        len("He ate and he "),
        len("He ate and "),
    ]
    assert len(telicity.unplaced) == 1 and "telicity_train.txt:3: ate" in telicity.unplaced[0]


def test_a_word_is_found_by_its_form(folder):
    [norms] = read_tasks(str(folder), ["sensorimotor"])
    assert said(norms) == [("broke",), ("lapped",), ("act",)]
    assert norms.targets.shape == (3, 11) and "n.txt:5: run" in norms.unplaced[0]


@pytest.mark.parametrize(
    ("file", "line", "kind", "expected"),
    [
        ("Task1_x/verb_dynamic/train.txt", "the dog,1", "context", "train.txt:3: expected five"),
        ("Task2_x/telicity_train.txt", "0\tHe ate .", "aspect", "telicity_train.txt:4: got 2 col"),
        ("Task2_x/duration_train.txt", "1\tHe slept\tslept\t1\t7", "aspect", "expected 0 or 1"),
        ("Task3_x/c.txt", "2\tham\tN\t9\ta ham .\t5", "concreteness", "c.txt:3: word 9 of a sent"),
        ("Task3_x/c.txt", "2\tham\tN\t1\ta ham .\tx", "concreteness", "c.txt:3: got 'x'"),
        ("Task4_x/n.txt", "act,An act.,1", "sensorimotor", "n.txt:6: got 3 columns"),
        ("Task3_x/c.txt", "2\tham\tN\t1\ta ham .\tnan", "concreteness", "c.txt:3: got 'nan'"),
        ("Task5_x/test.gold.txt", "F", "wic", "2 gold labels for 1 pairs"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(folder, file, line, kind, expected):
    path = folder / file
    test_a_bad_file_is_refused(folder, file, f"{path.read_text()}{line}\n", kind, expected)


@pytest.mark.parametrize(
    ("file", "content", "kind", "expected"),
    [
        ("Task4_x/n.txt", "", "sensorimotor", "n.txt: empty; expected rows"),
        ("Task4_x/n.txt", "sentence,Vision.M\nx,1\n", "sensorimotor", "n.txt:1: no column Foot"),
        ("Task3_x/c.txt", "1\tham\tN\t1\ta ham .\t5\n", "concreteness", "expected a header"),
        ("Task2_x/duration_train.txt", "1\tna\xefve\tx\t0\t1", "aspect", "not UTF-8"),
    ],
)
def test_a_bad_file_is_refused(folder, file, content, kind, expected):
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=expected):
        read_tasks(str(folder), [kind])


def test_a_verb_without_a_letter_is_none(folder):
    with (folder / "Task2_x/duration_train.txt").open("a") as stream:
        stream.write("1\tHe said , no .\t,\t2\t1\n2\tShe slept .\t3935_2\t1\t1\n")
    duration = by_name(read_tasks(str(folder), ["aspect"]))["duration"]
    assert said(duration) == [("slept",)]
    assert [item.rpartition(": ")[2] for item in duration.unplaced] == [",", "3935_2"]


def test_inflections_share_a_lemma_and_other_words_do_not():
    for forms in ("is was were be", "went goes go", "watched watches watch", "made makes making"):
        assert len({lemma(form) for form in forms.split()}) == 1
    assert len({lemma(form) for form in ["watch", "wash", "be", "go", "make"]}) == 5


def test_a_missing_folder_or_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder; expected the probing data, or tiny"):
        read_tasks(str(tmp_path / "none"), ["wic"])
    with pytest.raises(UserError, match="has no Task5"):
        read_tasks(str(tmp_path), ["wic"])


def test_the_embedded_language_has_every_task():
    tasks = by_name(read_tasks("tiny", list(TINY)))
    assert len(tasks) == 4 * 5 + 2 + 3
    for task in tasks.values():
        assert len(task.words) == len(task.targets) == len(task.groups) >= 300
        if task.binary:
            assert 0.25 < task.targets.mean() < 0.75
        if task.test is not None:
            groups = {split: set() for split in (False, True)}
            for group, split in zip(task.groups, task.test, strict=True):
                groups[bool(split)].add(group)
            assert not groups[True] & groups[False]
    assert read_tasks("tiny", ["wic"])[0].words == tasks["word in context"].words
