"""Priors: on the weights of networks, on positive hyper-parameters, and on the scale of a random function."""

from bayesdl.hyper import Gamma, HalfNormal, LogNormal
from bayesdl.priors.scale import BurrXII, Exponential, HalfCauchy, HyperScale, InverseGamma, ScalePrior, UserScale
from bayesdl.priors.weights import Laplace, Normal, StudentT, WeightPrior

__all__ = [
    "BurrXII",
    "Exponential",
    "Gamma",
    "HalfCauchy",
    "HalfNormal",
    "HyperScale",
    "InverseGamma",
    "Laplace",
    "LogNormal",
    "Normal",
    "ScalePrior",
    "StudentT",
    "UserScale",
    "WeightPrior",
]
