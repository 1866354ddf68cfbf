"""Posteriors: what is believed after the data, behind one contract whichever way it was computed."""

from bayesdl.posterior.base import Posterior
from bayesdl.posterior.closed_form import GPPosterior
from bayesdl.posterior.draws import DrawsPosterior

__all__ = ["DrawsPosterior", "GPPosterior", "Posterior"]
