"""What a run tells while it trains: metrics.csv, norms.csv, curves.png, and TensorBoard's files if asked."""

from pathlib import Path

from chex import ArrayTree

import jbn.tools
from curves import MetricsFile, draw_curves
from errors import UsageError


class Log:
    """The record of a run in its folder. Rows after `last_step` a resumed run writes again."""

    def __init__(self, folder: Path, *, last_step: int, tensorboard: bool) -> None:
        self._folder = folder
        self._metrics = MetricsFile(folder / "metrics.csv", last_step=last_step)
        self._writer = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard: needs the package tensorboardX") from None
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: dict[str, float | None]) -> None:
        """A row of metrics.csv; None where nothing was measured at its step."""
        self._metrics.write(row)
        self._add_scalars({name: value for name, value in row.items() if value is not None}, row["step"])

    def report_norms(
        self, variables: ArrayTree, moments: ArrayTree, step: int
    ) -> tuple[float, tuple[str, ...]]:
        """Writes norms.csv: every batch norm, and how far evaluation is from training on the last batch.

        Returns:
          The largest drift, and in sentences what is wrong.
        """
        report = jbn.tools.report(variables, moments)
        report.to_csv(self._folder / "norms.csv")
        self._add_scalars(report.to_dict("norms/"), step)
        return report.rows[0].drift, report.notes

    def _add_scalars(self, numbers: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._metrics.close()
        if self._writer is not None:
            self._writer.close()
        draw_curves(self._folder / "metrics.csv", self._folder / "curves.png")
