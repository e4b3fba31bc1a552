"""What healing did to every kept block, as a table on the terminal."""

import math
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from clp_jax.healing import Repair


def repairs_table(repairs: Iterable[Repair]) -> Table:
    """A row for every block, in the order in which data flows."""
    table = Table(title="Distance of the stream from what the next block expects, held-out data")
    for column in ("tower", "block", "removed after it", "before", "healed"):
        table.add_column(column, justify="right" if column in ("block", "before", "healed") else "left")
    for one in repairs:
        before = "" if math.isnan(one.before) else f"{one.before:.1%}"
        block = "" if one.block is None else str(one.block)
        table.add_row(escape(one.tower), block, " ".join(map(str, one.removed)), before, one.outcome)
    return table
