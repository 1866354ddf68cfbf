"""Evaluation: proper scores, calibration, distance to a reference posterior, comparison of posteriors, and the report.

`compare` (also `bayesdl.compare`) and the report load pandas and matplotlib when called, not before.
"""

from bayesdl.evaluation.agreement import total_variation, wasserstein2
from bayesdl.evaluation.calibration import (
    ReliabilityCurve,
    calibration_band,
    calibration_curve,
    expected_calibration_error,
    pit,
    pit_calibration_error,
    pit_calibration_error_band,
    reliability_curve,
)
from bayesdl.evaluation.sbc import SBCResult
from bayesdl.evaluation.scores import (
    accuracy,
    brier,
    class_probabilities,
    coverage,
    crps,
    interval_score,
    nlpd,
    rmse,
)
from bayesdl.evaluation.uniformity import EcdfBand, Uniformity, ecdf_band, uniformity
from bayesdl.evaluation.verdict import Verdict, verdict

__all__ = [
    "EcdfBand",
    "ReliabilityCurve",
    "SBCResult",
    "Uniformity",
    "Verdict",
    "accuracy",
    "brier",
    "calibration_band",
    "calibration_curve",
    "class_probabilities",
    "coverage",
    "crps",
    "ecdf_band",
    "expected_calibration_error",
    "interval_score",
    "nlpd",
    "pit",
    "pit_calibration_error",
    "pit_calibration_error_band",
    "reliability_curve",
    "rmse",
    "total_variation",
    "uniformity",
    "verdict",
    "wasserstein2",
]
