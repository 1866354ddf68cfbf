"""What every engine must obey, whichever way it conditions on data."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bayesdl
from bayesdl.errors import BayesdlError, ConvergenceWarning, NumericalWarning


def check_engine(
    engine: Any, *, seed: int = 0, batched_fit: bool = True, rtol: float = 1e-6, coherence: float = 0.0,
    num_inputs: int = 2, any_units: bool = True,
) -> None:  # fmt: skip
    """Assert the contract of an engine on toy data of its task; raises AssertionError that says what does not hold.

    Checked: same seed, same result; the global random state and the engine stay untouched; dtype and device follow the
    input; numpy, pandas and torch give the same; batch axes of test inputs, and of training data, give what a loop
    gives; save and load give identical predictions; results are in the user's units at any scale; draws, functions and
    predictive agree with each other; gradients in x are right; bad input is refused; degenerate data gives finite
    answers.

    Args:
        engine: The engine, with settings small enough that a fit of 30 points takes well under a second.
        seed: Seed of data and fits.
        batched_fit: Whether the engine takes training data with batch axes.
        rtol: Relative tolerance where two orders of the same arithmetic are compared.
        coherence: How far, beyond chance, joint draws may be from the marginals that `predict` gives: their mean by so
            many standard deviations of f, their variance by this share of it; and how much narrower than f the
            predictive of y may be. 0 for anything with one law behind both. A network that was trained to predict has
            learned each of its answers, and they agree as well as it has learned.
        num_inputs: Columns of the toy data: 1 for an engine that takes no more.
        any_units: Whether data may be in any unit. A network that knows curves between 0 and 1 refuses others, or has
            learned nothing of them.

    Cost: about thirty fits.
    """
    bench = _Bench(engine, seed, rtol, coherence, num_inputs, any_units)
    with _quiet():
        _check_determinism(bench)
        _check_inputs_of_every_kind(bench)
        _check_batches(bench)
        if batched_fit:
            _check_batched_fit(bench)
        _check_storage(bench)
        _check_draws(bench)
        _check_gradients(bench)
        _check_bad_input(bench)
        _check_degenerate_data(bench)
        _check_update(bench)
        if bench.task == "regression":
            if any_units:
                _check_units(bench)
            if bench.any_width:
                _check_outputs(bench)


class _Bench:
    """Toy data for an engine, and fits of it."""

    def __init__(self, engine: Any, seed: int, rtol: float, coherence: float, num_inputs: int, any_units: bool) -> None:
        self.engine, self.seed, self.rtol, self.coherence = engine, seed, rtol, coherence
        self.num_inputs, self.any_units = num_inputs, any_units
        self.task = engine.model.likelihood.task
        # a network of the user's own has the inputs and outputs that it was built with
        self.any_width = getattr(engine.model, "module", None) is None
        self.x, self.y = self.data(24)
        self.x_new = self.data(5, stream=1)[0]

    def data(self, n: int, stream: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """x (n, d) and y (n,) of the engine's task."""
        d = self.num_inputs
        rng = np.random.default_rng([self.seed, stream, n, d])
        x = rng.normal(size=(n, d))
        f = np.sin(2 * x[:, 0]) + 0.3 * x.sum(1)
        if self.task == "binary":
            y = (f > 0).astype(float)
        elif self.task == "multiclass":
            y = np.digitize(f, [-0.5, 0.5]) % self.engine.model.likelihood.num_classes
        else:
            y = f + 0.1 * rng.normal(size=n)
        return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)

    def fit(self, x: Any = None, y: Any = None) -> Any:
        return self.engine.fit(self.x if x is None else x, self.y if y is None else y, seed=self.seed)

    def close(self, a: Tensor, b: Tensor, what: str, rtol: float | None = None) -> None:
        scale = max(1e-300, float(b.abs().max()))
        error = float((a - b).abs().max()) / scale
        tolerance = self.rtol if rtol is None else rtol
        assert error <= tolerance, f"{what}: relative difference {error:.2e}, at most {tolerance:.0e} wanted"


def _moments(predictive: Any) -> Tensor:
    """Mean and variance side by side; class probabilities for a categorical predictive."""
    if isinstance(predictive, torch.distributions.Categorical):
        return predictive.probs
    return torch.stack([predictive.mean, predictive.variance])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Toy runs are too short to converge, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        yield


