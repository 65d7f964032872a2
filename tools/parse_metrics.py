"""Tables and plots from the ``metrics.json`` of finished runs.

    python tools/parse_metrics.py results/exp0 results/exp1 [--all] [--format markdown] [--output table.md]
    python tools/parse_metrics.py --compare results/exp0 results/exp1
    python tools/parse_metrics.py --join results/exp1_10/,results/exp1_90/ results/exp0

Numbers behind ± are standard errors over images: sample standard deviation (n - 1) over sqrt(n).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from particledaps.reports.comparison import ComparisonError
from particledaps.reports.comparison_table import comparison_table
from particledaps.reports.finished_runs import ResultsError, Run, join_runs
from particledaps.reports.plots import write_plots
from particledaps.reports.read_metrics import read_run
from particledaps.reports.summary import run_table
from particledaps.reports.tables import RENDERERS, Table, terminal


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="parse_metrics.py", description="Tables and plots of finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a metrics.json, or a run folder that holds one")
    parser.add_argument("--join", action="store_true", help="A,B is one run over the images of A and of B")
    parser.add_argument("--compare", action="store_true", help="paired differences of every other run to the first")
    parser.add_argument("--all", action="store_true", help="every column, not the compact set")
    parser.add_argument("--format", choices=tuple(RENDERERS), default="terminal")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write plots there, as PNGs")
    return parser


def read_argument(argument: str, join: bool) -> Run:
    """The run that one argument names; with ``join``, its comma-separated parts as one run.

    Raises:
        ResultsError: a part cannot be read or joined.
    """
    if not join:
        if "," in argument and not Path(argument).exists():
            raise ResultsError(f"{argument} does not exist; to join the runs between commas, give --join")
        return read_run(Path(argument))
    parts = [read_run(Path(part)) for part in argument.split(",") if part]
    if not parts:
        raise ResultsError(f"{argument!r} names no run")
    return join_runs(parts)


def make_table(runs: list[Run], compare: bool, everything: bool) -> tuple[Table, list[str]]:
    """The table that was asked for, and notes on what it leaves out.

    Raises:
        ResultsError: fewer than two runs to compare.
        ComparisonError: runs that cannot be paired.
    """
    if not compare:
        return run_table(runs, everything), []
    if len(runs) < 2:
        raise ResultsError("--compare needs two runs or more")
    return comparison_table(runs, everything)


def render(table: Table, arguments: argparse.Namespace) -> str:
    """The table as text; a terminal gets it in blocks of its width."""
    if arguments.format == "terminal" and arguments.output is None and sys.stdout.isatty():
        return terminal(table, shutil.get_terminal_size().columns)
    return RENDERERS[arguments.format](table)


def report(arguments: argparse.Namespace) -> list[str]:
    """Do what the arguments ask for; returns notes for the reader.

    Raises:
        ResultsError: a run cannot be read or joined.
        ComparisonError: runs that cannot be paired.
        OSError: an output cannot be written.
    """
    runs = [read_argument(argument, arguments.join) for argument in arguments.runs]
    table, notes = make_table(runs, arguments.compare, arguments.all)
    text = render(table, arguments)
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    if arguments.plot is not None:
        written, left_out = write_plots(arguments.plot, runs)
        notes += [*left_out, *(f"wrote {path}" for path in written)]
    return notes


def main(argv: list[str] | None = None) -> None:
    """The command line; bad input ends with one sentence on stderr and status 2."""
    parser = build_parser()
    try:
        notes = report(parser.parse_args(argv))
    except (ResultsError, ComparisonError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    main()
