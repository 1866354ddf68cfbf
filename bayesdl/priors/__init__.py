"""Priors: on weights of networks, on positive hyper-parameters, on the scale of a function, on whole data sets."""

from bayesdl.hyper import Gamma, HalfNormal, LogNormal
from bayesdl.priors import tasks
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
    "tasks",
]
