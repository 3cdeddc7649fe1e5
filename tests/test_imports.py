"""The walls of the house: who may import whom, read from the source with `ast`; nothing is imported to find out.

A checker takes the sources {module: text} and returns sentences about what is wrong. Each is first shown to find a
planted violation, then let loose on the package.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "selfsup_fastai"
FOLDER = Path(__file__).parents[1] / PACKAGE
LEVELS = [  # From the ground up: a room imports rooms of lower levels and itself, never its neighbors
    {"errors", "seeding", "memory", "messages", "optimizers", "pictures", "transfer", "writing"},
    {"checks", "plots", "processes"},
    {"losses", "metrics", "features", "data", "encoders"},
    {"callbacks"},
    {"pretext", "downstream"},
    {"compare", "scan"},
    {"runs"},
    {"demo"},
    {"cli", "all"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE = {"nbs", "tests", "bench", "docs"}  # Nothing in the package may lean on these
ONE_DOOR = {"albumentations": "data.albumentations", "pydicom": "data.dicom", "av": "data.video"}
BANNED_CALLS = {"print", "torch.load", "load_learner", "pickle.load", "pickle.loads"}


class Import(NamedTuple):
    target: str  # Full name of the imported module
    at_top: bool  # Run when the module is imported
    star: bool = False


def package_sources() -> dict[str, str]:
    """{'pretext.base': text}; the package itself is ''."""
    names = {file: file.relative_to(FOLDER).with_suffix("").parts for file in sorted(FOLDER.rglob("*.py"))}
    return {".".join(p for p in parts if p != "__init__"): file.read_text("utf-8") for file, parts in names.items()}


def imports(text: str, known: set[str]) -> list[Import]:
    """Every import in a source; those in functions and under TYPE_CHECKING are not at the top."""
    found = []
    for node, at_top in _walk(ast.parse(text), True):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                target = inner if inner.removeprefix(f"{PACKAGE}.") in known and base.startswith(PACKAGE) else base
                found.append(Import(target, at_top, alias.name == "*"))
    return found


def _walk(node: ast.AST, at_top: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, at_top
    lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, at_top and not lazy)


def _inside(target: str) -> str | None:
    """'selfsup_fastai.data.files' -> 'data.files'; None for what is not ours."""
    if target == PACKAGE:
        return ""
    return target.removeprefix(f"{PACKAGE}.") if target.startswith(f"{PACKAGE}.") else None


def room(module: str) -> str:
    return module.split(".")[0]


def walls(sources: dict[str, str]) -> list[str]:
    """Imports from a room of the same level or a higher one, wherever in the file they stand."""
    wrong = []
    for module, text in sources.items():
        for target in {i.target for i in imports(text, set(sources))}:
            if target.startswith("."):
                wrong.append(f"{module} imports {target} by a relative name")
            if target.split(".")[0] in OUTSIDE:
                wrong.append(f"{module} imports {target} from outside the package")
            other = _inside(target)
            if other and room(other) != room(module) and not _may(room(module), room(other)):
                wrong.append(f"{module} imports {other}")
    return wrong


def _may(importer: str, imported: str) -> bool:
    if not importer:
        return False  # selfsup_fastai/__init__ imports nothing of ours
    return LEVEL[imported] < LEVEL[importer]


def unknown_rooms(sources: dict[str, str]) -> list[str]:
    """Modules at the top of the package that stand in no level: nobody has decided what they may import."""
    return sorted({room(m) for m in sources if m} - LEVEL.keys())


def cycles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other, directly or not, while they are being imported themselves."""
    edges = {}
    for module, text in sources.items():
        targets = {_inside(target) for target in _top_targets(module, text, sources)}
        edges[module] = {target for target in targets if target} - {module}
    return [" -> ".join(path) for module in sources if (path := _path_back(module, edges))]


