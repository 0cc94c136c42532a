"""A job's name: `path.py:function` or `package.module:function`, and the arguments given by `--set`.

Processes find the job by its name, so nothing has to be pickled to reach them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import JobError, ShoalError, TargetError, nearest, user_traceback
from shoal.job.job import Job


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a job comes from.

    Attributes:
        name: `path.py:function` (the path absolute) or `package.module:function`.
        arguments: for the job function's own parameters.
        code: SHA-256 of the source file, so that ranks with different code notice.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    @property
    def short_name(self) -> str:
        """The file's or module's last name: for folders and titles."""
        return Path(self.name.rpartition(":")[0]).name.removesuffix(".py").rpartition(".")[2]

    def load(self) -> Job:
        """Import the job's module and call its function.

        Raises:
            TargetError: the name or an argument does not fit.
            JobError: the function returned something that is not a Job.
        """
        function = _find(self.name)
        job = function(**_typed(function, self.arguments))
        if not isinstance(job, Job):
            raise JobError(f"{self.name} returned {type(job).__name__}, expected a shoal.Job")
        return job


def resolve(name: str, settings: Sequence[str] = ()) -> Target:
    """Check a name as typed and its `--set key=value` settings, converted to the parameters' types."""
    location, _, function_name = name.rpartition(":")
    if not location or not function_name:
        raise TargetError(
            f"got the job {name!r}, expected path.py:function or package.module:function, e.g. examples/charlm.py:job"
        )
    if location.endswith(".py"):
        name = f"{Path(location).absolute()}:{function_name}"
    function = _find(name)
    arguments = _arguments(name, function, settings)
    return Target(name=name, arguments=arguments, code=code_of(name))


def target_of(function: Callable[..., Job], arguments: Mapping[str, Any]) -> Target:
    """Name a function object: it must stand at the top level of a file or module."""
    plain = inspect.unwrap(function)
    source = inspect.getsourcefile(plain) if inspect.isfunction(plain) else None
    if source is None or function.__qualname__ != function.__name__ or function.__name__ == "<lambda>":
        raise TargetError(
            f"the job {getattr(function, '__qualname__', function)!r} cannot be named, so workers cannot find it; "
            "expected a function at the top level of a .py file"
        )
    name = f"{Path(source).absolute()}:{function.__name__}"
    if unknown := set(arguments) - set(inspect.signature(function).parameters):
        raise TargetError(f"{function.__name__} has no parameter {sorted(unknown)[0]!r}")
    return Target(name=name, arguments=arguments, code=code_of(name))


def _find(name: str) -> Callable[..., Any]:
    location, _, function_name = name.rpartition(":")
    module = _load_file(Path(location)) if location.endswith(".py") else _load_module(location)
    function = getattr(module, function_name, None)
    if function is None:
        functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise TargetError(
            f"{location} has no function '{function_name}'{nearest(function_name, functions)}; "
            f"it has {', '.join(functions) or 'none'}"
        )
    if not callable(function):
        raise TargetError(f"{name} is {type(function).__name__}, expected a function that returns a shoal.Job")
    return typing.cast(Callable[..., Any], function)


def _load_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        siblings = [str(p.name) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise TargetError(f"there is no file {path}{nearest(path.name, siblings)}")
    name = f"shoal_job_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python path.py` would: the job may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SyntaxError):
            raise TargetError(f"{error.filename}:{error.lineno}: not valid Python: {error.msg}") from None
        if isinstance(error, Exception) and not isinstance(error, ShoalError):
            raise TargetError(f"{path} failed while it was imported:\n\n{user_traceback(error)}") from None
        raise
    return module


def _load_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and not name.startswith(error.name):
            raise
        hint = f"; did you mean {name}.py:...?" if Path(f"{name}.py").exists() else ""
        raise TargetError(f"there is no module {name!r}{hint}") from None


def _arguments(name: str, function: Callable[..., Any], settings: Sequence[str]) -> dict[str, Any]:
    parameters = _parameters(function)
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise TargetError(f"--set got {setting!r}, expected name=value")
        if key not in parameters:
            valid = ", ".join(parameters) or "no parameter"
            raise TargetError(f"--set {key}: {name} takes {valid}{nearest(key, parameters)}")
        value = _convert(key, text, parameters[key])
        arguments[key] = str(value) if isinstance(value, Path) else value  # plain values only: they are stored as JSON
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if absent := [n for n in missing if n not in arguments]:
        raise TargetError(f"{name} needs a value for {absent[0]}: add --set {absent[0]}=...")
    return arguments


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function, eval_str=True).parameters
    except NameError:  # an annotation that exists for type checkers only
        return inspect.signature(function).parameters


def _convert(key: str, text: str, parameter: inspect.Parameter) -> Any:
    kind = parameter.annotation
    kind = {"int": int, "float": float, "str": str, "bool": bool}.get(kind, kind) if isinstance(kind, str) else kind
    if kind is parameter.empty:
        kind = type(parameter.default) if parameter.default not in (None, parameter.empty) else str
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    try:
        return _choose(text, choices) if choices else _PARSERS[kind](text)
    except KeyError:
        name = getattr(kind, "__name__", kind)
        raise TargetError(
            f"--set {key}: the parameter is a {name}, which no text on the command line can give"
        ) from None
    except ValueError:
        expected = ", ".join(map(str, choices)) or _EXPECTED[kind]
        raise TargetError(f"--set {key}: got {text!r}, expected {expected}{nearest(text, map(str, choices))}") from None


def _typed(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths of the arguments that are to be paths."""
    parameters = _parameters(function)
    return {
        key: Path(value) if isinstance(value, str) and _is_path(parameters[key].annotation) else value
        for key, value in arguments.items()
    }


def _is_path(annotation: Any) -> bool:
    return annotation is Path or Path in typing.get_args(annotation)


def _choose(text: str, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_PARSERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, bool: _boolean, Path: Path}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def code_of(name: str) -> str:
    """SHA-256 of the file behind a job's name, as it is now."""
    location = name.rpartition(":")[0]
    if location.endswith(".py"):
        source = Path(location)
    else:
        spec = importlib.util.find_spec(location)
        source = Path(spec.origin) if spec is not None and spec.origin else Path()
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
