"""Priors: on the weights of networks, and on positive hyper-parameters."""

from bayesdl.hyper import Gamma, HalfNormal, LogNormal
from bayesdl.priors.weights import Laplace, Normal, StudentT, WeightPrior

__all__ = ["Gamma", "HalfNormal", "Laplace", "LogNormal", "Normal", "StudentT", "WeightPrior"]
