"""Checks of what a user hands in to be called, at construction rather than at the first request."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelcache.errors import ConfigError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_callable(value: object, setting: str, arguments: int) -> Callable[..., Any]:
    """Return ``value`` where it can be called with ``arguments`` positional arguments.

    Raises:
        ConfigError: it can't be called, is a coroutine function, or takes another number of arguments.
    """
    if not callable(value):
        raise ConfigError(f"{setting}={value!r} is not callable", setting=setting, value=value)
    if is_async(value):
        raise ConfigError(
            f"{setting}={_name(value)} is a coroutine function: give a plain function", setting=setting, value=value
        )
    signature = _signature(value)
    if signature is not None:
        try:
            signature.bind(*[None] * arguments)
        except TypeError as error:
            raise ConfigError(
                f"{setting}={_name(value)} can't be called with {arguments} argument(s): {error}",
                setting=setting,
                value=value,
            ) from error
    return value


def make_load(load: object) -> Callable[[Path, str], Any]:
    """Return the user's loader as ``load(path, model)``.

    It gets the model's id where it requires a second positional argument, else only the path.

    Raises:
        ConfigError: as ``check_callable``.
    """
    if not callable(load):
        raise ConfigError(
            f"load={load!r} is not callable: give a function that takes a pathlib.Path and returns the model",
            setting="load",
            value=load,
        )
    wants = _required(load)
    function = check_callable(load, "load", max(wants, 1))
    if wants > 1:
        return function
    return lambda path, _: function(path)


def is_async(value: object) -> bool:
    """Whether calling ``value`` gives something to await: a coroutine function, or an object with an async call."""
    return any(
        inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in (value, type(value).__call__)
    )


def _required(function: Callable[..., Any]) -> int:
    signature = _signature(function)
    if signature is None:
        return 1
    parameters = signature.parameters.values()
    wants = sum(one.kind in _POSITIONAL and one.default is inspect.Parameter.empty for one in parameters)
    if wants > 2:  # noqa: PLR2004 - path and model
        raise ConfigError(
            f"load={_name(function)} requires {wants} arguments: it is called as load(path) or load(path, model)",
            setting="load",
            value=function,
        )
    return wants


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return None


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
