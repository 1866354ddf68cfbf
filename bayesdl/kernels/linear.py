r"""The linear kernel: the GP that Bayesian linear regression without an intercept is.

k(x, z) = sum_k variance_k x_k z_k,        f(x) = w . x,  w_k ~ N(0, variance_k)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.base import Functions, Lead, Params, Pullback, align, draw_uniform, get, per_row, reduce_to
from bayesdl.kernels.columns import OnColumns, PriorChoice, check_positive


@dataclass(frozen=True, kw_only=True)
class Linear(OnColumns):
    """variance * x . z, with one variance for all columns or one each (ard=True).

    Attributes:
        variance: Initial value, one number, or one per column with ard=True.
        ard: One variance per column, or (default) one for all.
        active_dims: Columns of x that the kernel looks at; None for all.
        variance_prior: A prior, None for a flat one, or "default": LogNormal(1, 1), whose mode is 1.
    """

    variance: float | tuple[float, ...] = 1.0
    ard: bool = False
    variance_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Linear", "variance", self.variance, self.ard)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`variance`, a scalar unless ard=True."""
        width = self._width(d)
        prior = LogNormal(1.0, 1.0) if self.variance_prior == "default" else self.variance_prior
        initial = self._per_column("variance", self.variance, width)
        return (Parameter("variance", (width,) if self.ard else (), initial, prior),)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        x = self._select(x)
        z = x if z is None else self._select(z)
        return (x * self._row_variance(params)) @ z.mT

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        return (self._select(x).square() * self._row_variance(params)).sum(-1)

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """dL/d(variance_k) = sum_i x_ik (p x)_ik."""
        params = self._resolved(x, params)
        with torch.no_grad():
            x = self._select(x)
            value = (x * self._row_variance(params)) @ x.mT

        def pullback(p: Tensor) -> Params:
            with torch.no_grad():
                per_column = (x * (p @ x)).sum(-2)
                grad = per_column if self.ard else per_column.sum(-1)
                return {"variance": reduce_to(grad, params["variance"].shape)}

        return value, pullback

    def _row_variance(self, params: Params) -> Tensor:
        return per_row(get(params, "variance", "Linear"), self.ard)

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """sqrt(d variance) x_k, where k runs through the columns from a random start: exact where d divides M."""
        width = self._width(d)
        start = (draw_uniform((*lead, 1), params, generator) * width).floor().long()
        column = (start + torch.arange(num_features, device=start.device)) % width
        choose = torch.nn.functional.one_hot(column, width).to(next(iter(params.values())).dtype)

        def evaluate(x: Tensor) -> Tensor:
            u = self._select(x) * (width * self._row_variance(params)).sqrt()
            return u @ align(choose, 2, u).mT

        return evaluate
