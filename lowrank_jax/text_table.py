"""Tables as text, for ``str``."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def as_text(table: Table, width: int) -> str:
    """A rich table without colours, blanks at the ends of its lines, or empty lines around it.

    Example:
      >>> from rich.table import Table
      >>> as_text(Table("rank", box=None, padding=0), 20)
      'rank'
    """
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
