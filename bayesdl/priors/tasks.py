"""Priors over tasks, whole data sets at a time: what a prior-data fitted network is trained on.

One protocol: `sample(batch, n, d, generator)` returns a batch of independent data sets, drawn on the device of the
generator, with no loop over them. Float32 comes out; covariance matrices are factorised in float64.
"""

from bayesdl.priors._curves import CURVES
from bayesdl.priors._tasks_base import TaskPrior, Tasks
from bayesdl.priors._tasks_bo import HEBOPlus
from bayesdl.priors._tasks_conditional import Conditional
from bayesdl.priors._tasks_curves import LearningCurves
from bayesdl.priors._tasks_gp import FixedGP, HyperGP, NetworkGP, StudentTProcess
from bayesdl.priors._tasks_model import Mixture, ModelTasks
from bayesdl.priors._tasks_network import NeuralNetwork
from bayesdl.priors._tasks_tabular import Tabular

__all__ = [
    "CURVES",
    "Conditional",
    "FixedGP",
    "HEBOPlus",
    "HyperGP",
    "LearningCurves",
    "Mixture",
    "ModelTasks",
    "NetworkGP",
    "NeuralNetwork",
    "StudentTProcess",
    "Tabular",
    "TaskPrior",
    "Tasks",
]
