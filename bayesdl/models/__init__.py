"""Models: a prior over functions and a likelihood, knowing nothing of data or inference."""

from bayesdl.models.bnn import BNN, WeightSpace
from bayesdl.models.gp import GP, Layout
from bayesdl.models.learned import Learned
from bayesdl.models.log_density import LogDensity
from bayesdl.models.task_mean import TaskMean

__all__ = ["BNN", "GP", "Layout", "Learned", "LogDensity", "TaskMean", "WeightSpace"]
