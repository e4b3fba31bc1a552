"""``report.html``, one self-contained page about an analysis, and its figures as PNG files for slides."""

from collections.abc import Callable, Iterator
from functools import partial

from etils import epath
from matplotlib.figure import Figure

from clp_jax.analysis import Analysis, EvidenceOptions
from clp_jax.findings import Findings
from clp_jax.history import REPORT
from clp_jax.report.canvas import file_name, inline_svg, png, style
from clp_jax.report.criteria import comparison, pruned_groups
from clp_jax.report.heatmaps import colour_range, heat_map
from clp_jax.report.page import page
from clp_jax.report.profiles import cost_curve, profile, variants
from clp_jax.report.view import GroupView, group_views


def write_report(folder: epath.Path, analysis: Analysis, findings: Findings, options: EvidenceOptions) -> None:
    """Writes ``report.html`` and its figures into an existing folder.

    The page embeds its figures and loads nothing. The PNG files are ``cka_<tower>``, ``profile_<group>``,
    ``variants_<group>``, ``costs_<group>`` and ``criteria``.

    Args:
      folder: where to write; files of the same names are replaced.
      analysis: from ``analyse``.
      findings: what it comes to.
      options: which variant of CKA the selection read.
    """
    views = group_views(analysis, findings, options)
    drawings = {}
    for name, draw in _figures(findings, views):
        with style(name):
            figure = draw()
            (folder / file_name(name)).write_bytes(png(figure))
            drawings[name] = inline_svg(figure, name.replace("_", " "))
    (folder / REPORT).write_text(page(analysis, findings, options, views, drawings), encoding="utf-8")


def _figures(findings: Findings, views: tuple[GroupView, ...]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Names of the figures and how to draw each."""
    colours = colour_range(views)
    for view in views:
        for tower in view.towers:
            yield f"cka_{tower}", partial(heat_map, view, tower, colours)
        yield f"profile_{view.name}", partial(profile, view)
        yield f"variants_{view.name}", partial(variants, view)
        costs = view.jump_costs()
        if costs is not None and len(costs) > 2:
            yield f"costs_{view.name}", partial(cost_curve, view, costs)
    groups = pruned_groups(findings, views)
    if groups:
        yield "criteria", partial(comparison, findings, groups)
