"""The repository's own rules: sizes, the direction of imports, what is imported where, and what costs nothing."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "burnish"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LINES = 400

LEVELS = (
    ("cli",),
    ("compat",),
    ("pipeline", "summary"),
    ("plan",),
    ("train", "evaluate", "export", "serve"),
    ("skeleton", "keys"),
    ("model", "adapt", "load", "data", "toml"),
    ("config", "runs", "parallel"),
    ("errors", "kernels", "words"),
)
"""A unit (a folder or file of burnish) imports from the levels below its own alone: never up, never sideways."""
SIDEWAYS = {("pipeline", "summary")}
"""Two halves of one screen."""


def unit(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(number for number, units in enumerate(LEVELS) if name in units)


def imports(source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a.b import c` gives a.b.c."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the direction"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def wrong_directions(name: str, source: str) -> list[str]:
    """Imports of a unit's source that point up or sideways."""
    wrong = []
    for line, imported in imports(source):
        parts = imported.split(".")
        if parts[0] != "burnish" or len(parts) < 2 or parts[1] == name or (name, parts[1]) in SIDEWAYS:
            continue
        if level(parts[1]) <= level(name):
            wrong.append(f"line {line}: {name} imports {imported}")
    return wrong


def test_every_unit_has_a_level():
    known = {name for units in LEVELS for name in units}
    assert {unit(file) for file in FILES} - {"__init__"} <= known


@pytest.mark.parametrize("file", [file for file in FILES if unit(file) != "__init__"], ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    assert wrong_directions(unit(file), file.read_text()) == []


def test_an_import_up_or_sideways_would_be_found():
    assert wrong_directions("model", "from burnish.skeleton import fill") == ["line 1: model imports burnish.skeleton.fill"]
    assert wrong_directions("model", "def f():\n    import burnish.adapt.attach") == ["line 2: model imports burnish.adapt.attach"]
    assert wrong_directions("model", "from burnish import load") == ["line 1: model imports burnish.load"]
    assert wrong_directions("model", "from burnish.model import head\nfrom burnish.errors import UserError") == []


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_shorter_than_400_lines(file):
    assert len(file.read_text().splitlines()) < LINES


def test_torch_distributed_is_imported_in_parallel_alone():
    sources = {str(file.relative_to(PACKAGE)): file.read_text() for file in FILES if unit(file) != "parallel"}
    found = [f"{file}:{line}" for file, source in sources.items() for line, name in imports(source) if name.startswith("torch.distributed")]
    assert found + [file for file, source in sources.items() if re.search(r"^[^#\"]*\btorch\.distributed\.", source, re.MULTILINE)] == []


def private(name: str) -> bool:
    """Whether a dotted name of torch has a part that begins with an underscore."""
    parts = name.split(".")
    return parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts[1:])


def test_private_modules_of_torch_are_imported_in_one_file_alone():
    found = {str(file.relative_to(PACKAGE)) for file in FILES for _, name in imports(file.read_text()) if private(name)}
    assert found <= {"parallel/private.py"}


def test_every_private_function_has_a_canary():
    canaries = (ROOT / "tests/parallel/test_private.py").read_text()
    names = {name.rpartition(".")[2] for _, name in imports((PACKAGE / "parallel/private.py").read_text()) if private(name)}
    assert names
    assert {name for name in names if not re.search(rf"def test_.*{name}", canaries)} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse(file.read_text())), "no docstring at its head"


def test_every_folder_with_code_is_a_package():
    assert {file.parent for file in FILES} == {file.parent for file in FILES if file.name == "__init__.py"}


@pytest.mark.parametrize("file", [*FILES, *TESTS, *ROOT.glob("*.toml"), *ROOT.glob("*.md")], ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_names_a_folder_of_one_machine(file):
    assert re.findall(r"(?<![\w.])/(?:home|work|Users|root|mnt|data)/\w+", file.read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_unpickled(file):
    source = file.read_text()
    assert [name for _, name in imports(source) if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib")] == []
    assert re.findall(r"torch\.load\(|allow_pickle=True", source) == []


@pytest.mark.parametrize("module", ["burnish", "burnish.cli", "burnish.config", "burnish.runs"])
def test_importing_it_costs_no_heavy_library(module):
    code = f"""
        import sys, {module}
        print(*sorted({{"torch", "transformers", "bitsandbytes", "numpy", "datasets", "scipy"}} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_public_names_are_functions_even_the_second_time():
    import burnish

    assert [name for name in burnish.__all__ for _ in range(2) if not callable(getattr(burnish, name))] == []


def test_an_unknown_public_name_is_an_attribute_error():
    import burnish

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = burnish.nothing