def _top_targets(module: str, text: str, sources: dict[str, str]) -> set[str]:
    """What runs when `module` is imported: its imports, and the packages around each of them except its own."""
    targets = {i.target for i in imports(text, set(sources)) if i.at_top}
    own = set(_parents(f"{PACKAGE}.{module}"))
    return targets | {p for t in targets for p in _parents(t) if p not in own}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _path_back(start: str, edges: dict[str, set[str]]) -> list[str] | None:
    """The way from a module back to itself, if there is one; told once, by its first module in the alphabet."""
    stack, seen = [(start, [start])], set()
    while stack:
        module, path = stack.pop()
        for other in sorted(edges.get(module, ())):
            if other == start and start == min(path):
                return [*path, start]
            if other not in seen:
                seen.add(other)
                stack.append((other, [*path, other]))
    return None


def star_imports(sources: dict[str, str]) -> list[str]:
    """`from x import *` anywhere but in all.py."""
    return [m for m, text in sources.items() if m != "all" and any(i.star for i in imports(text, set(sources)))]


def task_to_task(sources: dict[str, str]) -> list[str]:
    """Task files (pretext/<family>/<task>.py) that import another task file."""
    wrong = []
    for module, text in sources.items():
        if _is_task(module):
            others = {_inside(i.target) for i in imports(text, set(sources))} - {module}
            wrong += [f"{module} imports {other}" for other in others if other and _is_task(other)]
    return wrong


def _is_task(module: str) -> bool:
    return module.startswith("pretext.") and module.count(".") == 2


def grab_bags(sources: dict[str, str]) -> list[str]:
    """Modules whose name says nothing."""
    return [m for m in sources if set(m.split(".")) & {"utils", "util", "helpers", "helper", "common", "misc"}]


def side_doors(sources: dict[str, str]) -> list[str]:
    """albumentations, pydicom and av, imported when a module is that is not their own."""
    wrong = []
    for module, text in sources.items():
        for target in {i.target.split(".")[0] for i in imports(text, set(sources)) if i.at_top}:
            if ONE_DOOR.get(target, module) != module:
                wrong.append(f"{module} imports {target}")
    return wrong


def banned(sources: dict[str, str]) -> list[str]:
    """Printing to the screen (to a pipe is fine), unpickling, notes to self."""
    wrong = []
    for module, text in sources.items():
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and not _to_pipe(n)}
        wrong += [f"{module} calls {call}" for call in sorted(calls & BANNED_CALLS)]
        wrong += [f"{module} imports {i.target}" for i in imports(text, set(sources)) if _unpickles(i.target)]
        wrong += [f"{module} has a {word}" for word in ("TODO", "FIXME", "XXX") if word in text]
    return wrong


def _to_pipe(call: ast.Call) -> bool:
    return any(k.arg == "file" and ast.unparse(k.value) not in ("sys.stdout", "sys.stderr") for k in call.keywords)


def _unpickles(target: str) -> bool:
    return target.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib"}


PLANTED = [  # checker, sources with one violation, the sentence about it
    (walls, {"losses": "from selfsup_fastai.features import embed", "features": ""}, "losses imports features"),
    (walls, {"data.files": "import selfsup_fastai.encoders.heads"}, "data.files imports encoders.heads"),
    (walls, {"errors": "def f():\n    from selfsup_fastai.losses import nt_xent"}, "errors imports losses"),
    (walls, {"pretext.a": "from selfsup_fastai import downstream", "downstream": ""}, "pretext.a imports downstream"),
    (walls, {"downstream.learner": "from selfsup_fastai.pretext import TASKS"}, "downstream.learner imports pretext"),
    (walls, {"messages": "from selfsup_fastai.errors import unknown"}, "messages imports errors"),
    (walls, {"compare": "from selfsup_fastai.runs import pretrain"}, "compare imports runs"),
    (walls, {"demo": "import selfsup_fastai.cli"}, "demo imports cli"),
    (walls, {"cli": "import selfsup_fastai.all"}, "cli imports all"),
    (walls, {"": "from selfsup_fastai.errors import unknown"}, " imports errors"),
    (walls, {"data.files": "from .opening import open_image"}, "data.files imports .opening by a relative name"),
    (walls, {"demo": "from tests.conftest import ROOT"}, "demo imports tests.conftest from outside the package"),
    (unknown_rooms, {"attic.chest": ""}, "attic"),
    (cycles, {"a": "import selfsup_fastai.b", "b": "import selfsup_fastai.a"}, "a -> b -> a"),
    (
        cycles,
        {"a": "from selfsup_fastai.b import x", "b": "import selfsup_fastai.c", "c": "from selfsup_fastai import a"},
        "a -> b -> c -> a",
    ),
    (cycles, {"a": "import selfsup_fastai.p.x", "p": "import selfsup_fastai.a", "p.x": ""}, "a -> p -> a"),
    (star_imports, {"losses": "from torch.nn import *"}, "losses"),
    (
        task_to_task,
        {"pretext.x.one": "from selfsup_fastai.pretext.y.two import Two", "pretext.y.two": ""},
        "pretext.x.one imports pretext.y.two",
    ),
    (grab_bags, {"data.utils": ""}, "data.utils"),
    (grab_bags, {"common.files": ""}, "common.files"),
    (side_doors, {"data.images": "import albumentations as A"}, "data.images imports albumentations"),
    (side_doors, {"data.files": "try:\n    from pydicom import dcmread\nfinally: ..."}, "data.files imports pydicom"),
    (banned, {"losses": "print(1)"}, "losses calls print"),
    (banned, {"losses": "print(1, file=sys.stderr)"}, "losses calls print"),
    (banned, {"losses": "x = torch.load('file')"}, "losses calls torch.load"),
    (banned, {"losses": "load_learner('file')"}, "losses calls load_learner"),
    (banned, {"losses": "def f():\n    import pickle"}, "losses imports pickle"),
    (banned, {"losses": "x = 1  # " + "TODO mend"}, "losses has a TODO"),
]

