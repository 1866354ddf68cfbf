"""The numerical core: tensors in, tensors out, no modules, no state."""

from bayesdl.ops.distance import sqdist
from bayesdl.ops.dual import erf_dual, erf_dual_slopes, relu_dual, relu_dual_slopes
from bayesdl.ops.factor import CholeskyResult, cholesky
from bayesdl.ops.gaussian import (
    GPState,
    append,
    condition,
    joint_moments,
    leave_one_out,
    log_marginal,
    marginal_moments,
)
from bayesdl.ops.lbfgs import LBFGSResult, minimize_lbfgs
from bayesdl.ops.marginal import Marginal, marginal_log_likelihood, mll_and_grad

__all__ = [
    "CholeskyResult",
    "GPState",
    "LBFGSResult",
    "Marginal",
    "append",
    "cholesky",
    "condition",
    "erf_dual",
    "erf_dual_slopes",
    "joint_moments",
    "leave_one_out",
    "log_marginal",
    "marginal_log_likelihood",
    "marginal_moments",
    "minimize_lbfgs",
    "mll_and_grad",
    "relu_dual",
    "relu_dual_slopes",
    "sqdist",
]
