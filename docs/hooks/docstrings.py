"""Docstrings as Markdown: what they mark as literal, and examples, as blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Literals(griffe.Extension):
    """Takes the marks of literal blocks away, whose indentation says the same in Markdown, and
    puts fences around examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"(?m)^[ \t]*::[ \t]*$\n?", "", obj.docstring.value)
        text = re.sub(r"(?m)::$", ":", text)
        # A line that begins with >>>, and all up to the next empty one.
        example = re.compile(r"(?m)^([ \t]*)>>> .*(?:\n[ \t]*\S.*)*")
        obj.docstring.value = example.sub(r"\1```pycon\n\g<0>\n\1```", text)
