"""PFN: a network behind the contract of all posteriors. What a network has learned is measured in benchmarks/pfn_*.py;
here its answers are compared with its own forward pass by hand, and with each other.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from scipy import stats

import bayesdl as bdl
from bayesdl import _storage
from bayesdl.amortized import Architecture, Network, Pretrained, make_borders, predictive, reader, shipped
from bayesdl.distributions import BarDistribution, GaussianMixture, pool
from bayesdl.errors import DataError, OutOfRangeWarning, SettingError, ShapeError, StorageError
from bayesdl.interop.botorch import LogExpectedImprovement
from bayesdl.posterior._learned_functions import anchors_of, residual_of
from bayesdl.posterior._rows import Rows
from bayesdl.testing import check_engine

HEADS = {"bars": 60, "mixture": 4, "kernel": 3, "classes": 6}


def toy_network(head: str, *, max_inputs: int = 3, num_conditions: int | None = None, **card) -> Pretrained:
    """Untrained, but every weight away from its initial value, so that every path through the network counts."""
    conditions = (head != "classes") if num_conditions is None else num_conditions
    sizes = {"width": 24, "num_layers": 2, "num_heads": 2, "hidden": 32, "num_conditions": int(conditions)}
    sizes |= {"kernel": "matern-5/2", "refinements": 1} if head == "kernel" else {}
    network = Network(Architecture(max_inputs=max_inputs, head=head, outputs=HEADS[head], **sizes), seed=3)
    g = torch.Generator().manual_seed(5)
    for weight in network.parameters():
        weight.data.add_(0.15 * torch.randn(weight.shape, generator=g))
    task = "classification" if head == "classes" else "regression"
    usual = {"name": "toy", "task": task, "prior": "none", "ranges": {"n": [0, 50], "d": [1, max_inputs], "x": [-6, 6]}}
    usual |= {"inputs": "standardized", "targets": "raw" if task == "classification" else "standardized"}
    usual |= {"noise_token": head != "classes", "seconds": 1.5}
    borders = make_borders(torch.randn(20_000, generator=g), HEADS[head]) if head == "bars" else None
    return Pretrained(network, borders, usual | card)


def data(n=20, d=2, seed=0, classes=0):
    rng = np.random.default_rng([seed, n, d])
    x = rng.normal(size=(n, d))
    f = np.sin(2 * x[:, 0]) + 0.3 * x.sum(1)
    y = np.digitize(f, np.quantile(f, np.arange(1, classes) / classes)) if classes else 5 + 2 * f
    return torch.tensor(x), torch.tensor(y, dtype=torch.float64)


X_NEW = data(7, 2, seed=9)[0]


@pytest.mark.parametrize("head", HEADS)
def test_a_pfn_keeps_the_contract(head):
    """With an untrained network, whose joint draws and marginals need not agree: a wide `coherence`."""
    engine = bdl.PFN(toy_network(head), num_classes=3 if head == "classes" else None)
    check_engine(engine, coherence=5.0)


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("learning-curve")])
def test_every_shipped_network_keeps_the_contract(name):
    """Joint draws and marginals agree to 0.35 standard deviations at 24 points in two dimensions."""
    engine = bdl.PFN.from_pretrained(name)
    if engine.model.likelihood.task == "multiclass":
        engine = bdl.PFN.from_pretrained(name, num_classes=3)
    check_engine(engine, coherence=0.35)


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("learning-curve")])
def test_networks_for_curves_keep_the_contract(name):
    """One column, in the units of curves; joint draws and marginals agree to 0.35 standard deviations."""
    check_engine(bdl.PFN.from_pretrained(name), num_inputs=1, any_units=False, coherence=0.35)


def by_hand(network: Pretrained, x, y, x_new, *, noiseless=False):
    """The network's own forward pass on data standardised by hand, float64, and the units of y."""
    module = network.to(dtype=torch.float64).network
    centre, spread = x.mean(0), x.std(0, correction=0)
    conditions = torch.full((1, 1), float(noiseless), dtype=torch.float64)
    u, v = ((t - centre) / spread for t in (x, x_new))
    loc, scale = y.mean(), y.std(correction=0)
    raw = module(u[None], ((y - loc) / scale)[None], v[None], conditions)
    borders = None if network.borders is None else network.borders.double()
    return predictive(module.architecture, raw[0], borders), loc, scale


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("head", ["bars", "mixture"])
def test_predictions_are_the_forward_pass_in_the_users_units(head, noise):
    """Density, mean and quantiles after an affine change of units by hand."""
    network, (x, y) = toy_network(head), data()
    posterior = bdl.PFN(network).fit(x, y)
    got = posterior.predict(X_NEW, noise=noise)
    want, loc, scale = by_hand(network, x, y, X_NEW, noiseless=not noise)
    value = torch.linspace(0.0, 11.0, 9, dtype=torch.float64)[:, None]
    assert got.log_prob(value).numpy() == pytest.approx((want.log_prob((value - loc) / scale) - scale.log()).numpy())
    assert got.mean.numpy() == pytest.approx((loc + scale * want.mean).numpy())
    assert got.quantile(0.9).numpy() == pytest.approx((loc + scale * want.quantile(0.9)).numpy(), rel=1e-6)
    if noise:
        assert not torch.allclose(got.mean, posterior.predict(X_NEW, noise=False).mean)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("head", list(HEADS))
