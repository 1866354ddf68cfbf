"""Covariance functions: stationary, periodic, linear, infinitely wide networks, and their scaled sums and products."""

from bayesdl.kernels.activations import Activation
from bayesdl.kernels.algebra import Product, Scale, Sum
from bayesdl.kernels.base import Kernel, autograd_pullback
from bayesdl.kernels.bounded import Bounded
from bayesdl.kernels.convolution import Conv, Flatten, GlobalAveragePool
from bayesdl.kernels.coregionalization import Coregionalization
from bayesdl.kernels.derivatives import Derivatives, Observed, check_differentiable, derivatives
from bayesdl.kernels.infinite_width import FiniteNetwork
from bayesdl.kernels.layers import Dense, Layer, Residual, Serial
from bayesdl.kernels.linear import Linear
from bayesdl.kernels.nngp import NNGP, NTK, InfiniteWidth, critical
from bayesdl.kernels.periodic import Periodic
from bayesdl.kernels.stationary import RBF, Matern, RationalQuadratic

__all__ = [
    "NNGP",
    "NTK",
    "RBF",
    "Activation",
    "Bounded",
    "Conv",
    "Coregionalization",
    "Dense",
    "Derivatives",
    "FiniteNetwork",
    "Flatten",
    "GlobalAveragePool",
    "InfiniteWidth",
    "Kernel",
    "Layer",
    "Linear",
    "Matern",
    "Observed",
    "Periodic",
    "Product",
    "RationalQuadratic",
    "Residual",
    "Scale",
    "Serial",
    "Sum",
    "autograd_pullback",
    "check_differentiable",
    "critical",
    "derivatives",
]
