"""Lets the examples in docstrings stand as code on the pages: a paragraph of doctests becomes an ``Examples:`` section.

An extension of griffe (see mkdocs.yml), which knows doctests in such sections alone.
"""

import textwrap
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Gives the doctests of every docstring the heading that griffe looks for."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            headed = [f"Examples:\n{textwrap.indent(p, '    ')}" if p.startswith(">>>") else p for p in paragraphs]
            obj.docstring.value = "\n\n".join(headed)
