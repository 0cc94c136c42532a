"""A job's name leads to its function, and `--set` to its parameters, or says what is wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import JobError, TargetError
from shoal.job.target import Target, code_of, resolve, target_of

SOURCE = """
from pathlib import Path
from typing import Literal, Optional
import torch
from torch import nn
from torch.utils.data import TensorDataset
import shoal

GIVEN = {}

def job(layers: int = 2, rate: float = 0.1, name: str = "a", deep: bool = False, folder: Path = Path("x"),
        kind: Literal["small", "large"] = "small", level: Literal[1, 2] = 1, some: int | None = None,
        other: Optional[float] = None, where: Path | None = None, plain=3, items: list = ()) -> shoal.Job:
    GIVEN.update(locals())
    return shoal.Job(model=lambda: nn.Linear(1, 1), data=lambda: TensorDataset(torch.ones(2, 1)),
                     loss=lambda m, b: m(b[0]).mean(), optimizer=lambda p: torch.optim.SGD(p, 0.1))

def needs(width: int): return job()
def wrong(): return 3
number = 7
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file of its own module name for each test: modules are remembered by name."""
    path = tmp_path / f"job_{tmp_path.name}.py"
    path.write_text(SOURCE)
    search_path = list(sys.path)
    yield path
    sys.path[:] = search_path
    sys.modules.pop(f"shoal_job_{path.stem}", None)


def given(path: Path, *settings: str) -> dict[str, Any]:
    """What the job function is called with in a worker, which has only what can be stored as JSON."""
    target = resolve(f"{path}:job", settings)
    Target(name=target.name, arguments=dict(target.arguments)).load()
    found: dict[str, Any] = sys.modules[f"shoal_job_{path.stem}"].GIVEN
    return found


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("layers=6", 6),
        ("rate=1e-3", 1e-3),
        ("rate=2", 2.0),
        ("name=b=c", "b=c"),
        ("name=", ""),
        ("deep=true", True),
        ("deep=False", False),
        ("folder=/some/where", Path("/some/where")),
        ("kind=large", "large"),
        ("level=2", 2),
        ("some=4", 4),
        ("other=0.5", 0.5),
        ("where=/some/where", Path("/some/where")),
        ("plain=5", 5),
    ],
)
def test_a_setting_reaches_its_parameter_with_the_parameters_type(path: Path, setting: str, value: Any) -> None:
    found = given(path, setting)[setting.partition("=")[0]]
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("layers=many", r"--set layers: got 'many', expected a whole number"),
        ("layers=1.5", r"got '1.5', expected a whole number"),
        ("rate=fast", r"got 'fast', expected a number"),
        ("deep=maybe", r"got 'maybe', expected true or false"),
        ("kind=smal", r"got 'smal', expected small, large \(did you mean 'small'\?\)"),
        ("level=3", r"got '3', expected 1, 2"),
        ("some=x", r"got 'x', expected a whole number"),
        ("items=3", r"--set items: the parameter is a list"),
        ("layer=3", r"--set layer: .*takes layers, rate.*\(did you mean 'layers'\?\)"),
        ("layers", r"--set got 'layers', expected name=value"),
    ],
)
def test_a_setting_that_does_not_fit_is_told(path: Path, setting: str, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        resolve(f"{path}:job", [setting])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{path}:jobb", r"has no function 'jobb' \(did you mean 'job'\?\); it has job, needs, wrong"),
        ("{path}", r"expected path\.py:function"),
        ("{path}:", r"expected path\.py:function"),
        (":job", r"expected path\.py:function"),
        ("{folder}/jub.py:job", r"there is no file .*jub\.py"),
        ("no_such_module:job", r"there is no module 'no_such_module'"),
        ("json.no_such:job", r"there is no module 'json\.no_such'"),
        ("{path}:number", r"is int, expected a function"),
        ("{path}:needs", r"needs a value for width: add --set width=\.\.\."),
    ],
)
def test_a_name_that_leads_nowhere_is_told(path: Path, name: str, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        resolve(name.format(path=path, folder=path.parent))


def test_a_file_that_is_not_python_is_told_with_its_line(path: Path) -> None:
    path.write_text("x = 1\ndef job(:\n")
    with pytest.raises(TargetError, match=rf"{path.name}:2: not valid Python"):
        resolve(f"{path}:job")


def test_an_import_that_fails_inside_the_job_is_the_jobs_own(path: Path) -> None:
    path.write_text("import no_such_module\n")
    with pytest.raises(TargetError, match=r"(?s)line 1.*No module named .no_such_module"):
        resolve(f"{path}:job")


def test_a_mistake_in_a_neighbour_is_told_by_the_neighbours_own_name(path: Path) -> None:
    neighbour = f"beside_{path.stem}"
    (path.parent / f"{neighbour}.py").write_text("\n\ndef (:\n")
    path.write_text(f"import {neighbour}\n{SOURCE}")
    with pytest.raises(TargetError, match=rf"{neighbour}\.py:3: not valid Python"):
        resolve(f"{path}:job")


def test_a_file_that_was_mended_can_be_named_again(path: Path) -> None:
    path.write_text("def job(:\n")
    with pytest.raises(TargetError):
        resolve(f"{path}:job")
    path.write_text(SOURCE)
    assert resolve(f"{path}:job").load() is not None


def test_annotations_that_only_a_type_checker_can_read_are_no_hindrance(path: Path) -> None:
    header = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
    header += "if TYPE_CHECKING:\n    from nowhere import Thing\n"
    path.write_text(f"{header}{SOURCE}\ndef other_job(width: int = 1, thing: Thing = None): return job(layers=width)\n")
    assert resolve(f"{path}:other_job", ["width=3"]).load() is not None
    assert sys.modules[f"shoal_job_{path.stem}"].GIVEN["layers"] == 3


def test_a_job_may_import_its_neighbours(path: Path) -> None:
    neighbour = f"beside_{path.stem}"
    (path.parent / f"{neighbour}.py").write_text("value = 1\n")
    path.write_text(f"import {neighbour}\n{SOURCE}")
    assert resolve(f"{path}:job").load() is not None
    del sys.modules[neighbour]


def test_a_function_that_makes_no_job_is_told(path: Path) -> None:
    with pytest.raises(JobError, match=r"wrong returned int, expected a shoal\.Job"):
        resolve(f"{path}:wrong").load()


def test_names_are_absolute_short_names_short_and_the_code_is_known(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    target = resolve(f"{path.name}:job")
    assert target.name == f"{path}:job"
    assert target.short_name == path.stem
    assert target.code == code_of(target.name) != ""
    path.write_text(SOURCE + "\n# another version\n")
    assert code_of(target.name) != target.code


def test_a_module_of_a_package_has_a_short_name_too() -> None:
    assert Target(name="package.module:function").short_name == "module"


def top_level_job() -> Any:
    """Never called."""


def test_a_function_object_is_named_by_its_file() -> None:
    target = target_of(top_level_job, {})
    assert target.name == f"{Path(__file__).absolute()}:top_level_job"


def test_a_function_that_no_other_process_could_find_is_refused() -> None:
    def inner() -> Any:
        """Never called."""

    for function in (inner, lambda: None, functools.partial(top_level_job), len):
        with pytest.raises(TargetError, match="at the top level"):
            target_of(function, {})
    with pytest.raises(TargetError, match="has no parameter 'width'"):
        target_of(top_level_job, {"width": 3})
