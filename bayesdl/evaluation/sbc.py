"""What simulation-based calibration found: ranks of the truth, and whether they are uniform; as a table, as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.evaluation.uniformity import EcdfBand, Uniformity, ecdf_band, uniformity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["SBCResult"]

_CURVE, _OUTSIDE, _BAND = "#0072B2", "#D55E00", "#bbbbbb"


@dataclass(frozen=True)
class SBCResult:
    """Ranks of known truths among posterior draws, by `testing.sbc`.

    Attributes:
        names: The Q quantities, those with axes taken apart: "theta[0]", "theta[1]", …
        ranks: How many of the ranked draws lie below the truth, (R, Q) for R replications.
        num_ranked: Draws that the truth was ranked among in each replication, (R), nearly independent ones.
        values: The ranks as numbers that are uniform on [0, 1] where all is well, (R, Q): (rank + V) / (num_ranked + 1)
            with V uniform on [0, 1).
        ess: Bulk effective sample size of every quantity in every replication, (R, Q).
        rhat: R-hat likewise; NaN where there was one short chain.
        level: Probability with which a uniform curve stays inside its band, each quantity by itself.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_ranked: Tensor
    values: Tensor
    ess: Tensor
    rhat: Tensor
    level: float = 0.99

    @property
    def num_replications(self) -> int:
        """R."""
        return len(self.values)

    @property
    def band(self) -> EcdfBand:
        """Where the curve of R uniform numbers stays with probability `level`."""
        return ecdf_band(self.num_replications, self.level)

    @property
    def p_values(self) -> dict[str, float]:
        """Of each quantity: the probability that uniform ranks come as near to some edge of their bands."""
        return {name: self._of(name).p_value for name in self.names}

    @property
    def inside(self) -> dict[str, bool]:
        """Of each quantity: whether its curve stays inside the band at all points."""
        return {name: self._of(name).exceedance <= 1e-12 for name in self.names}

    @property
    def passed(self) -> bool:
        """Whether no p-value falls below (1 - level) / Q, so that a right posterior fails with 1 - level at most."""
        return min(self.p_values.values()) > (1 - self.level) / len(self.names)

    def table(self) -> DataFrame:
        """One row a quantity: p_value, deviation (largest distance of the curve from the diagonal), exceedance (above 0
        it leaves the band), inside, smallest and median ESS, and largest R-hat over replications."""
        from pandas import DataFrame

        return DataFrame(self._rows()).set_index("quantity")

    def plot(self, names: tuple[str, ...] | None = None) -> Figure:
        """One panel a quantity: the empirical distribution function minus the diagonal, with its band.

        Draws that are too narrow give a curve above 0 on the left and below on the right, draws that are too wide the
        reverse, and draws that are too small (the truth ranks high) one that lies below 0.

        Args:
            names: The quantities to show; None shows all.
        """
        from matplotlib.figure import Figure

        names = self.names if names is None else names
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(3.0 * columns, 2.4 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, name in zip(grid.flat, names, strict=False):
            self.draw(axes, name)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("rank of the truth, scaled to (0, 1)", fontsize=9.5)
        figure.supylabel("ECDF minus uniform", fontsize=9.5)
        return figure

    def draw(self, axes: Axes, name: str) -> None:
        """Draw the panel of one quantity on the axes of a figure of your own."""
        band, found = self.band, self._of(name)
        z, x = band.z.numpy(), np.sort(self._column(name).numpy())
        axes.fill_between(
            z, band.low.numpy() - z, band.high.numpy() - z, color=_BAND, alpha=0.5, linewidth=0, step=None
        )
        axes.axhline(0.0, color="#6b6b6b", linewidth=0.7)
        curve = np.searchsorted(x, z, side="right") / len(x) - z
        axes.plot(z, curve, color=_CURVE if found.exceedance <= 1e-12 else _OUTSIDE, linewidth=1.3)
        axes.set_title(f"{name}   p = {found.p_value:.2g}", fontsize=9.5, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, 1)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for i, name in enumerate(self.names):
            found, ess, rhat = self._of(name), self.ess[:, i], self.rhat[:, i]
            usual = rhat[~rhat.isnan()]
            worst = float(usual.max()) if len(usual) else float("nan")
            rows.append(
                {"quantity": name, **found._asdict(), "inside": found.exceedance <= 1e-12}
                | {"ess_min": float(ess.min()), "ess_median": float(ess.median()), "rhat_max": worst}
            )
        return rows

    def _column(self, name: str) -> Tensor:
        if name not in self.names:
            wanted = f"name must be one of {', '.join(self.names)}."
            fail(SettingError, "SBCResult", wanted, got=repr(name), fix=f"pass {self.names[0]!r}, say")
        return self.values[:, self.names.index(name)]

    def _of(self, name: str) -> Uniformity:
        self._column(name)
        return self._found[name]

    @cached_property
    def _found(self) -> dict[str, Uniformity]:
        return {name: uniformity(self.values[:, i], self.level) for i, name in enumerate(self.names)}
