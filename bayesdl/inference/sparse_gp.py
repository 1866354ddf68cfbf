r"""Sparse Gaussian processes: m inducing points stand for n data points, for regression and classification.

    log p(y) >= E_q[ log p(y | f) ] - KL( q(u) || p(u) ),    f | u ~ p(f | u),    u = f(z)

For Gaussian noise the best q(u) is known, and leaves Titsias' collapsed bound for L-BFGS to maximise over
hyper-parameters and locations z. For minibatches and for classes, q(u) = N(m, S) with S of full rank takes
natural-gradient steps, while Adam moves the rest.

References: Titsias (2009); Hensman et al. (2013), arXiv 1309.6835; Hensman et al. (2015), arXiv 1411.2005; Burt et al.
(2020), arXiv 2008.00323.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bayesdl._random import Seed
from bayesdl.data import training_data
from bayesdl.inference._inducing import InducingSettings, check_settings, fit_inducing
from bayesdl.models import GP
from bayesdl.posterior import InducingPosterior


@dataclass(frozen=True)
class SparseGP:
    """A GP through inducing points: regression, two classes or more, on data too large for an exact GP.

    Attributes:
        model: The Gaussian process. Its likelihood decides: Gaussian, Bernoulli or Categorical, which has one latent
            function for each class, with a kernel in common.
        num_inducing: Inducing points of each data set and output, m; at most n are used. They start where, by a greedy
            choice, the prior is least determined by those already chosen.
        batch_size: Rows of a step. None takes all rows: for Gaussian noise the collapsed bound and L-BFGS.
        num_steps: Iterations of L-BFGS, or steps of the stochastic optimiser, at most.
        learning_rate: Of Adam, for hyper-parameters (in log scale) and inducing points (in standardised inputs), over
            the first 70 % of the steps; it then falls to 0. The collapsed bound does not use it.
        natural_learning_rate: Of the natural gradient of q(u), in (0, 1]; it falls likewise.
        num_samples: Draws of f for each point and step with a Categorical likelihood.
        optimize: Whether to estimate hyper-parameters; False keeps their initial values.
        move_inducing: Whether to optimise the locations of the inducing points.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar that counts steps.

    The inducing values are whitened by the Cholesky factor of their prior covariance, always: unwhitened coordinates
    only make the same optimum harder to reach.
    """

    model: GP
    num_inducing: int = 200
    batch_size: int | None = None
    num_steps: int = 500
    learning_rate: float = 0.02
    natural_learning_rate: float = 0.1
    num_samples: int = 16
    optimize: bool = True
    move_inducing: bool = True
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        check_settings("SparseGP", self.model, self._settings())

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> InducingPosterior:
        """Condition on x (*b, n, d) and y (*b, n) or (*b, n, k); each data set and output has its own hyper-parameters.

        `diagnostics["elbo"]` is the bound on log p(y) at the end, in the user's units; `log_evidence` stays None.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The bound is not finite.

        Warns:
            ConvergenceWarning: The bound still rose when the steps were over, or q(u) stayed at the prior.
            NumericalWarning: The inducing points' covariance needed more jitter than 1e-8 of the prior variance.

        Cost: O(n m^2) for each evaluation of the collapsed bound, O(B m^2 + m^3) for each step over B rows (times the
        number of classes); O(m^2) memory and one tile of rows, never an (n, m) matrix.
        """
        data = training_data("SparseGP.fit", x, y)
        return fit_inducing("SparseGP.fit", self.model, data, self._settings(), seed=seed)

    def _settings(self) -> InducingSettings:
        return InducingSettings(
            num_inducing=self.num_inducing,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            natural_learning_rate=self.natural_learning_rate,
            num_samples=self.num_samples,
            optimize=self.optimize,
            move_inducing=self.move_inducing,
            standardize=self.standardize,
            progress=self.progress,
        )
