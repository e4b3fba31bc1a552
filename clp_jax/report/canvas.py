"""One figure, two outputs: a PNG for slides, and an inline SVG whose colours follow the page's light or dark theme."""

import contextlib
import html
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1f2a37",
    "muted": "#5f6b7a",
    "rule": "#d3d9e0",
    "wash": "#eef1f4",
    "unread": "#b8c0c9",
    "paper": "#fefefe",
    "removed": "#d55e00",
    "kept": "#0072b2",
    "alert": "#fff4e8",
}
"""Colours by role. Orange and blue are told apart with any colour vision; whatever is orange has a second mark, too."""

DARK = {
    "ink": "#e6eaef",
    "muted": "#9aa7b5",
    "rule": "#39434f",
    "wash": "#232b35",
    "unread": "#56616d",
    "paper": "#161b22",
    "removed": "#ff8c3f",
    "kept": "#5fb4ee",
    "alert": "#33261a",
}

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "text.usetex": False,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
}
PNG_DPI = 200


@contextlib.contextmanager
def style(name: str) -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; the same figure gives the same bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside of pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=PNG_DPI)
    figure.set_layout_engine(None)  # it is laid out now; doing it again for the page would take as long as drawing
    return stream.getvalue()


def inline_svg(figure: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element for a page that defines the colours as CSS variables (see `colours_css`)."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # Styles inside would apply to the whole page, and the names of groups repeat from figure to figure.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for role, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{role})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def file_name(name: str) -> str:
    """The PNG file of a figure.

    >>> file_name("cka_vlm"), file_name("cka_a/b")
    ('cka_vlm.png', 'cka_a_b.png')
    """
    return re.sub(r"[^\w.+-]", "_", name) + ".png"


def colours_css() -> str:
    """The CSS variables that figures and page share."""

    def variables(colours: dict[str, str]) -> str:
        return "".join(f"--{role}:{colour};" for role, colour in colours.items())

    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
    return f":root{{color-scheme:light dark;{variables(LIGHT)}}}\n{dark}"
