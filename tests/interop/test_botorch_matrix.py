"""Every posterior under every acquisition class: finite values, true slopes, a step of `optimize_acqf`; or a reason.

The classes and what is known of them stand in `tests/acquisitions.py`; `benchmarks/botorch_matrix.py` writes the table
of all posteriors.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
from botorch import acquisition
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.input_constructors import ACQF_INPUT_CONSTRUCTOR_REGISTRY

from bayesdl.interop.botorch import fuse
from tests.acquisitions import CASES, Problem, data, engines, posterior_models, refusal, try_out

pytestmark = pytest.mark.touches_global_rng  # BoTorch draws restarts and Sobol scrambles from it

# No case, because abstract.
ELSEWHERE = {
    "AcquisitionFunction": "abstract",
    "AnalyticAcquisitionFunction": "abstract",
    "MCAcquisitionFunction": "abstract",
    "OneShotAcquisitionFunction": "abstract",
    "MultiModelAcquisitionFunction": "abstract",
}


def run(name: str, view: str, posterior, x, y) -> None:
    """Fail unless the case is fine, or refused as known."""
    outcome = try_out(name, Problem(posterior, x, y), view)
    assert outcome.status in ("ok", "refused"), f"{name} on {view}: {outcome}"


@pytest.fixture(scope="module")
def fitted():
    """Models of one and of two outputs, by kind and view, fitted once."""
    kept = {}

    def models(kind: str, outputs: int):
        if (kind, outputs) not in kept:
            x, y = data(outputs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # short fits of so little data may not have converged
                kept[kind, outputs] = (posterior_models(kind, x, y), x, y)
        return kept[kind, outputs]

    return models


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "view"), [("ExactGP Matern", "gaussian"), ("HMC", "samples")])
def test_every_acquisition_on_a_gp_and_on_draws(fitted, kind, view, name):
    """The two forms that all others share: closed-form moments, and members."""
    models, x, y = fitted(kind, CASES[name].outputs)
    run(name, view, models[view], x, y)


FEW = ("qLogNoisyExpectedImprovement", "qKnowledgeGradient", "qJointEntropySearch", "PathwiseThompsonSampling")
QUICK = ("ScaleMixture", "ScaleMixture, noise outside", "SparseGP", "matrix-free ExactGP", "Ensemble")


@pytest.mark.parametrize("kind", QUICK)
def test_every_posterior_under_one_acquisition_of_each_kind(fitted, kind):
    """By samples, one-shot with fantasies, entropy, paths; in both views."""
    for name in FEW:
        models, x, y = fitted(kind, CASES[name].outputs)
        for view, model in models.items():
            run(name, view, model, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", engines(False))
@pytest.mark.parametrize("name", CASES)
def test_every_posterior_under_every_acquisition(fitted, kind, name):
    """All of them, in both views."""
    models, x, y = fitted(kind, CASES[name].outputs)
    for view, model in models.items():
        run(name, view, model, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("view", ["gaussian", "samples"])
def test_fused_posteriors_stand_under_every_acquisition_of_two_outputs(fitted, view):
    """A GP for one output, an ensemble for the other; also hypervolume knowledge gradient, which takes lists only."""
    x, y = data(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [engines(False)[k].fit(x, y[:, i], seed=0) for i, k in enumerate(("ExactGP Matern", "Ensemble"))]
    model = fuse(parts, view, num_samples=32)
    for name, case in CASES.items():
        if case.outputs == 2:
            run(name, f"{view} fused", model, x, y)


def test_every_class_of_botorch_has_a_case():
    """What its registry and its public names hold, but for abstract classes."""
    named = {kind.__name__ for kind in ACQF_INPUT_CONSTRUCTOR_REGISTRY}
    for name, kind in vars(acquisition).items():
        if inspect.isclass(kind) and issubclass(kind, AcquisitionFunction):
            named.add(name)
    covered = {name.split(",")[0] for name in CASES} | set(ELSEWHERE)
    assert sorted(named - covered) == []


def test_a_refusal_is_looked_for():
    """The table of refusals names what cannot be, and what works is not in it."""
    assert refusal("NoisyExpectedImprovement", "gaussian") is not None
    assert refusal("qJointEntropySearch", "samples") is not None
    assert refusal("qJointEntropySearch", "gaussian") is None
    x, y = data(1)
    model = engines(True)["ExactGP Matern"].fit(x, y, seed=0).to_botorch("gaussian")
    assert try_out("qKnowledgeGradient", Problem(model, x, y), "samples").status == "ok"
    assert try_out("qJointEntropySearch", Problem(model, x, y), "samples").status == "unexpected"
