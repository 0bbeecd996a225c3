"""Imports, whose order is a contract in pyproject.toml that runs here, too; and where tests are."""

import re
import subprocess
import sys
from pathlib import Path

import grimp
from builders import ROOT

FROM_THE_OUTSIDE = {  # tests of no one module
    *("test_architecture", "test_scripts", "test_pages", "config/test_shipped"),
    *("test_bad_inputs", "test_any_input", "test_surroundings", "test_hostile", "test_gpu"),
    *("config/test_tasks", "dry_run/test_cards", "test_api", "test_wheel", "test_two_processes"),
}


def test_imports_run_one_way_and_in_no_circle():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout


def test_the_contracts_see_lazy_imports(tmp_path, monkeypatch):
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "__init__.py").write_text("")
    (tmp_path / "lazy" / "a.py").write_text("def f():\n    from lazy import b\n    return b\n")
    (tmp_path / "lazy" / "b.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    graph = grimp.build_graph("lazy", cache_dir=None)
    assert graph.find_modules_directly_imported_by("lazy.a") == {"lazy.b"}


LIGHT = ["config", "cli", "files", "report.tables", "report.figures"]
LIGHT += [f"results.{name}" for name in ("__main__", "plan", "study", "records")]
LIGHT = [f"ubmoe.{name}" for name in LIGHT]
COMPARING = ("paper", "pages", "tradeoff", "claim", "sink", "paired")
LIGHT += [f"studies.compare.{name}" for name in COMPARING]


def test_what_reads_records_loads_without_torch():
    code = f"import sys\nfor name in {LIGHT}:\n    __import__(name)\n"
    code += "    assert 'torch' not in sys.modules, name"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tests_mirror_the_package():
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        if name not in FROM_THE_OUTSIDE:
            home = ROOT if name.startswith("studies/") else ROOT / "ubmoe"
            module = home / name.replace("test_", "")
            assert module.with_suffix(".py").is_file() or module.is_dir(), f"{name} tests no module"


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        imported = re.findall(r"^(?:from|import) (test_\w+|conftest|tests)", path.read_text(), re.M)
        assert not imported, (path, imported)


def test_every_package_has_a_docstring():
    packages = [path for top in ("ubmoe", "studies") for path in (ROOT / top).rglob("__init__.py")]
    silent = [path for path in packages if not path.read_text().startswith('"""')]
    assert not silent