ALLOWED = [  # What the checkers must leave alone
    (walls, {"features": "from selfsup_fastai.errors import TaskError", "data.a": "import selfsup_fastai.data.b"}),
    (walls, {"data.a": "import selfsup_fastai.errors", "runs": "import selfsup_fastai.pretext.learner"}),
    (walls, {"runs": "from selfsup_fastai import __version__", "cli": "import selfsup_fastai.demo"}),
    (cycles, {"a": "def f():\n    import selfsup_fastai.b", "b": "import selfsup_fastai.a"}),
    (cycles, {"a": "if TYPE_CHECKING:\n    import selfsup_fastai.b", "b": "import selfsup_fastai.a"}),
    (cycles, {"p": "import selfsup_fastai.p.x", "p.x": "import selfsup_fastai.q", "q": ""}),
    (star_imports, {"all": "from fastai.vision.all import *"}),
    (task_to_task, {"pretext.x.one": "from selfsup_fastai.pretext.base import PretextTask", "pretext.base": ""}),
    (side_doors, {"data.a": "def f():\n    import albumentations", "data.albumentations": "import albumentations"}),
    (banned, {"losses": "def f(print_it): return net.load(1)", "data.files": "print(1, file=pipe)"}),
]


@pytest.mark.parametrize(("check", "sources", "sentence"), PLANTED)
def test_checker_finds_planted_violation(check, sources, sentence):
    assert check(sources) == [sentence]


@pytest.mark.parametrize(("check", "sources"), ALLOWED)
def test_checker_allows(check, sources):
    assert check(sources) == []


@pytest.mark.parametrize(
    "check",
    [walls, unknown_rooms, cycles, star_imports, task_to_task, grab_bags, side_doors, banned],
    ids=lambda f: f.__name__,
)
def test_package(check):
    assert check(package_sources()) == []


def test_sources_are_all_there():
    """The checks above would pass on nothing."""
    sources = package_sources()
    assert {"", "errors", "data.images", "pretext", "pretext.predictive.rotation", "cli"} <= set(sources)
    assert Import(f"{PACKAGE}.data.images", True) in imports(sources["runs.pretraining"], set(sources))


def test_package_itself_imports_nothing():
    assert imports((FOLDER / "__init__.py").read_text("utf-8"), set()) == []


def _modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that ran `code`."""
    code += "\nimport sys; sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return set(child.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["--version"]])
def test_command_answers_before_anything_heavy_is_loaded(arguments):
    run = f"""
import sys
from selfsup_fastai import cli
sys.argv = ["selfsup", *{arguments}]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
"""
    loaded = _modules_after(run)
    assert {"typer", PACKAGE} <= loaded  # the names are really looked at
    assert not loaded & {"torch", "fastai", "timm", "pandas", "matplotlib", "sklearn"}
