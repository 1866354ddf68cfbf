"""One table of scores for several posteriors on the same test points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesdl.errors import DataError, SettingError, fail
from bayesdl.evaluation import agreement, calibration, scores

if TYPE_CHECKING:
    import pandas as pd

    from bayesdl.posterior import Posterior

__all__ = ["CLASSIFICATION", "DISTANCE", "REGRESSION", "SECONDS", "Evaluation", "compare", "distance", "evaluate"]

LEVELS = (0.5, 0.9, 0.95)
REGRESSION = ("RMSE", "NLPD", "CRPS", *(f"coverage {level:.0%}" for level in LEVELS), "PIT error")
CLASSIFICATION = ("accuracy", "NLL", "Brier", "ECE")
DISTANCE, SECONDS = "distance to reference", "seconds"


class Evaluation(NamedTuple):
    """The scores of one predictive, and what it takes to measure its distance to another without it.

    `profile` is (64, *b) quantiles for a scalar target and (*b, K) class probabilities for a label.
    """

    scores: dict[str, float]
    profile: Tensor | None
    is_classification: bool


def compare(
    posteriors: Mapping[str, Posterior], x_test: Any, y_test: Any, reference: str | None = None
) -> pd.DataFrame:
    """Score posteriors on the same test points; one row a posterior, in the order given.

    Regression columns: RMSE, NLPD, CRPS, coverage 50%, coverage 90%, coverage 95%, PIT error (PCE_1), and with a
    reference the mean 2-Wasserstein distance of the predictives in the units of y. Classification: accuracy, NLL,
    Brier, ECE, and with a reference the mean total variation distance. Last, the seconds that fitting took (NaN where
    unknown). Scores of several outputs or data sets are averaged. NLPD is NaN where a predictive has no density.

    Args:
        posteriors: Name -> fitted posterior; anything with `predict(x)` and `diagnostics`.
        x_test: Inputs, shape (*b, s, d).
        y_test: Targets of the predictives' batch shape, (*b, s) or (*b, s, k).
        reference: Name of the posterior that the others are measured against, most often long-run HMC.

    Raises:
        SettingError: No posteriors, or a reference that is not among them.
        DataError: Posteriors of regression and classification in one table.
        ShapeError: y_test does not fit the predictives.
    """
    import pandas as pd

    if not posteriors:
        fail(SettingError, "compare", "posteriors must not be empty.", got="{}", fix='pass {"name": posterior, ...}')
    if reference is not None and reference not in posteriors:
        names = ", ".join(map(repr, posteriors))
        fail(SettingError, "compare", "reference must name one of the posteriors.", got=repr(reference), fix=names)
    rows, found = {}, {}
    for name, posterior in posteriors.items():
        found[name] = evaluate(posterior.predict(x_test), y_test, with_profile=reference is not None)
        rows[name] = dict(found[name].scores)
    if len({item.is_classification for item in found.values()}) > 1:
        got = ", ".join(f"{name}: {'labels' if item.is_classification else 'numbers'}" for name, item in found.items())
        fail(
            DataError,
            "compare",
            "all posteriors must predict one kind of target.",
            got=got,
            fix="compare like with like",
        )
    for name, posterior in posteriors.items():
        if reference is not None:
            rows[name][DISTANCE] = distance(found[name], found[reference])
        rows[name][SECONDS] = float(posterior.diagnostics.get("seconds", math.nan))
    return pd.DataFrame.from_dict(rows, orient="index")


def evaluate(predictive: Distribution, y: Any, *, with_profile: bool = True) -> Evaluation:
    """All scores of one predictive that need no other; see `compare`."""
    with torch.no_grad():
        if isinstance(predictive, (Bernoulli, Categorical)):
            values = (
                scores.accuracy(predictive, y),
                scores.nlpd(predictive, y),
                scores.brier(predictive, y),
                calibration.expected_calibration_error(predictive, y),
            )
            profile = scores.class_probabilities(predictive) if with_profile else None
            return Evaluation(dict(zip(CLASSIFICATION, map(float, values), strict=True)), profile, True)
        try:
            density = float(scores.nlpd(predictive, y))
        except NotImplementedError:
            density = math.nan
        values = (
            float(scores.rmse(predictive, y)),
            density,
            float(scores.crps(predictive, y)),
            *scores.coverage(predictive, y, LEVELS).tolist(),
            float(calibration.pit_calibration_error(calibration.pit(predictive, y))),
        )
        profile = agreement.quantile_profile(predictive) if with_profile else None
        return Evaluation(dict(zip(REGRESSION, values, strict=True)), profile, False)


def distance(one: Evaluation, reference: Evaluation) -> float:
    """Mean 2-Wasserstein distance of two predictives, or mean total variation for labels."""
    if one.is_classification:
        return float(0.5 * (one.profile - reference.profile).abs().sum(-1).mean())
    return float(agreement.wasserstein2_of_profiles(one.profile, reference.profile).mean())
