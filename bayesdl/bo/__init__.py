"""Bayesian optimisation: any engine proposes where to look next, and the record of the search survives its workers."""

from bayesdl.bo.minimize import Result, minimize
from bayesdl.bo.space import Choice, Float, Integer, Space
from bayesdl.bo.study import Study, Trial

__all__ = ["Choice", "Float", "Integer", "Result", "Space", "Study", "Trial", "minimize"]