def _check_determinism(bench: _Bench) -> None:
    settings = repr(bench.engine)
    x, y = bench.x.clone(), bench.y.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first, second = bench.fit(), bench.fit()
    drawn = [p.sample(bench.x_new, (3,), seed=5) for p in (first, second)]
    functions = [p.functions(2, seed=5)(bench.x_new) for p in (first, second)]
    first.predict(bench.x_new).sample((3,))
    assert torch.equal(_moments(first.predict(bench.x_new)), _moments(second.predict(bench.x_new))), (
        "same seed, other result"
    )
    assert torch.equal(*drawn), "sample: same seed, other draws"
    assert torch.equal(*functions), "functions: same seed, other functions"
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    untouched = torch.equal(states[0], after[0]) and (states[1] == after[1]).all() and states[2] == after[2]
    assert untouched, "the global random state was used"
    assert repr(bench.engine) == settings, "fit changed the engine"
    assert torch.equal(bench.x, x), "fit changed x in place"
    assert torch.equal(bench.y, y), "fit changed y in place"
    json.dumps(dict(first.diagnostics))
    assert {"engine", "seconds", "num_data"} <= set(first.diagnostics), "diagnostics lack engine, seconds or num_data"
    assert first.log_evidence is None or first.log_evidence.shape == (), "log_evidence of one data set must be a scalar"


