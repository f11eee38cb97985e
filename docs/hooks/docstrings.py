"""Docstrings as Markdown: a paragraph that ends in "::" says that what follows is literal."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Literals(griffe.Extension):
    """Takes the marks of literal blocks away, whose indentation says the same in Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"(?m)^[ \t]*::[ \t]*$\n?", "", obj.docstring.value)
        obj.docstring.value = re.sub(r"(?m)::$", ":", text)
