"""Checks for whoever adds an engine, a kernel or a model of their own.

`check_engine` and `check_kernel` state in one call everything that such a thing must obey; `sbc` tells whether an
engine draws from the posterior of a model.
"""

from bayesdl.testing._engine import check_engine
from bayesdl.testing._kernel import check_kernel
from bayesdl.testing._sbc import sbc
from bayesdl.testing._sbc_problems import NetworkPrior, ProcessPrior, SampledDensity

__all__ = ["NetworkPrior", "ProcessPrior", "SampledDensity", "check_engine", "check_kernel", "sbc"]