def _check_inputs_of_every_kind(bench: _Bench) -> None:
    import pandas

    reference = _moments(bench.fit().predict(bench.x_new))
    frame = pandas.DataFrame(bench.x.numpy(), columns=["a", "b", "c"][: bench.num_inputs])
    for x, y in [(bench.x.numpy(), bench.y.numpy()), (frame, pandas.Series(bench.y.numpy()))]:
        posterior = bench.fit(x, y)
        bench.close(_moments(posterior.predict(bench.x_new.numpy())), reference, f"training data as {type(x).__name__}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            x, y = bench.x.to(device, dtype), bench.y.to(device, dtype)
            posterior = bench.fit(x, y)
            predictive = posterior.predict(bench.x_new.to(device, dtype))
            results = [_moments(predictive), predictive.log_prob(y[:5]), posterior.sample(x[:3], (2,))]
            results.append(posterior.functions(2)(x[:3]))
            for result in results:
                assert result.dtype == dtype, f"{dtype} in, {result.dtype} out"
                assert result.device.type == device, f"{device} in, {result.device} out"


def _check_batches(bench: _Bench) -> None:
    posterior = bench.fit()
    points = torch.stack([bench.data(4, stream=i)[0] for i in range(6)])
    single = torch.stack([_moments(posterior.predict(p)) for p in points])
    categorical = bench.task == "multiclass"
    for batch in ((6,), (2, 3)):
        x = points.reshape(*batch, *points.shape[1:])
        got = _moments(posterior.predict(x))
        got = (got if categorical else got.movedim(0, len(batch))).reshape(single.shape)
        bench.close(got, single, f"predict at batch shape {batch}")
        expected = posterior.sample(points[0], (3,), seed=1).shape[2:]
        assert posterior.sample(x, (7,), seed=1).shape == (7, *batch, 4, *expected), f"sample at batch shape {batch}"
        assert posterior.functions(5, seed=1)(x).shape == (5, *batch, 4, *expected), f"functions at batch shape {batch}"
    assert posterior.predict(points[0]).batch_shape == (4,), "batch_shape of a predictive at s points is (s,)"
    assert posterior.sample(points[0], ()).shape[:1] == (4,), "sample with an empty sample shape"


def _check_batched_fit(bench: _Bench) -> None:
    sets = [bench.data(12, stream=i) for i in range(3)]
    for batch, count in (((3,), 3), ((1, 2), 2)):
        x = torch.stack([s[0] for s in sets[:count]]).reshape(*batch, 12, bench.num_inputs)
        y = torch.stack([s[1] for s in sets[:count]]).reshape(*batch, 12)
        joint = bench.fit(x, y)
        got = _moments(joint.predict(bench.x_new))
        loop = torch.stack([_moments(bench.fit(*s).predict(bench.x_new)) for s in sets[:count]])
        got = got if bench.task == "multiclass" else got.movedim(0, -2)
        # optimisers and samplers amplify the rounding in which a batch differs from a loop
        bench.close(
            got.reshape(loop.shape), loop, f"fit at batch shape {batch} against a loop", rtol=max(1e-4, bench.rtol)
        )
        assert joint.functions(2)(bench.x_new).shape[:2] == (2, *batch)[:2], "functions of a batched posterior"
        assert joint.log_evidence is None or joint.log_evidence.shape == batch, "log_evidence must have the batch shape"


def _check_storage(bench: _Bench) -> None:
    posterior = bench.fit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.bdl"
        posterior.save(path)
        loaded = bayesdl.load(path, module=getattr(bench.engine.model, "module", None))
    first, second = _moments(posterior.predict(bench.x_new)), _moments(loaded.predict(bench.x_new))
    assert torch.equal(first, second), "save and load changed the predictive"
    assert torch.equal(posterior.functions(2)(bench.x_new), loaded.functions(2)(bench.x_new)), (
        "save and load changed functions"
    )
    assert json.dumps(dict(loaded.diagnostics)) == json.dumps(dict(posterior.diagnostics)), (
        "save and load changed diagnostics"
    )


def _check_draws(bench: _Bench) -> None:
    posterior = bench.fit()
    latent = posterior.predict(bench.x_new, noise=False)
    draws = posterior.sample(bench.x_new, (4000,), seed=3)
    # five standard errors of a mean; that of a variance is taken from the draws, which may be far from normal
    slack = bench.coherence
    error = 5 * draws.std(0) / 4000**0.5 + 1e-9 + slack * latent.stddev
    assert bool(((draws.mean(0) - latent.mean).abs() <= error).all()), "sample: mean differs from predict(noise=False)"
    spread = 5 * (draws - draws.mean(0)).square().std(0) / 4000**0.5 + 1e-9 + slack * latent.variance
    assert bool(((draws.var(0) - latent.variance).abs() <= spread).all()), (
        "sample: variance differs from predict(noise=False)"
    )
    functions = posterior.functions(6, seed=2)
    whole = functions(bench.x_new)
    bench.close(functions(bench.x_new[2:4]), whole[:, 2:4], "a drawn function must be the same at every x", rtol=1e-9)
    assert len({tuple(row.reshape(-1).tolist()) for row in whole}) > 1, "functions are all the same"
    predictive = posterior.predict(bench.x_new)
    levels = torch.stack([predictive.quantile(q) for q in (0.05, 0.5, 0.95)])
    assert bool((levels[1:] >= levels[:-1]).all()), "quantiles must rise with their level"
    assert bool((predictive.quantile(0.95) >= posterior.predict(bench.x_new).quantile(0.05)).all())
    if bench.task == "regression":
        assert bool((predictive.variance >= (1 - slack) * latent.variance).all()), (
            "noise must not narrow the predictive"
        )


def _check_gradients(bench: _Bench) -> None:
    posterior = bench.fit()

    def moments(x: Tensor) -> Tensor:
        return _moments(posterior.predict(x))

    def function_values(x: Tensor) -> Tensor:
        return posterior.functions(2, seed=0)(x)

    x = bench.x_new[:2].clone()
    smooth = getattr(bench.engine.model, "activation", "tanh") != "relu"
    for name, map_ in (("mean and variance", moments), ("functions", function_values)):
        jacobian = torch.autograd.functional.jacobian(map_, x)
        assert bool(torch.isfinite(jacobian).all()), f"gradients of {name} in x are not finite"
        numeric = _central_differences(map_, x, 1e-5)
        bench.close(jacobian, numeric, f"gradients of {name} in x", rtol=1e-5 if smooth else 1e-2)
    at_data = torch.autograd.functional.jacobian(moments, bench.x[:2].clone())
    assert bool(torch.isfinite(at_data).all()), "gradients at training inputs are not finite"


def _central_differences(map_: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    columns = []
    for i in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[i] = step
        shift = shift.reshape(x.shape)
        columns.append((map_(x + shift) - map_(x - shift)) / (2 * step))
    return torch.stack(columns, -1).reshape(*columns[0].shape, *x.shape)


def _check_bad_input(bench: _Bench) -> None:
    x, y, fit = bench.x, bench.y, bench.fit
    nan_x, inf_y = x.clone(), y.clone()
    nan_x[3, -1], inf_y[2] = torch.nan, torch.inf
    cases: dict[str, Callable[[], Any]] = {
        "NaN in x": lambda: fit(nan_x, y),
        "infinity in y": lambda: fit(x, inf_y),
        "x of one axis": lambda: fit(x[:, 0], y),
        "y of another length": lambda: fit(x, y[:-1]),
        "n = 0": lambda: fit(x[:0], y[:0]),
        "d = 0": lambda: fit(x[:, :0], y),
        "y of another dtype": lambda: fit(x, y.float()),
        "text": lambda: fit(np.array([["a", "b"]] * 4), np.arange(4.0)),
        "complex numbers": lambda: fit(x.to(torch.complex128), y),
    }
    posterior = fit()
    cases |= {
        "test x with NaN": lambda: posterior.predict(nan_x),
        "test x with other columns": lambda: posterior.predict(torch.cat([x, x], -1)),
        "test x of one axis": lambda: posterior.predict(x[0]),
        "test x of another dtype": lambda: posterior.predict(x.float()),
    }
    if bench.task != "regression":
        cases["a label out of range"] = lambda: fit(x, y + 100)
        cases["a fractional label"] = lambda: fit(x, y + 0.5)
    for name, call in cases.items():
        message = _refusal(call)
        assert message is not None, f"{name} was accepted"
        assert "got" in message, f"{name}: the error must say what came: {message}"
        assert "fix" in message, f"{name}: the error must say how to mend it: {message}"


def _refusal(call: Callable[[], Any]) -> str | None:
    """The message with which a call was refused; None where it was not."""
    try:
        call()
    except (BayesdlError, NotImplementedError) as error:
        return str(error)
    return None


def _check_degenerate_data(bench: _Bench) -> None:
    x, y = bench.x, bench.y
    cases = {
        "n = 1": (x[:1], y[:1]),
        "constant y": (x, torch.ones_like(y)),
        "constant x": (torch.ones_like(x), y),
        "duplicate rows": (torch.cat([x, x]), torch.cat([y, y])),
    }
    if bench.any_width:
        cases["d = 1"] = (x[:, :1], y)
    if bench.any_units:
        cases["x at offset 1e6"] = (x + 1e6, y)
    if bench.task == "regression" and bench.any_units:
        cases |= {"y at scale 1e-6": (x, 1e-6 * y), "y at scale 1e6": (x, 1e6 * y), "y at offset 1e6": (x, y + 1e6)}
    for name, (inputs, targets) in cases.items():
        posterior = bench.fit(inputs, targets)
        predictive = posterior.predict(inputs)
        values = [predictive.log_prob(targets), predictive.quantile(0.9), posterior.sample(inputs, (2,))]
        for value in [_moments(predictive), *values]:
            assert bool(torch.isfinite(value).all()), f"{name}: an answer is not finite"
        if bench.task == "regression":
            assert bool((predictive.variance > 0).all()), f"{name}: a predictive variance is zero"
            off = (predictive.mean - targets).abs().max()
            spread = (targets - targets.mean()).abs().max() + targets.abs().max() * (name in ("constant y", "n = 1"))
            assert off <= 3 * spread + 1e-9, (
                f"{name}: the mean is {float(off):.2e} away from targets of spread {float(spread):.2e}"
            )


def _check_update(bench: _Bench) -> None:
    posterior = bench.fit()
    before = _moments(posterior.predict(bench.x_new))
    x, y = bench.data(3, stream=7)
    refusal = _refusal(lambda: posterior.condition_on(x, y))
    if refusal is not None:
        assert "bdl." in refusal, "an engine that cannot update must name one that can"
    else:
        updated = posterior.condition_on(x, y)
        assert updated.diagnostics["num_data"] == posterior.diagnostics["num_data"] + 3
        assert not torch.equal(_moments(updated.predict(bench.x_new)), before), "condition_on changed nothing"
    assert torch.equal(_moments(posterior.predict(bench.x_new)), before), "condition_on changed the posterior itself"


def _check_units(bench: _Bench) -> None:
    """Powers of two scale without rounding, so that a standardised fit must not change in a single bit."""
    if not getattr(bench.engine, "standardize", False):
        return
    reference = _moments(bench.fit().predict(bench.x_new))
    for x_factor, y_factor in ((2.0**12, 2.0**-20), (2.0**-15, 2.0**24)):
        scaled = _moments(bench.fit(x_factor * bench.x, y_factor * bench.y).predict(x_factor * bench.x_new))
        scaled = scaled / torch.tensor([y_factor, y_factor**2], dtype=scaled.dtype).unsqueeze(-1)
        bench.close(
            scaled[0], reference[0], f"mean in the user's units, x times {x_factor:g}, y times {y_factor:g}", rtol=1e-9
        )
        bench.close(scaled[1], reference[1], f"variance in the user's units, y times {y_factor:g}", rtol=1e-9)


def _check_outputs(bench: _Bench) -> None:
    y = torch.stack([bench.y, 100 - 3 * bench.y if bench.any_units else -bench.y], -1)
    posterior = bench.fit(bench.x, y)
    predictive = posterior.predict(bench.x_new)
    assert predictive.batch_shape == (5, 2), f"two outputs at five points: batch_shape {tuple(predictive.batch_shape)}"
    assert posterior.sample(bench.x_new, (4,)).shape == (4, 5, 2)
    assert posterior.functions(4)(bench.x_new).shape == (4, 5, 2)
    # how well a short run predicts is its own affair, but each column must come back in its own units
    off = (posterior.predict(bench.x).mean - y).abs().mean(0)
    spread = (y - y.mean(0)).abs().mean(0)
    assert bool((off < 2 * spread).all()), f"outputs are {off.tolist()} away from targets of spread {spread.tolist()}"
