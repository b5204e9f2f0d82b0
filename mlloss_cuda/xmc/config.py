"""Options from a file: what a command takes as flags, as TOML or JSON."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

from mlloss_cuda.xmc.data.files import open_regular


def use_config(path: str | os.PathLike[str], parser: argparse.ArgumentParser) -> None:
    """Make what a file says the defaults of a parser, so that flags given to it win.

    Keys are the parser's long flags without the dashes in front, with - or _ inside. A value is of
    the type that the flag takes; of one that takes none, true or false. A file is JSON if its name
    ends in .json, and TOML otherwise.

    Raises:
        ValueError: the file is malformed, a key is unknown or given twice, or a value is of the
            wrong type or none of the choices; names file, key and reason.
        OSError: it cannot be read.
        ModuleNotFoundError: TOML needs tomli under Python 3.10, and it is not installed.
    """
    path = Path(path)
    actions = {
        flag: action
        for flag, action in parser._option_string_actions.items()
        if flag == action.option_strings[0] and flag != "--config"  # nor -h and --no-quiet
    }
    defaults: dict[str, Any] = {}
    for key, value in _read(path).items():
        flag = "--" + key.replace("_", "-")
        if flag not in actions:
            close = difflib.get_close_matches(flag, actions, n=1)
            hint = f"; is it {close[0][2:]}?" if close else ""
            raise ValueError(f"{path}: {key}: no option of this name{hint}")
        action = actions[flag]
        if action.dest in defaults:
            raise ValueError(f"{path}: {key}: given twice, with - and with _")
        try:
            defaults[action.dest] = _checked(action, value)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {key}: {error}") from error
    parser.set_defaults(**defaults)


def _read(path: Path) -> dict[str, Any]:
    """What is in the file, not yet checked."""
    with open_regular(path) as file:
        content = file.read()
    is_json = path.suffix.lower() == ".json"
    parse = json.loads if is_json else _toml_parser()
    try:
        values = parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # what cannot be decoded is a ValueError too
        raise ValueError(
            f"{path}: not readable as {'JSON' if is_json else 'TOML'}: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object with options as keys, got {_shown(values)}")
    return values


def _toml_parser() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TOML files need tomli under Python 3.10; install it with: "
                "pip install 'mlloss_cuda[xmc]'",
                name=error.name,
            ) from error
    return tomllib.loads


def _checked(action: argparse.Action, value: Any) -> Any:
    """The value as the command line would have it.

    Raises:
        ValueError: it is of the wrong type, or none of the choices.
        OverflowError: it is a whole number too large to be any other.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if action.nargs == 0:
        fits, expected = isinstance(value, bool), "true or false"
    elif action.type is float:
        fits, expected = is_number, "a number"
    elif action.type is int:
        fits, expected = is_number and isinstance(value, int), "a whole number"
    else:
        fits, expected = isinstance(value, str), "a string"
    if not fits:
        raise ValueError(f"expected {expected}, got {_shown(value)}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"expected one of {', '.join(action.choices)}, got {_shown(value)}")
    return action.type(value) if callable(action.type) else value


def _shown(value: Any) -> str:
    """A value in few characters: strings in quotes, to tell them from numbers."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
