"""Covariance functions: stationary, periodic, linear, infinitely wide networks, and their scaled sums and products."""

from bayesdl.kernels.algebra import Product, Scale, Sum
from bayesdl.kernels.base import Kernel, autograd_pullback
from bayesdl.kernels.linear import Linear
from bayesdl.kernels.nngp import NNGP
from bayesdl.kernels.periodic import Periodic
from bayesdl.kernels.stationary import RBF, Matern, RationalQuadratic

__all__ = [
    "NNGP",
    "RBF",
    "Kernel",
    "Linear",
    "Matern",
    "Periodic",
    "Product",
    "RationalQuadratic",
    "Scale",
    "Sum",
    "autograd_pullback",
]
