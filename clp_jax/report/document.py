"""What all our pages are made of: one HTML document that loads nothing, cards, and links between pages."""

import html
import os
import urllib.parse
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from clp_jax.folders import is_remote
from clp_jax.report.canvas import colours_css


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
      title: plain text.
      parts: ready-made HTML, one below the other.
    """
    css = colours_css() + resources.files("clp_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{css}</style></head>\n"
        "<body><main>" + "\n".join(parts) + "</main></body></html>\n"
    )


def card(label: str, value: str, note: str) -> str:
    """A number that stands out.

    Args:
      label: plain text above it.
      value: ready-made HTML, perhaps of `change_of`.
      note: plain text below it.
    """
    return f"<div><h3>{html.escape(label)}</h3><p>{value}</p><small>{html.escape(note)}</small></div>"


def change_of(before: str, after: str) -> str:
    """Two ready-made values with an arrow between them."""
    return f"{before} <i>→</i> <b>{after}</b>"


def link(target: str | os.PathLike[str], folder: str | os.PathLike[str], text: str) -> str:
    """A link from a page to another, which still leads there when both are moved together; words where nothing is.

    Args:
      target: path of a file.
      folder: the page's own.
      text: plain text to click on.
    """
    path = os.fspath(target)
    if is_remote(path) or is_remote(folder):
        return f"{html.escape(text)} (<code>{html.escape(path)}</code>)"
    if not Path(path).exists():
        return f"{html.escape(text)} (not found, it was at <code>{html.escape(path)}</code>)"
    relative = os.path.relpath(Path(path).resolve(), Path(folder).resolve())
    return f'<a href="{html.escape(urllib.parse.quote(relative))}">{html.escape(text)}</a>'
