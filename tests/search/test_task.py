"""From a name to a task, and errors of a user's code in one line that says where."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adq.quant.errors import InputError
from adq.search.task import Task, load_task, task_call

FOUND = """
import torch, torch.nn.functional as F
from adq.search.task import Task

def make_task(model="none given"):
    return Task(torch.nn.Identity, F.cross_entropy, [], [], [], metric_name=model)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, which is not importable yet; modules loaded from it go again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


def refused(spec: str, model: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        load_task(spec, model)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("spec", ["", "nosuch", "digits2", ":make_task", "mymodule:"])
def test_an_unknown_task_is_answered_with_the_known_ones(spec: str) -> None:
    text = refused(spec)
    assert f"unknown task {spec!r}" in text
    for known in ("digits", "imagefolder:PATH", "webdataset:PATH", "mymodule:make_task"):
        assert known in text


@pytest.mark.parametrize("name", ["imagefolder", "webdataset", "cifar10"])
def test_an_image_task_without_a_folder_is_refused(name: str) -> None:
    assert f"--task {name}:PATH" in refused(name)
    assert f"--task {name}:PATH" in refused(f"{name}:")


def test_digits_takes_no_model() -> None:
    assert "leave out --model resnet18" in refused("digits", "resnet18")


def test_a_module_in_the_current_folder_is_found(here: Path) -> None:
    (here / "found_here.py").write_text(FOUND)
    assert load_task("found_here:make_task").metric_name == "none given"
    assert load_task("found_here:make_task", "big").metric_name == "big"
    (here / "package").mkdir()
    (here / "package" / "inner.py").write_text(FOUND)
    assert isinstance(load_task("package.inner:make_task"), Task)


def test_an_installed_package_goes_before_the_current_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tomli_w", raising=False)
    (here / "tomli_w.py").write_text(FOUND)
    text = refused("tomli_w:make_task")
    assert "has no 'make_task'" in text
    assert "stands behind installed ones" in text
    assert not (sys.modules["tomli_w"].__file__ or "").startswith(str(here))


@pytest.mark.parametrize("module", ["nowhere_at_all", "nowhere_at_all.inner"])
def test_a_missing_module_is_named_with_the_folder(here: Path, module: str) -> None:
    assert refused(f"{module}:make_task") == (
        f"task '{module}:make_task': no module '{module}' among the installed packages or in {here}"
    )


def test_a_module_that_misses_another_one_says_which(here: Path) -> None:
    (here / "wants_more.py").write_text("import nowhere_at_all\n")
    text = refused("wants_more:make_task")
    assert "task 'wants_more:make_task' failed: " in text
    assert "No module named 'nowhere_at_all'" in text
    assert "among the installed packages" not in text


def test_a_missing_function_is_named(here: Path) -> None:
    (here / "found_here.py").write_text(FOUND)
    text = refused("found_here:make_it")
    assert text.startswith("task 'found_here:make_it': module 'found_here' (")
    assert "has no 'make_it'" in text


def test_a_task_that_exits_is_an_error_and_no_exit(here: Path) -> None:
    (here / "leaves.py").write_text("import sys\n\ndef make_task():\n    sys.exit(0)\n")
    assert "failed: SystemExit: 0" in refused("leaves:make_task")


def test_an_error_in_the_users_function_says_what_and_where(here: Path) -> None:
    (here / "broken.py").write_text("\ndef make_task():\n    raise KeyError('two\\nlines')\n")
    text = refused("broken:make_task")
    assert text.startswith("task 'broken:make_task' failed: KeyError: ")
    assert text.endswith(f"({here}/broken.py:3)")


def test_an_error_while_the_module_loads_says_where(here: Path) -> None:
    (here / "broken_module.py").write_text("x = 1\ny = x / 0\n")
    text = refused("broken_module:make_task")
    assert text.endswith(f"ZeroDivisionError: division by zero ({here}/broken_module.py:2)")
    (here / "no_python.py").write_text("def def\n")
    text = refused("no_python:make_task")
    assert "SyntaxError: " in text
    assert "no_python.py, line 1" in text


def test_anything_but_a_task_is_refused(here: Path) -> None:
    (here / "not_one.py").write_text("def make_task():\n    return {'model': 1}\n")
    assert refused("not_one:make_task").endswith("expected an adq.Task from make_task(), got dict")


def test_a_call_of_the_users_code_gives_its_result_or_one_line() -> None:
    assert task_call("t", "a step", lambda: 7) == 7

    def fail() -> None:
        raise ValueError("bad\n  value")

    with pytest.raises(InputError) as error:
        task_call("t", "a step", fail)
    line = fail.__code__.co_firstlineno + 1
    assert str(error.value) == f"task 't', a step: ValueError: bad value ({__file__}:{line})"
    assert isinstance(error.value.__cause__, ValueError)


def test_an_input_error_is_passed_on_as_it_is_and_ctrl_c_too() -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (InputError("said well already"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            task_call("t", "a step", lambda error=error: fail(error))
        assert caught.value is error
