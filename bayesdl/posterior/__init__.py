"""Posteriors: what is believed after the data, behind one contract whichever way it was computed."""

from bayesdl.posterior.amortized import AmortizedPosterior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.closed_form import GPPosterior
from bayesdl.posterior.draws import DrawsPosterior
from bayesdl.posterior.fixed_noise_mixture import FixedNoiseMixturePosterior
from bayesdl.posterior.function_gradients import function_gradients
from bayesdl.posterior.gp_mixture import GPMixturePosterior
from bayesdl.posterior.gradient_gp import GradientGPPosterior
from bayesdl.posterior.inducing import InducingPosterior
from bayesdl.posterior.martingale import MartingalePosterior
from bayesdl.posterior.matrix_free import MatrixFreeGPPosterior
from bayesdl.posterior.scale_mixture import ScaleMixturePosterior

__all__ = [
    "AmortizedPosterior",
    "DrawsPosterior",
    "FixedNoiseMixturePosterior",
    "GPMixturePosterior",
    "GPPosterior",
    "GradientGPPosterior",
    "InducingPosterior",
    "MartingalePosterior",
    "MatrixFreeGPPosterior",
    "Posterior",
    "ScaleMixturePosterior",
    "function_gradients",
]
