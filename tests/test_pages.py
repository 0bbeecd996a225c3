"""What README.md and the pages in docs/ and studies/ show works, and the README stays a door."""

import importlib
import re
from pathlib import Path

import pytest
from builders import ROOT, check_commands, commands

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "studies").glob("*/*.md"))
MOST_LINES, SNIPPET_BEFORE, MOST_WORDS = 220, 90, 30
README = (ROOT / "README.md").read_text()


def named(path):
    return path.relative_to(ROOT).as_posix()


def anchors(page):
    """As a forge makes them of the headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_and_every_picture_is_linked():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    }
    assert {path.resolve() for path in PAGES[1:]} <= linked
    pictures = [*(ROOT / "image").iterdir(), *(ROOT / "studies").glob("*/figures/*")]
    assert {path.resolve() for path in pictures} <= linked


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_shown_is_one_that_works(page):
    check_commands(page.read_text())


def test_the_readme_shows_the_scripts():
    shown = " ".join(commands(README))
    assert all(script in shown for script in ("calculate_dp.py", "train_bi.py", "train_ubmoe.py"))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_snippets_are_python_and_import_what_is_there(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(code, page.name, "exec")
        for module, names in re.findall(r"^from (ubmoe\S*) import (.*)$", code, re.M):
            actual = importlib.import_module(module)
            assert all(hasattr(actual, name.strip()) for name in names.split(",")), code


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    every = "".join(page.read_text() for page in PAGES)
    assert {"demo", "test"} <= set(re.findall(r"(?:^ +|`)make ([\w.-]+)", every, re.M)) <= targets


def test_the_readme_is_a_door():
    lines = README.splitlines()
    assert len(lines) <= MOST_LINES
    snippet = next(n for n, line in enumerate(lines, 1) if "SentenceTransformer(" in line)
    assert snippet < SNIPPET_BEFORE


def sentences(text):
    """Prose alone: no code, tables, trees, pictures or citations."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    kept = [line for line in text.splitlines() if not re.match(r"    |\||!|#|<", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d\. )", "\n".join(kept))
    return [
        item for part in paragraphs for item in re.split(r"(?<=[.?!:;])\s+", part) if item.strip()
    ]


def test_sentences_of_the_readme_are_short():
    long = [sentence for sentence in sentences(README) if len(sentence.split()) > MOST_WORDS]
    assert not long, long


def test_the_folders_that_the_readme_shows_are_there():
    package, studies = (
        README.split("\n    ubmoe/\n")[1].split("\n    docs/")[0].split("    studies/")
    )
    rooms = {path.parent.name for path in (ROOT / "ubmoe").glob("*/__init__.py")}
    assert set(re.findall(r"^ {6}(\w+)/ ", package, re.M)) == rooms
    folders = {path.parent.name for path in (ROOT / "studies").glob("*/*.*")}
    assert set(re.findall(r"([\w.-]+)/", studies)) == folders - {"__pycache__"}
    assert all(
        Path(ROOT / "ubmoe" / name).is_file()
        for name in re.findall(r"(\w+\.py)\b", README.split("## The tree")[1].split("```")[0])
        if not (ROOT / name).is_file()
    )
