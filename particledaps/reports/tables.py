"""A table of numbers with standard errors as terminal text, Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from particledaps.reports.comparison import Estimate

Cell = str | int | float | Estimate | None
DASH = "-"
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {c: f"\\{c}" for c in "&%$#_{}"}


class Column(NamedTuple):
    """One column.

    Attributes:
        key: name in CSV, with the unit at its end.
        title: heading elsewhere, with the unit in brackets.
        spec: format of its numbers where they are rounded, as in ``format(value, spec)``; empty for text. With a
            "g" the standard error of an ``Estimate`` decides how many decimals both have.
        with_error: do its cells hold an ``Estimate``? CSV then has a second column, ``<key>_se``.
    """

    key: str
    title: str
    spec: str = ""
    with_error: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and rows with one cell a column; None is a value that does not exist."""

    columns: list[Column]
    rows: list[list[Cell]]


def cell_text(cell: Cell, spec: str, plus_minus: str = "±") -> str:
    """``20.00 ± 0.50``; a dash for what does not exist."""
    if isinstance(cell, Estimate):
        if cell.mean is None:
            return DASH
        spec = _matched(spec, cell.standard_error)
        return " ".join([cell_text(cell.mean, spec), plus_minus, cell_text(cell.standard_error, spec)])
    if cell is None or isinstance(cell, str):
        return DASH if cell is None else cell
    return format(cell, spec)


def _matched(spec: str, standard_error: float | None) -> str:
    """Three significant digits of the standard error where ``spec`` leaves decimals open."""
    if not spec.endswith("g") or not standard_error:
        return spec
    return f".{max(0, 2 - math.floor(math.log10(standard_error)))}f"


def terminal(table: Table, width: int | None = None) -> str:
    """Aligned columns.

    Args:
        table: the table.
        width: characters a line; columns that do not fit follow in further blocks. None: no limit.
    """
    lists = [[c.title, *(cell_text(r[i], c.spec) for r in table.rows)] for i, c in enumerate(table.columns)]
    padded = [_aligned(texts, left=not c.spec) for c, texts in zip(table.columns, lists, strict=True)]
    blocks, current = [], padded[:1]
    for column in padded[1:]:
        if width is not None and len(current) > 1 and sum(len(c[0]) + 2 for c in [*current, column]) > width + 2:
            blocks, current = [*blocks, current], padded[:1]
        current = [*current, column]
    return "\n".join("".join(_block_line(line) for line in zip(*b, strict=True)) for b in [*blocks, current])


def _aligned(texts: list[str], left: bool) -> list[str]:
    width = max(len(text) for text in texts)
    lines = [text.ljust(width) if left else text.rjust(width) for text in texts]
    return [lines[0], "-" * width, *lines[1:]]


def _block_line(cells: tuple[str, ...]) -> str:
    return "  ".join(cells).rstrip() + "\n"


def markdown(table: Table) -> str:
    """A Markdown table; pipes in names are escaped."""
    titles = [c.title for c in table.columns]
    rows = [[cell_text(v, c.spec) for v, c in zip(row, table.columns, strict=True)] for row in table.rows]
    rule = ["--:" if c.spec else ":--" for c in table.columns]
    return "".join(
        f"| {' | '.join(cells)} |\n"
        for cells in [
            [_one_line(t) for t in titles],
            rule,
            *([_one_line(t) for t in row] for row in rows),
        ]
    )


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def comma_separated(table: Table) -> str:
    """CSV at full precision: a standard error has its own column, what does not exist is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([key for c in table.columns for key in [c.key, f"{c.key}_se"][: 1 + c.with_error]])
    for row in table.rows:
        writer.writerow([v for cell, c in zip(row, table.columns, strict=True) for v in _fields(cell, c.with_error)])
    return text.getvalue()


def _fields(cell: Cell, with_error: bool) -> list[str | int | float | None]:
    if isinstance(cell, Estimate):
        return [cell.mean, cell.standard_error]
    return [cell, None] if with_error else [cell]


def latex(table: Table) -> str:
    """A LaTeX ``tabular`` that needs no package."""
    places = "".join("r" if c.spec else "l" for c in table.columns)
    lines = [f"\\begin{{tabular}}{{{places}}}", r"\hline"]
    lines += [" & ".join(_escaped(c.title) for c in table.columns) + r" \\", r"\hline"]
    for row in table.rows:
        lines.append(" & ".join(_latex_cell(v, c.spec) for v, c in zip(row, table.columns, strict=True)) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _latex_cell(cell: Cell, spec: str) -> str:
    text = cell_text(cell, spec, r"\pm")
    return _escaped(text) if isinstance(cell, str) or text == DASH else f"${text}$"


RENDERERS: dict[str, Callable[[Table], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
}
