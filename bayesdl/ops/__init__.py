"""The numerical core: tensors in, tensors out, no modules, no state."""

from bayesdl.ops.cg import CGResult, pcg
from bayesdl.ops.distance import sqdist
from bayesdl.ops.dual import Dual, Erf, Exponential, Gelu, Rectifier, Step
from bayesdl.ops.dual_series import Series
from bayesdl.ops.factor import CholeskyResult, cholesky
from bayesdl.ops.gaussian import (
    GPState,
    condition,
    joint_moments,
    leave_one_out,
    log_marginal,
    marginal_moments,
)
from bayesdl.ops.inducing import (
    CollapsedBound,
    InducingSums,
    collapsed_bound,
    gauss_hermite,
    greedy_pivots,
    inducing_factor,
    inverse_gamma_kl,
    inverse_gamma_nodes,
    standard_normal_kl,
    whitened_moments,
)
from bayesdl.ops.lanczos import LogDet, lanczos_log_det
from bayesdl.ops.lbfgs import LBFGSResult, minimize_lbfgs
from bayesdl.ops.marginal import Marginal, marginal_log_likelihood, mll_and_grad
from bayesdl.ops.preconditioner import Pivots, Preconditioner, preconditioner, random_pivots
from bayesdl.ops.products import KernelOperator, cross_covariance, cross_product, kernel_operator
from bayesdl.ops.refine import RefinedSolve, refined_solve
from bayesdl.ops.solver import LinearSystem, SolverConfig, linear_system
from bayesdl.ops.tiles import CombinedTiles, EvaluatedTiles, ScaledTiles, StationaryTiles, Tiles
from bayesdl.ops.update import Fantasy, append, downdate, fantasize, fantasy_moments, slide

__all__ = [
    "CGResult",
    "CholeskyResult",
    "CollapsedBound",
    "CombinedTiles",
    "Dual",
    "Erf",
    "EvaluatedTiles",
    "Exponential",
    "Fantasy",
    "GPState",
    "Gelu",
    "InducingSums",
    "KernelOperator",
    "LBFGSResult",
    "LinearSystem",
    "LogDet",
    "Marginal",
    "Pivots",
    "Preconditioner",
    "Rectifier",
    "RefinedSolve",
    "ScaledTiles",
    "Series",
    "SolverConfig",
    "StationaryTiles",
    "Step",
    "Tiles",
    "append",
    "cholesky",
    "collapsed_bound",
    "condition",
    "cross_covariance",
    "cross_product",
    "downdate",
    "fantasize",
    "fantasy_moments",
    "gauss_hermite",
    "greedy_pivots",
    "inducing_factor",
    "inverse_gamma_kl",
    "inverse_gamma_nodes",
    "joint_moments",
    "kernel_operator",
    "lanczos_log_det",
    "leave_one_out",
    "linear_system",
    "log_marginal",
    "marginal_log_likelihood",
    "marginal_moments",
    "minimize_lbfgs",
    "mll_and_grad",
    "pcg",
    "preconditioner",
    "random_pivots",
    "refined_solve",
    "slide",
    "sqdist",
    "standard_normal_kl",
    "whitened_moments",
]
