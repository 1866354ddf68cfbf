"""Checks for whoever adds an engine or a kernel: one call states everything that such a thing must obey."""

from bayesdl.testing._engine import check_engine
from bayesdl.testing._kernel import check_kernel

__all__ = ["check_engine", "check_kernel"]
