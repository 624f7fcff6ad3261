"""The report as text: a table of 100 columns with sentences below it, and CSV."""

import csv
import dataclasses
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jbn._core.errors import error, public
from jbn._core.running import SATURATED_COUNT
from jbn.tools._models import join_paths
from jbn.tools._report.channels import FAR, Channels, LayerReport

_WIDTH = 100
_FINITE = "Go back to statistics that are finite."
_KEEP = "Keep the batch_stats that training returns."
_DIFFERENCE = (
    "by more than half a standard deviation between running and batch statistics: evaluation will be worse "
    "than training. Run jbn.tools.recalibrate, lower momentum, or check that evaluation data is preprocessed "
    "as training data."
)
_DEAD = "the output does not depend on the input."
_LEGEND = (
    "drift: root mean square of y by running less y by batch statistics, in standard deviations of y; "
    "mean drift, in standard deviations of the batch, and log2 variance: worst channel / median."
)


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Every batch norm of a model: `print` shows it in 100 columns, and `rich.print` in colors too.

    Layers that are far off, or hold NaN or inf, are red; those with dead channels or no update are yellow.

    Attributes:
      rows: one `LayerReport` per batch norm, worst first if a drift is known.
      channels: for each row the values that it sums up.

    Example:
      >>> import jbn, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> found = jbn.tools.report({"params": params, "batch_stats": batch_stats})
      >>> print(found.to_csv().splitlines()[1])
      ,2,,True,0,0,0.0,0.0,1.0,1.0,1.0,1.0,,,,,
    """

    rows: tuple[LayerReport, ...]
    channels: tuple[Channels, ...] = dataclasses.field(compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong, in sentences; empty if nothing is."""
        dead, channels = (sum(getattr(row, name) for row in self.rows) for name in ("dead", "channels"))
        broken = [row.path for row in self.rows if row.nonfinite]
        new = [row.path for row in self.rows if row.never_updated]
        far = [row.path for row in self.rows if row.drift is not None and row.drift > FAR]
        told = {
            f"{self._layers(broken, 'has', 'have')} NaN or inf: {join_paths(broken)}. {_FINITE}": broken,
            f"{self._layers(new, 'was', 'were')} never updated: {join_paths(new)}. {_KEEP}": new,
            f"{self._layers(far, 'differs', 'differ')} {_DIFFERENCE}": far,
            f"{dead} of {channels} channels {'is' if dead == 1 else 'are'} dead: {_DEAD}": dead,
        }
        return tuple(note for note, wrong in told.items() if wrong)

    @public
    def to_csv(self, file: str | os.PathLike[str] | TextIO | None = None) -> str:
        """The rows as CSV, one column per attribute of `LayerReport`; None is an empty field.

        Args:
          file: a path, or an open text file, that gets the text too.

        Returns:
          The text.

        Raises:
          ValueError: a file that is neither.
        """
        if not (
            file is None or isinstance(file, (str, os.PathLike)) or callable(getattr(file, "write", None))
        ):
            expected, fix = "a path or an open text file", "For example 'report.csv'."
            raise error("file", repr(file), expected, fix)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(LayerReport))
        writer.writerows(dataclasses.astuple(row) for row in self.rows)
        if isinstance(file, (str, os.PathLike)):
            File(file).write_text(text.getvalue(), encoding="utf-8", newline="")
        elif file is not None:
            file.write(text.getvalue())
        return text.getvalue()

    @public
    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """The numbers of all rows, each under a name of its own, for loggers such as W&B and TensorBoard.

        Args:
          prefix: what each name begins with, such as `"batch_norm/"`.

        Returns:
          A float for each attribute of `LayerReport` that is a number and not None. Its name is the prefix,
          the path, "/" and the attribute; without path and "/" if the model is one batch norm.

        Raises:
          ValueError: a prefix that is no string.

        Example:
          >>> import jbn, jbn.tools
          >>> params, batch_stats = jbn.init(2)
          >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}
          >>> numbers = jbn.tools.report(variables).to_dict(prefix="norms/")
          >>> print(numbers["norms/bn/var_max"], numbers["norms/bn/dead"])
          1.0 0.0
        """
        if not isinstance(prefix, str):
            fix = "For example 'batch_norm/'."
            raise error("prefix", repr(prefix), "a text", fix)
        return {
            f"{prefix}{row.path}{'/' if row.path else ''}{name}": float(value)
            for row in self.rows
            for name, value in vars(row).items()
            if name != "path" and value is not None
        }

    def __str__(self) -> str:
        return "\n\n".join(
            textwrap.fill(part, _WIDTH) if isinstance(part, str) else _table(self.rows, part)
            for part in (*_columns(self.rows), *self.notes)
        )

    __repr__ = __str__

    def __rich__(self) -> Group:
        return Group(
            *(
                Text(f"{part}\n") if isinstance(part, str) else _rich_table(self.rows, part)
                for part in (*_columns(self.rows), *self.notes)
            )
        )

    def _layers(self, paths: Sequence[str], one: str, many: str) -> str:
        plural = "s" if len(self.rows) > 1 else ""
        return f"{len(paths)} of {len(self.rows)} layer{plural} {one if len(paths) == 1 else many}"