def test_the_order_of_the_data_does_not_matter(head, precision):
    """Columns with ties, rows that occur twice, and two data sets in orders of their own.

    Only the mean and spread of the data are rounded in their order, in float64.
    """
    x, y = (torch.stack([part, part.flip(0)]) for part in data(30, classes=6 if head == "classes" else 0))
    x = (4 * x).round() / 4
    x[:, 7], y[:, 7] = x[:, 3], y[:, 3]
    g = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(30, generator=g) for _ in range(2)])
    engine = bdl.PFN(toy_network(head), precision=precision)
    one = engine.fit(x, y).predict(X_NEW)
    other = engine.fit(x.gather(1, order[..., None].expand_as(x)), y.gather(1, order)).predict(X_NEW)
    name = {"bars": "logits", "classes": "probs"}.get(head, "mean")
    rtol = 1e-10 if precision == "float64" else 1e-6
    torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_of_the_data_does_not_matter_to_shipped_networks(name, dtype):
    """Mean and variance, or probabilities, to 1e-5; in float32 too."""
    width = 1 if name.startswith("learning-curve") else 3
    x, y = data(30 if width == 1 else 60, width, classes=3 if name == "tabular" else 0)
    x, y = x.clamp(-1.5, 1.5).to(dtype), y.to(dtype) / (1 if name == "tabular" else 10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    engine, new = bdl.PFN.from_pretrained(name), data(7, width, seed=9)[0].clamp(-1.5, 1.5).to(dtype)
    one, other = engine.fit(x, y).predict(new), engine.fit(x[order], y[order]).predict(new)
    for part in ("probs",) if name == "tabular" else ("mean", "variance"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-5, atol=1e-5)


def test_single_precision_is_close_to_double():
    """And gives answers in the dtype of the data all the same."""
    x, y = data()
    network = toy_network("mixture")
    wide, narrow = (bdl.PFN(network, precision=p).fit(x, y) for p in ("data", "float32"))
    assert narrow.predict(X_NEW).mean.dtype == torch.float64
    assert narrow.predict(X_NEW).mean.numpy() == pytest.approx(wide.predict(X_NEW).mean.numpy(), rel=1e-5)
    assert narrow.sample(X_NEW, (3,)).numpy() == pytest.approx(wide.sample(X_NEW, (3,)).numpy(), abs=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_products_in_bfloat16_are_close_to_single_precision(head, tmp_path):
    """To the 8 bits of its products: answers, slopes, a context with new points, a file of it. Answers keep the data's
    dtype, keys and values take half the memory."""
    x, y = data(classes=3 if head == "classes" else 0)
    network = toy_network(head)
    wide, narrow = (bdl.PFN(network, precision=p, update="append").fit(x, y) for p in ("float32", "bfloat16"))
    kept = torch.float32 if head == "kernel" else torch.bfloat16  # factors want all digits
    assert narrow._context.cache.like.dtype == kept
    more = (x[:3] + 0.1, y[:3])
    for one, other in ((wide, narrow), (wide.condition_on(*more), narrow.condition_on(*more))):
        places = [X_NEW.clone().requires_grad_(True) for _ in range(2)]
        laws = [posterior.predict(at) for posterior, at in zip((one, other), places, strict=True)]
        values = [law.probs[..., 1] if head == "classes" else law.mean for law in laws]
        assert values[1].dtype == torch.float64
        spread = 1.0 if head == "classes" else float(laws[0].variance.detach().sqrt().mean())
        assert float((values[0] - values[1]).detach().abs().max()) < 0.05 * spread
        assert not torch.equal(*values)
        for value in values:
            value.sum().backward()
        assert float((places[0].grad - places[1].grad).abs().max()) < 0.15 * float(places[0].grad.abs().max())
    narrow.save(tmp_path / "narrow.bdl")
    again = bdl.load(tmp_path / "narrow.bdl")
    assert torch.equal(again.sample(X_NEW, (2,), seed=1), narrow.sample(X_NEW, (2,), seed=1))


@pytest.mark.parametrize("head", HEADS)
def test_blocks_of_work_do_not_show(head, monkeypatch):
    """Data sets, outputs, queries and draws one at a time give what all at once give."""
    classes = 3 if head == "classes" else 0
    sets = [data(12, 2, seed=i, classes=classes) for i in range(4)]
    x, y = torch.stack([s[0] for s in sets]), torch.stack([s[1] for s in sets])
    engine = bdl.PFN(toy_network(head), num_permutations=2, num_classes=classes or None)

    def answers():
        posterior = engine.fit(x, y)
        law = posterior.predict(X_NEW)
        parts = (law.mean, posterior.sample(X_NEW, (5,), seed=1), posterior.functions(3, seed=1)(X_NEW))
        return torch.cat([part.reshape(-1) for part in parts])

    monkeypatch.setattr(bdl.posterior.amortized, "_ROLLOUTS", 3)  # for fewer calls
    whole = answers()
    monkeypatch.setattr(reader, "_CHUNK", 5 * 72)  # of a few rows, or queries
    monkeypatch.setattr(bdl.posterior.amortized, "_KEPT", 1)
    assert answers().numpy() == pytest.approx(whole.numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_conditioning_equals_a_refit(head):
    """Exactly, units included; an appended point goes where the network appends it, in the units of the first fit."""
    classes = 3 if head == "classes" else 0
    x, y = data(16, classes=classes)
    network = toy_network(head)
    settings = {"num_permutations": 2, "num_classes": classes or None}
    joined = bdl.PFN(network, **settings).fit(x[:12], y[:12]).condition_on(x[12:], y[12:])
    refit = bdl.PFN(network, **settings).fit(x, y)
    assert torch.equal(joined.predict(X_NEW).mean, refit.predict(X_NEW).mean)
    assert joined.diagnostics["num_data"] == 16
    engine = bdl.PFN(network, update="append", num_classes=classes or None)
    first = engine.fit(x[:12], y[:12])
    appended = first.condition_on(x[12:14], y[12:14]).condition_on(x[14:], y[14:])
    module = network.to(dtype=torch.float64).network
    inner = first._units.inward_x(x, torch.float64)[None]
    targets = first._units.inward_y(y[:, None], torch.float64).squeeze(-1)[None]
    if classes:
        targets = targets.long()
    cache = module.encode(inner[:, :12], targets[:, :12])
    cache = module.append(cache, inner[:, 12:], targets[:, 12:])
    raw = module.query(cache, first._units.inward_x(X_NEW, torch.float64)[None])[0]
    if classes:
        want = raw[:, :3].softmax(-1)
        assert appended.predict(X_NEW).probs.numpy() == pytest.approx(want.numpy(), rel=1e-9)
    else:
        borders = None if network.borders is None else network.borders.double()
        want = predictive(module.architecture, raw, borders).mean * y[:12].std(correction=0) + y[:12].mean()
        assert appended.predict(X_NEW).mean.numpy() == pytest.approx(want.numpy(), rel=1e-9)


def test_an_appended_posterior_survives_storage(tmp_path):
    x, y = data(16)
    posterior = bdl.PFN(toy_network("bars"), update="append").fit(x[:12], y[:12]).condition_on(x[12:], y[12:])
    posterior.save(tmp_path / "a.bdl")
    again = bdl.load(tmp_path / "a.bdl")
    assert again.predict(X_NEW).mean.numpy() == pytest.approx(posterior.predict(X_NEW).mean.numpy(), rel=1e-12)
    assert again.condition_on(x[:1], y[:1]).diagnostics["num_data"] == 17


def test_copies_are_data_sets_that_may_part():
    """Three equal ones; what each is then told changes that one alone."""
    x, y = data(10)
    posterior = bdl.PFN(toy_network("mixture"), update="append").fit(x, y)
    many = posterior.copies(3)
    assert many.predict(X_NEW).mean.numpy() == pytest.approx(posterior.predict(X_NEW).mean.expand(3, -1).numpy())
    told = many.condition_on(X_NEW[:1].expand(3, 1, 2), torch.tensor([[4.0], [4.0], [9.0]], dtype=torch.float64))
    mean = told.predict(X_NEW).mean
    assert torch.allclose(mean[0], mean[1])
    assert not torch.allclose(mean[0], mean[2])


def test_permutations_are_averaged():
    """The mixture of what the network says of columns in each order, by hand."""
    network, (x, y) = toy_network("bars"), data(14, 3)
    x_new = data(5, 3, seed=4)[0]
    posterior = bdl.PFN(network, num_permutations=4).fit(x, y, seed=11)
    orders = posterior._context.readings.columns
    assert orders[0].tolist() == [0, 1, 2]
    assert len({tuple(order.tolist()) for order in orders}) > 1
    want, loc, scale = zip(*(by_hand(network, x[:, o], y, x_new[:, o]) for o in orders), strict=True)
    value = torch.linspace(0.0, 11.0, 9, dtype=torch.float64)[:, None]
    mixed = pool(want).log_prob((value - loc[0]) / scale[0]) - scale[0].log()
    assert posterior.predict(x_new).log_prob(value).numpy() == pytest.approx(mixed.numpy())
    gaussians = bdl.PFN(toy_network("mixture"), num_permutations=3).fit(x, y).predict(x_new)
    assert isinstance(gaussians, GaussianMixture)
    assert gaussians.loc.shape == (5, 3 * HEADS["mixture"])
    assert gaussians.weights.sum(-1).numpy() == pytest.approx(1.0)


def test_labels_are_called_by_their_place_among_those_seen():
    """Classes 1, 2 and 4 are the network's 0, 1 and 2; what was not seen has no mass; orders of labels are averaged."""
    network, (x, y) = toy_network("classes"), data(18, classes=3)
    names = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    few = bdl.PFN(network).fit(x, y).predict(X_NEW)
    named = bdl.PFN(network).fit(x, names[y.long()]).predict(X_NEW)
    assert few.probs.shape == (7, 3)
    assert named.probs.shape == (7, 5)
    assert named.probs[:, [1, 2, 4]].numpy() == pytest.approx(few.probs.numpy())
    assert bool((named.probs[:, [0, 3]] == 0).all())
    module = network.to(dtype=torch.float64).network
    centre, spread = x.mean(0), x.std(0, correction=0)
    posterior = bdl.PFN(network, num_permutations=3).fit(x, y, seed=2)
    total = torch.zeros(7, 3, dtype=torch.float64)
    for columns, scores in zip(*posterior._context.readings, strict=True):
        code = scores[:3].argsort().argsort()
        u, v = ((t - centre)[:, columns] / spread[columns] for t in (x, X_NEW))
        raw = module(u[None], code[y.long()][None], v[None])[0]
        total += raw[:, code].softmax(-1) / 3
    assert posterior.predict(X_NEW).probs.numpy() == pytest.approx(total.numpy())


def test_a_classifiers_functions_are_rollouts_around_its_predictive():
    """64 ways to go on, the same ones however they are asked for."""
    x, y = data(18, classes=3)
    posterior = bdl.PFN(toy_network("classes")).fit(x, y)
    latent = posterior.predict(X_NEW, noise=False)
    assert latent.draws.shape == (7, 3, 64)
    some = posterior.functions(10, seed=1)(X_NEW)
    distance = (latent.draws.movedim(-1, 0).unsqueeze(0) - some.unsqueeze(1)).abs().amax((-1, -2)).amin(-1)
    assert bool((distance < 1e-9).all())
    assert some.exp().sum(-1).numpy() == pytest.approx(1.0)


def test_a_joint_draw_is_a_chain_of_predictions():
    """E f1 f2 over draws against quadrature of the chain rule, in both orders: within 5 standard errors."""
    network, (x, y) = toy_network("mixture"), data(9)
    posterior = bdl.PFN(network).fit(x, y)
    x2 = X_NEW[:2]
    module = network.to(dtype=torch.float64).network
    units, one = posterior._units, torch.ones(1, 1, dtype=torch.float64)
    inner, v = units.inward_x(x, torch.float64)[None], units.inward_x(x2, torch.float64)[None]
    cache = module.encode(inner, units.inward_y(y[:, None], torch.float64).squeeze(-1)[None])
    nodes, weights = np.polynomial.legendre.leggauss(400)
    want = 0.0
    for first, second in ((0, 1), (1, 0)):
        law = predictive(module.architecture, module.query(cache, v[:, first : first + 1], one), None)
        f = torch.tensor(12 * nodes)
        mass = law.log_prob(f[:, None, None]).exp().reshape(-1) * torch.tensor(12 * weights)
        assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)
        wide = type(cache)(*(tuple(t.expand(400, -1, -1, -1) for t in kind) for kind in cache))
        here = v[:, first : first + 1].expand(400, 1, 2)
        longer = module.append(wide, here, f[:, None], noiseless=True)
        there = v[:, second : second + 1].expand(400, 1, 2)
        after = predictive(module.architecture, module.query(longer, there, one.expand(400, 1)), None).mean.squeeze(-1)
        want += 0.5 * float((mass * f * after).sum())
    draws = ((posterior.sample(x2, (40_000,), seed=7) - units.y_loc.squeeze(-1)) / units.y_scale.squeeze(-1)).prod(-1)
    assert float(draws.mean()) == pytest.approx(want, abs=5 * float(draws.std()) / 200)


@pytest.mark.parametrize("head", ["bars", "mixture"])
def test_the_first_point_of_a_draw_has_its_marginal(head):
    """Kolmogorov-Smirnov on 8000 draws at one point; a false alarm has probability 1e-4."""
    x, y = data(9)
    posterior = bdl.PFN(toy_network(head)).fit(x, y)
    law = posterior.predict(X_NEW[:1], noise=False)
    draws = posterior.sample(X_NEW[:1], (8000,), seed=3)
    assert stats.kstest(draws[:, 0].numpy(), lambda v: law.cdf(v[:, None]).squeeze(-1).numpy()).pvalue > 1e-4


def test_labels_of_a_rollout_have_the_predictive_probabilities():
    """A chi-square test of 6000 labels drawn at one point; a false alarm has probability 1e-4."""
    x, y = data(18, classes=3)
    posterior = bdl.PFN(toy_network("classes"), num_permutations=2).fit(x, y)
    inner = posterior._units.inward_x(X_NEW[:1], torch.float64)
    u = torch.rand(6000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, labels = posterior._reader.roll(posterior._context.repeat(6000), inner.expand(6000, 1, 2), u)
    counts = torch.bincount(labels.reshape(-1).long(), minlength=3)
    assert stats.chisquare(counts.numpy(), 6000 * posterior.predict(X_NEW[:1]).probs[0].numpy()).pvalue > 1e-4


def test_functions_have_the_moments_of_draws_after_the_anchors():
    """Mean and variance over 3000 functions against those of sums over anchors: E m, and E s^2 + Var m."""
    x, y = data(9)
    posterior = bdl.PFN(toy_network("bars")).fit(x, y)
    num = 3000
    values = posterior.functions(num, seed=3, num_anchors=4)(X_NEW)
    context, _ = posterior._after_anchors(num, 4, 12, noiseless=True)
    inner = posterior._units.inward_x(X_NEW, torch.float64)
    mean, deviation = posterior._reader.moments(context, inner.expand(num, 7, 2), noiseless=True)
    scale = float(y.std(correction=0))
    want = scale**2 * (deviation.square().mean(0) + mean.var(0))
    assert values.mean(0).numpy() == pytest.approx(
        (y.mean() + scale * mean.mean(0)).numpy(), abs=7 * float(want.max()) ** 0.5 / num**0.5
    )
    assert values.var(0).numpy() == pytest.approx(want.numpy(), rel=0.2)
    assert posterior.functions(0)(X_NEW).shape == (0, 7)


def test_the_residual_is_a_smooth_process_of_unit_variance():
    """Variance 1 and RBF correlation at half a lengthscale, over 20,000 functions: within 5 standard errors."""
    spacing = torch.full((1, 1), 0.8, dtype=torch.float64)
    z = residual_of(20_000, 1, 2, spacing, 4, torch.zeros((), dtype=torch.float64))
    x = torch.tensor([[0.3, -1.0], [0.3, -0.6]], dtype=torch.float64)
    values = z(x.expand(20_000, 1, 2, 2)).squeeze(1)
    assert values.mean(0).numpy() == pytest.approx(0.0, abs=5 / 20_000**0.5)
    assert values.square().mean(0).numpy() == pytest.approx(1.0, abs=5 * 1.5 / 20_000**0.5)
    assert float(values.prod(-1).mean()) == pytest.approx(math.exp(-0.125), abs=5 * 1.5 / 20_000**0.5)


def test_anchors_fill_the_box_and_take_in_the_data():
    x = data(30)[0].unsqueeze(0)
    anchors, spacing = anchors_of(x, [-1.7, 1.7], 5, 32, 3)
    assert anchors.shape == (5, 1, 32, 2)
    low, high = x.amin(-2).clamp_max(-1.7), x.amax(-2).clamp_min(1.7)
    assert bool(((anchors >= low) & (anchors <= high)).all())
    own = (anchors.unsqueeze(-2) == x.unsqueeze(-3)).all(-1).any(-1).sum(-1)
    assert bool((own == 16).all())
    assert not torch.equal(anchors[0].sort(-2).values, anchors[1].sort(-2).values)
    assert spacing.shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("batch", "lead"), [((), ()), ((), (4,)), ((3,), (3,)), ((3,), (5, 3)), ((1, 3), (2, 3)), ((2, 1, 3), (2, 4, 3))]
)
def test_rows_go_there_and_back(batch, lead):
    """Every question finds its data set: value = 1000 set + 100 output + question's own x."""
    k, s = 2, 3
    x = torch.randint(100, (*lead, s, 1), generator=torch.Generator().manual_seed(0)).double()
    rows = Rows.of(x, torch.Size(batch), k)
    sets = torch.arange(math.prod(batch), dtype=torch.float64)
    offset = (1000 * sets[:, None] + 100 * torch.arange(k)).reshape(-1)
    want = x + 100 * torch.arange(k) + 1000 * sets.reshape(batch)[..., None, None]
    assert torch.equal(rows.marginal(rows.apart(x).squeeze(-1) + offset[:, None]), want.expand(*lead, s, k))
    together = rows.together(x).squeeze(-1)
    each = offset.repeat_interleave(len(together) // len(offset))
    assert torch.equal(rows.joint(together + each[:, None]), want.expand(*lead, s, k))


def test_hypotheses_are_told_in_the_users_units():
    """What they say, put into a Gaussian process by hand, is the predictive; columns are found again in any reading."""
    g = torch.Generator().manual_seed(4)
    x, y = 3 + 10 * torch.rand(2, 9, 3, generator=g).double(), 5 + 2 * torch.randn(2, 9, 2, generator=g).double()
    xs = 3 + 10 * torch.rand(2, 4, 3, generator=g).double()
    posterior = bdl.PFN(toy_network("kernel"), num_permutations=2).fit(x, y)
    h = posterior.hyperparameters
    assert h["lengthscale"].shape == (2, 2, 6, 3)
    assert h["weight"].sum(-1).numpy() == pytest.approx(1)
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))
    params = {"outputscale": h["outputscale"], "base.lengthscale": h["lengthscale"]}
    inputs, asked = x[:, None, None], xs[:, None, None]
    centre = y.mean(-2)[..., None, None]
    noisy = kernel(inputs, None, params) + h["noise_variance"][..., None, None] * torch.eye(9).double()
    gain = torch.linalg.solve(noisy, kernel(inputs, asked, params))
    mean = (gain.mT @ (y.mT[:, :, None, :, None] - centre[..., None])).squeeze(-1)
    wanted = (h["weight"].unsqueeze(-1) * mean).sum(2) + centre[..., 0]
    assert posterior.predict(xs).mean.numpy() == pytest.approx(wanted.mT.numpy(), rel=1e-6)
    single = bdl.PFN(toy_network("kernel")).fit(x[0], y[0, :, 0]).hyperparameters
    assert single["lengthscale"].shape == (3, 3)
    assert single["weight"].shape == (3,)
    with pytest.raises(SettingError, match="head of kernels"):
        bdl.PFN(toy_network("mixture")).fit(x[0], y[0, :, 0]).hyperparameters  # noqa: B018


def test_outside_the_trained_range():
    """Far outside is refused, outside warned of and noted, inside silent."""
    engine = bdl.PFN(toy_network("mixture"))
    x, y = data(60)
    with pytest.warns(OutOfRangeWarning, match="60 points"):
        posterior = engine.fit(x, y)
    assert posterior.diagnostics["inside_range"] == {"n": False, "d": True, "x": True}
    assert posterior.diagnostics["training_seconds"] == 1.5
    with pytest.raises(DataError, match="twice"):
        engine.fit(*data(101))
    with pytest.raises(ShapeError, match="up to 3 columns"):
        engine.fit(*data(10, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = engine.fit(*data(20))
        posterior.predict(X_NEW)
    with pytest.warns(OutOfRangeWarning, match="test inputs"):
        posterior.predict(100 * X_NEW)
    raw = bdl.PFN(toy_network("mixture", inputs="raw"))
    with pytest.warns(OutOfRangeWarning, match="inputs beyond"):
        raw.fit(x[:20] + 50, y[:20])


def test_units_are_those_of_the_card():
    """The unit cube is the box of the data; raw stays; standardize=False leaves everything."""
    x, y = data(15)
    x[:, 1] = 4.0
    units = (
        bdl.PFN(toy_network("mixture", inputs="unit", ranges={"n": [0, 50], "d": [1, 3], "x": [0, 1]})).fit(x, y)._units
    )
    inner = units.inward_x(x, torch.float64)
    assert inner.amin(-2).tolist() == [0.0, 0.5]
    assert float(inner[:, 0].max()) == pytest.approx(1.0)
    ranges = {"n": [0, 50], "d": [1, 3], "x": [-9, 9]}
    raw = bdl.PFN(toy_network("mixture", inputs="raw", targets="raw", ranges=ranges)).fit(x, y)._units
    assert torch.equal(raw.inward_x(x, torch.float64), x)
    assert float(raw.y_loc) == 0
    off = bdl.PFN(toy_network("mixture", ranges=ranges), standardize=False).fit(x, y)._units
    assert float(off.y_scale) == float(off.x_scale[..., 0]) == 1


def test_a_network_of_noisy_values_refuses_to_speak_of_the_function():
    x, y = data(12)
    posterior = bdl.PFN(toy_network("bars", num_conditions=0, noise_token=False)).fit(x, y)
    assert isinstance(posterior.predict(X_NEW), BarDistribution)
    for call in (
        lambda: posterior.predict(X_NEW, noise=False),
        lambda: posterior.sample(X_NEW),
        lambda: posterior.functions(2),
    ):
        with pytest.raises(SettingError, match="noisy values only"):
            call()


def test_conditions_on_the_prior_reach_context_and_query():
    network, (x, y) = toy_network("mixture", num_conditions=3), data(12)
    means = [bdl.PFN(network, conditions=c).fit(x, y).predict(X_NEW).mean for c in ((), (0.0, 0.0), (1.0, -2.0))]
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2])
    module = network.to(dtype=torch.float64).network
    posterior = bdl.PFN(network, conditions=(1.0, -2.0)).fit(x, y)
    units, told = posterior._units, torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    cache = module.encode(
        units.inward_x(x, torch.float64)[None], units.inward_y(y[:, None], torch.float64).squeeze(-1)[None], told
    )
    raw = module.query(cache, units.inward_x(X_NEW, torch.float64)[None], told)[0]
    want = units.outward(predictive(module.architecture, raw, None).mean[:, None]).squeeze(-1)
    assert means[2].numpy() == pytest.approx(want.numpy())


@pytest.mark.parametrize(
    "make",
    [
        lambda: bdl.PFN("gp"),
        lambda: bdl.PFN(toy_network("bars"), num_permutations=0),
        lambda: bdl.PFN(toy_network("bars"), update="sometimes"),
        lambda: bdl.PFN(toy_network("bars"), precision="half"),
        lambda: bdl.PFN(toy_network("bars"), num_classes=3),
        lambda: bdl.PFN(toy_network("classes"), num_classes=7),
        lambda: bdl.PFN(toy_network("bars"), conditions=(1.0,)),
        lambda: bdl.PFN.from_pretrained("no such network"),
    ],
)
def test_wrong_settings_are_refused_at_the_door(make):
    with pytest.raises(SettingError, match="fix"):
        make()


def test_a_saved_posterior_with_another_network_is_refused(tmp_path):
    """Weights that are missing, of other shapes or not finite; no code in the file is run."""
    bdl.PFN(toy_network("bars")).fit(*data(12)).save(tmp_path / "a.bdl")
    record, tensors = _storage.read(tmp_path / "a.bdl")
    name = next(name for name in tensors if name.startswith("network."))

    def refused(changed_record, changed):
        _storage.write(tmp_path / "b.bdl", changed_record, changed)
        with pytest.raises(StorageError, match="fix"):
            bdl.load(tmp_path / "b.bdl")

    refused(record, {k: v for k, v in tensors.items() if k != name})
    refused(record, tensors | {name: tensors[name][..., :1]})
    refused(record, tensors | {name: torch.full_like(tensors[name], math.nan)})
    refused(record, tensors | {"network_borders": tensors["network_borders"].flip(0)})
    refused(record | {"architecture": {**record["architecture"], "num_layers": 3}}, tensors)
    refused({k: v for k, v in record.items() if k != "settings"}, tensors)


def test_a_file_holds_all_that_is_needed(tmp_path):
    """Draws, settings and classes come back, for every head."""
    for head in HEADS:
        classes = 3 if head == "classes" else 0
        engine = bdl.PFN(toy_network(head), num_permutations=2, precision="float32")
        posterior = engine.fit(*data(12, classes=classes), seed=4)
        posterior.save(tmp_path / "a.bdl")
        again = bdl.load(tmp_path / "a.bdl")
        assert torch.equal(again.sample(X_NEW, (3,), seed=1), posterior.sample(X_NEW, (3,), seed=1))
        assert again._settings == posterior._settings
        assert again.model == posterior.model


def test_botorch_takes_a_pfn_by_its_functions_and_by_its_bars():
    """The closed form is that of the predictive of f, above and below; gradients flow; noise is never negative."""
    x, y = data(12)
    posterior = bdl.PFN(toy_network("bars")).fit(x, y)
    best, points = float(y.max()), X_NEW.unsqueeze(-2).clone().requires_grad_(True)
    model = posterior.to_botorch(view="gaussian", num_samples=16)
    value = LogExpectedImprovement(model, best_f=best)(points)
    law = posterior.predict(X_NEW, noise=False)
    assert value.detach().numpy() == pytest.approx(law.log_expected_improvement(best).numpy())
    below = LogExpectedImprovement(model, best_f=4.0, maximize=False)(points).exp().detach()
    grid = torch.linspace(-60.0, 4.0, 200_001, dtype=torch.float64)  # E(4 - f)+ is the integral of the cdf up to 4
    want = torch.trapezoid(law.cdf(grid[:, None]), grid, dim=0)
    assert below.numpy() == pytest.approx(want.numpy(), rel=1e-5)
    members = posterior.to_botorch(num_samples=16)
    assert type(members).__name__ == "MemberModel"
    by_members = qLogExpectedImprovement(members, best_f=best)(points)
    for result in (value, by_members):
        (slope,) = torch.autograd.grad(result.sum(), points)
        assert bool(torch.isfinite(slope).all())
    assert bool((members.posterior(X_NEW, observation_noise=True).variance > 0).all())


def test_arviz_has_functions_and_replicates():
    tree = bdl.PFN(toy_network("mixture")).fit(*data(12)).to_arviz()
    assert tree["posterior"]["f"].shape == (1, 200, 12)
    assert tree["posterior_predictive"]["y"].shape == (1, 200, 12)
