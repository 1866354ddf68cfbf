"""Posteriors as BoTorch models, and the acquisition functions that BoTorch lacks for them.

    model = posterior.to_botorch()                       # any acquisition function of BoTorch takes it
    model = fuse([gain, cost])                           # two posteriors as the two outputs of one model
    LogExpectedImprovement(model, best_f=y.max())        # of a Student-t process, in closed form

Two views exist. "gaussian" is a Gaussian process: the posterior itself where it is one, and otherwise one of the same
mean and covariance. "samples" is a set of functions drawn from the posterior, the same ones at every point, which
nothing is assumed of. Either has gradients in x, takes t-batches and can be conditioned on more observations:
`model.conditioning` says how.
"""

from __future__ import annotations

from collections.abc import Sequence

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds, root_seed
from bayesdl.errors import ShapeError, fail
from bayesdl.interop._botorch_acquisition import (
    BALD,
    ExpectedImprovement,
    LogExpectedImprovement,
    LogProbabilityOfImprovement,
    ProbabilityOfImprovement,
)
from bayesdl.interop._botorch_fused import FusedModel
from bayesdl.interop._botorch_laws import Members, law_of
from bayesdl.interop._botorch_member_model import MemberModel
from bayesdl.interop._botorch_members import MemberPosterior, MemberSampler
from bayesdl.interop._botorch_models import GaussianModel, SurrogateModel
from bayesdl.interop._botorch_paths import thompson_maxima
from bayesdl.posterior import Posterior

__all__ = [
    "BALD",
    "ExpectedImprovement",
    "FusedModel",
    "GaussianModel",
    "LogExpectedImprovement",
    "LogProbabilityOfImprovement",
    "MemberModel",
    "MemberPosterior",
    "MemberSampler",
    "ProbabilityOfImprovement",
    "SurrogateModel",
    "fuse",
    "thompson_maxima",
    "to_botorch",
]

_VIEWS = ("auto", "samples", "gaussian")


def to_botorch(
    posterior: Posterior, view: str = "auto", *, num_samples: int = 256, seed: Seed = 0
) -> GaussianModel | MemberModel:
    """A posterior as a BoTorch model; `Posterior.to_botorch` is this.

    Args:
        posterior: Any posterior.
        view: "gaussian", "samples", or "auto": Gaussian where mean and covariance have formulas (Gaussian processes,
            exact, sparse and matrix-free, and their scale mixtures), samples where the posterior is a set of draws.
        num_samples: Members S of the view by samples at most; also what mean and covariance are taken over where they
            have no formula.
        seed: Of the choice of members, and of the noise that conditioning gives them.

    Raises:
        SettingError: A view that does not exist, or fewer than one sample.
    """
    _checks.choice("to_botorch", "view", view, _VIEWS)
    _checks.at_least("to_botorch", "num_samples", num_samples, 1, integer=True)
    root = root_seed(seed)
    law = law_of(posterior, num_samples, root)
    if view == "gaussian" or (view == "auto" and law.closed_form):
        return GaussianModel(posterior, law)
    members = law if isinstance(law, Members) else Members(posterior, num_samples, root)
    return MemberModel(posterior, law, members, root)


def fuse(
    posteriors: Sequence[Posterior], view: str = "auto", *, num_samples: int = 256, seed: Seed = 0
) -> SurrogateModel:
    """Independent posteriors as one model: objectives and constraints that were fitted apart.

    Args:
        posteriors: Trained on inputs of the same columns and with the same batch axes; each may have several outputs.
        view: As for `to_botorch`; "auto" takes samples unless all are Gaussian.
        num_samples: Members at most; the least that any of the posteriors has is what all have.
        seed: Each posterior gets its own from it, so that members of different ones are independent.

    Raises:
        ShapeError: No posterior, or different numbers of columns.
        SettingError: As for `to_botorch`.
    """
    _checks.choice("fuse", "view", view, _VIEWS)
    columns = {posterior._data.x.shape[-1] for posterior in posteriors}
    if len(columns) != 1:
        got = f"{len(posteriors)} posteriors, columns {sorted(columns)}"
        fail(ShapeError, "fuse", "posteriors must share their inputs' columns.", got=got, fix="fit them to the same x")
    seeds = child_seeds(seed, len(posteriors))
    if view == "auto":
        closed = all(law_of(posterior, 1, 0).closed_form for posterior in posteriors)
        view = "gaussian" if closed else "samples"
    pairs = zip(posteriors, seeds, strict=True)
    parts = [to_botorch(posterior, view, num_samples=num_samples, seed=own) for posterior, own in pairs]
    return FusedModel(*parts)