def _columns(rows: Sequence[LayerReport]) -> list[str | dict[str, list[str]]]:
    """The columns of one table, or of two with a text between them if there is a drift to tell."""
    about = {
        "channels": [str(row.channels) for row in rows],
        "updates": [_format_updates(row) for row in rows],
    }
    wrong = {
        "dead": [str(row.dead) for row in rows],
        "non-finite": [str(row.nonfinite or "") for row in rows],
    }
    ranges = {
        "mean": [_format_range(row.mean_min, row.mean_max) for row in rows],
        "var": [_format_range(row.var_min, row.var_max) for row in rows],
        "|scale|": [_format_range(row.scale_min, row.scale_max) for row in rows],
    }
    if all(row.drift is None for row in rows):
        return [about | ranges | wrong]
    drifts = {
        "drift": [_format_fixed(row.drift) for row in rows],
        "mean drift": [_format_pair(row.mean_drift_max, row.mean_drift_median) for row in rows],
        "log2 var": [_format_pair(row.var_drift_max, row.var_drift_median) for row in rows],
    }
    return [about | drifts | wrong, _LEGEND, ranges]


def _format_updates(row: LayerReport) -> str:
    if row.never_updated:
        return "never"
    if row.updates is None:
        return ""
    return str(row.updates) if row.updates < SATURATED_COUNT else "many"


def _table(rows: Sequence[LayerReport], columns: Mapping[str, list[str]]) -> str:
    """Aligned to the right, after the paths, which break into lines if they are too long; no empty column."""
    filled = {head: [head, *cells] for head, cells in columns.items() if any(cells)}
    sizes = [max(map(len, cells)) for cells in filled.values()]
    room = max(16, _WIDTH - sum(sizes) - 2 * len(sizes))
    names = [textwrap.wrap(path, room) for path in ("layer", *(row.path or "." for row in rows))]
    size = max(len(line) for name in names for line in name)
    lines = []
    for (first, *more), *cells in zip(names, *filled.values(), strict=True):
        parts = [cell.rjust(width) for cell, width in zip(cells, sizes, strict=True)]
        lines += ["  ".join([first.ljust(size), *parts]).rstrip(), *more]
    return "\n".join(lines)


def _rich_table(rows: Sequence[LayerReport], columns: Mapping[str, list[str]]) -> Table:
    """The same in colors."""
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for head in filled:
        table.add_column(head, justify="right", no_wrap=True)
    for row, *cells in zip(rows, *filled.values(), strict=True):
        style = "red" if row.is_far else "yellow" if row.dead or row.never_updated else None
        table.add_row(Text(row.path or "."), *cells, style=style)
    return table


def _format_number(value: float | None) -> str:
    """Two digits, or all of an integer; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value + 0.0:.2g}"
    return text.replace("e+0", "e").replace("e-0", "e-")


def _format_range(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{_format_number(low)}..{_format_number(high)}"


def _format_fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 1e3 else _format_number(value)


def _format_pair(worst: float | None, median: float | None) -> str:
    return "" if worst is None else f"{_format_fixed(worst)} / {_format_fixed(median)}"
