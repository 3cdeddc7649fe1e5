"""The public names: what `from selfsup_fastai.all import *` brings, and that all of it is documented."""

import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fastai.vision.all as fastai_all
import pytest

import selfsup_fastai
import selfsup_fastai.all as ours
from selfsup_fastai.pretext import TASKS, get_task, list_tasks, task_class
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.pretext.joint import JointTask

RECIPES = {name for name, value in vars(ours).items() if isinstance(value, ours.Recipe)}
DATA = {"TASKS", "WINDOWS", "__version__", *RECIPES}  # Public names that are no classes or functions


@pytest.fixture(scope="module")
def starred() -> dict:
    names: dict = {}
    exec("from selfsup_fastai.all import *", names)
    return names


def test_everything_promised_is_there(starred):
    assert [name for name in ours.__all__ if name not in starred] == []
    assert len(set(ours.__all__)) == len(ours.__all__)


def test_star_import_brings_fastai_too(starred):
    names = {name for name in dir(fastai_all) if not name.startswith("_")}
    assert names <= set(starred)
    assert starred["Learner"] is fastai_all.Learner and starred["Resize"] is fastai_all.Resize


def test_ours_hide_nothing_of_fastai():
    assert [name for name in ours.OURS if hasattr(fastai_all, name) and name != "__version__"] == []


def test_ours_are_sorted():
    """Constants, then classes, then the rest, each in the alphabet: the order ruff gives to `__all__`."""
    kind = {name: 0 if name.isupper() else 1 if name[0].isupper() else 2 for name in ours.OURS}
    assert sorted(ours.OURS, key=lambda name: (kind[name], name)) == ours.OURS


def test_all_imports_nothing_that_it_does_not_offer():
    """A name of ours in `selfsup_fastai.all` that is not in OURS would be public by accident."""
    here = {name for name, value in vars(ours).items() if getattr(value, "__module__", "").startswith("selfsup_fastai")}
    assert here <= set(ours.OURS)


@pytest.mark.parametrize("name", sorted(set(ours.OURS) - DATA))
def test_documented(name):
    value = getattr(ours, name)
    assert value.__module__.startswith("selfsup_fastai.")
    assert len(_own_doc(value).partition("\n")[0].split()) >= 5


@pytest.mark.parametrize("name", sorted(set(ours.OURS) - DATA))
def test_public_methods_are_documented(name):
    value = getattr(ours, name)
    if inspect.isclass(value):
        missing = [n for n, member in vars(value).items() if _is_public_method(n, member) and not _doc_of(value, n)]
        assert missing == [], f"{name} has undocumented methods"


def _own_doc(value) -> str:
    """The docstring of the object itself; a class does not pass on that of its parent."""
    return inspect.cleandoc(vars(value).get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or "")


def _is_public_method(name: str, member) -> bool:
    fastai_hooks = {"encodes", "decodes", "setups", "before_iter", "do_item"}
    is_hook = name in fastai_hooks or re.match("(before|after)_", name)
    return not name.startswith("_") and not is_hook and (inspect.isfunction(member) or isinstance(member, classmethod))


def _doc_of(cls: type, name: str) -> str | None:
    """Its docstring, or that of the method it stands in for."""
    return inspect.getdoc(getattr(cls, name))


@pytest.mark.parametrize("name", sorted(set(ours.OURS) - DATA))
def test_arguments_have_types(name):
    value = getattr(ours, name)
    if inspect.isfunction(value):
        bare = [p.name for p in inspect.signature(value).parameters.values() if _is_bare(p)]
        assert bare == [], f"{name} has arguments without type or default"


def _is_bare(p: inspect.Parameter) -> bool:
    return p.annotation is p.empty and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)


@pytest.mark.parametrize("name", TASKS)
def test_task_says_what_it_is(name):
    cls = task_class(name)
    assert issubclass(cls, PretextTask) and cls.name == name
    (base,) = cls.__bases__
    assert base.__module__ in (PretextTask.__module__, JointTask.__module__)  # no task is another task
    assert re.search(r"\b(19|20)\d\d\b", cls.paper)
    assert inspect.getdoc(cls).splitlines()[0].endswith("?")
    year = cls.paper.split()[-1]
    assert year in inspect.getdoc(cls)  # the docstring tells of the same paper


@pytest.mark.parametrize("name", TASKS)
def test_settings_are_kept_under_their_names(name):
    task = get_task(name)
    defaults = {n: p.default for n, p in inspect.signature(type(task)).parameters.items()}
    assert task.settings() == defaults


def test_list_tasks_lists_them_all():
    table = list_tasks()
    assert list(table.index) == list(TASKS)
    assert table.loc["rotation", "passes"] == 4 and table.loc["simclr", "passes"] == 2
    assert table.loc["jigsaw", "kind"] == "predictive" and table.loc["simclr", "kind"] == "joint embedding"


def test_version_is_that_of_the_installed_package():
    assert version("selfsup_fastai") == selfsup_fastai.__version__ == ours.__version__


def test_command_tells_the_version():
    code = "import sys; sys.argv = ['selfsup', '--version']; from selfsup_fastai.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"selfsup_fastai {selfsup_fastai.__version__}\n" and done.returncode == 0


def test_importing_warns_of_nothing():
    """fastai's import would, of torch.jit.script."""
    command = [sys.executable, "-c", "import selfsup_fastai.all"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(selfsup_fastai.__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")
