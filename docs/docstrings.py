"""An extension of mkdocstrings: turns what docstrings say in Sphinx's manner into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
# An example: lines from a prompt to the next empty line or the end, with their indentation.
EXAMPLE = re.compile(r"^(?P<indent>[ ]*)>>> (?:.*\n?)(?:[ ]*\S.*\n?)*", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """Return `docstring` with roles as plain code and examples as fenced blocks."""

    def fenced(example: re.Match[str]) -> str:
        indent = example["indent"]
        return f"{indent}```pycon\n{example[0].rstrip()}\n{indent}```\n"

    return EXAMPLE.sub(fenced, ROLE.sub(r"`\1`", docstring))


class Docstrings(griffe.Extension):
    """Applies `as_markdown` to every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
