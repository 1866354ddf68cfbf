"""Bayesian optimisation: any engine proposes where to look next, and the record of the search survives its workers."""

from bayesdl.bo.cost import KnownCost, LearnedCost
from bayesdl.bo.minimize import Result, minimize
from bayesdl.bo.space import Choice, Environment, Fidelity, Float, Integer, Risk, Space
from bayesdl.bo.study import Study
from bayesdl.bo.trial import Recommendation, Trial
from bayesdl.bo.trust_region import TrustRegion

__all__ = [
    "Choice",
    "Environment",
    "Fidelity",
    "Float",
    "Integer",
    "KnownCost",
    "LearnedCost",
    "Recommendation",
    "Result",
    "Risk",
    "Space",
    "Study",
    "Trial",
    "TrustRegion",
    "minimize",
]
