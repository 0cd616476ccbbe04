"""The repository's own rules, checked on its own files. Each check lists every offender."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "pagedkv").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 70
# Files still to be split. An entry that is no longer needed fails, so the list only shrinks.
TOO_LONG: set[str] = set()

HEAVY = {"torch", "xformers", "transformers", "numba"}
MACHINE_PATH = re.compile(r"""["'`\s(=](/(?:home|root|work|Users|mnt|opt)/[^\s"'`)]*)""")
LEFT_TO_DO = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path):
    return path.read_text(encoding="utf-8")


@cache
def nodes_of(path):
    return tuple(ast.walk(ast.parse(text_of(path))))


def plane_of(path):
    return path.relative_to(ROOT / "pagedkv").parts[0]


def imports_of(path):
    """Yield (module, whether it is imported with the file) of every import of a file."""
    late = {
        id(inner)
        for node in nodes_of(path)
        if isinstance(node, FUNCTIONS | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", id(node) not in late


def test_there_is_something_to_check():
    assert len(SOURCES) > 20
    assert ROOT / "pagedkv/core/scheduler.py" in SOURCES
    assert len(TESTS) > 20


def test_no_file_is_longer_than_400_lines():
    long = {name_of(p) for p in SOURCES if len(text_of(p).splitlines()) > MOST_LINES_OF_A_FILE}
    assert long == TOO_LONG


def test_every_function_fits_a_screen():
    long = [
        (name_of(path), node.name)
        for path in SOURCES
        for node in nodes_of(path)
        if isinstance(node, FUNCTIONS)
        and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


def test_every_module_says_what_it_is():
    assert [name_of(p) for p in SOURCES if not ast.get_docstring(ast.parse(text_of(p)))] == []


def test_nothing_is_left_to_do():
    assert [name_of(path) for path in SOURCES if LEFT_TO_DO.search(text_of(path))] == []


def test_no_path_of_one_machine_is_written_down():
    found = [(name_of(path), MACHINE_PATH.findall(text_of(path))) for path in SOURCES + TESTS]
    assert [pair for pair in found if pair[1]] == []


def test_only_the_command_line_prints():
    prints = [
        (name_of(path), node.lineno)
        for path in SOURCES
        if plane_of(path) not in ("cli", "__main__.py")
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert prints == []


def test_what_decides_never_imports_torch():
    """The command line may, once it knows that the command needs it."""
    heavy = [
        (name_of(path), module)
        for path in SOURCES
        if plane_of(path) != "device"
        for module, at_once in imports_of(path)
        if module.partition(".")[0] in HEAVY and (at_once or plane_of(path) != "cli")
    ]
    assert heavy == []


def test_imports_point_down_only():
    above = {
        "eviction": ("core", "device", "sim", "serve", "cli"),
        "core": ("device", "sim", "serve", "cli"),
        "device": ("sim", "serve", "cli"),
        "errors.py": ("core", "eviction", "device", "sim", "serve", "cli", "config", "events"),
        "events.py": ("core", "eviction", "device", "sim", "serve", "cli"),
        "config.py": ("core", "device", "sim", "serve", "cli"),
    }
    upward = [
        (name_of(path), module)
        for path in SOURCES
        for module, _ in imports_of(path)
        if module.startswith(tuple(f"pagedkv.{name}" for name in above.get(plane_of(path), ())))
    ]
    assert upward == []


def test_no_function_rebinds_a_global():
    """Clock, random numbers and ids are handed in."""
    rebound = [
        (name_of(path), node.names)
        for path in SOURCES
        for node in nodes_of(path)
        if isinstance(node, ast.Global)
    ]
    assert rebound == []


def test_the_rules_are_not_blind():
    path = "/".join(["", "home", "someone", "model"])
    assert MACHINE_PATH.search(f'open("{path}")')
    assert not MACHINE_PATH.search("https://example.org/home/page")
    assert LEFT_TO_DO.search("x = 1  # TODO: more")
    assert not LEFT_TO_DO.search("except NotImplementedError:")
