r"""The evidence of a scale mixture and its gradient in all hyper-parameters, for L-BFGS.

Noise inside the scale: log p(y) = h(q) - log|A| / 2 + const with q = r' A^{-1} r, which the fused pass of a plain GP
evaluates once it is given h. Noise outside it: with K = U diag(l) U', p = U'r, a_v = p / (v l + s) and the posterior
weights w_v of the nodes,

    d log p(y) / dK = U ( sum_v w_v v a_v a_v' - diag(sum_v w_v v / (v l + s)) ) U' / 2
    d log p(y) / ds = sum_v w_v ( |a_v|^2 - sum_i 1 / (v l_i + s) ) / 2,     d / dr = -U sum_v w_v a_v

which needs no derivative of eigenvectors.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl.errors import NumericalError, NumericalWarning, fail
from bayesdl.inference._evidence import Energy, Values
from bayesdl.models import GP, Layout
from bayesdl.ops.quadrature import log_nodes
from bayesdl.posterior._scale import (
    Mixing,
    fixed_noise_log_likelihood,
    log_inverse_gamma_evidence,
    log_scale_integrand,
    scaled_log_likelihood,
)
from bayesdl.priors.scale import InverseGamma

_TILE_BYTES = 2**26


def with_shapes(layout: Layout, mixing: Mixing) -> Layout:
    """The layout of a GP with the learned shapes of the prior on v behind its own parameters, as "scale.…"."""
    shapes = tuple(p.prefixed("scale") for p in mixing.prior.parameters())
    return replace(layout, parameters=layout.parameters + shapes)


def scaled_energy(mixing: Mixing, n: int) -> Energy:
    """h(q) = log int p(v) v^(-n/2) exp(-q / (2v)) dv with its slope, and gradients in the learned shapes."""

    def value(quadratic: Tensor, values: Values) -> tuple[Tensor, Tensor, Values]:
        # the pass that calls this may record no graph; what follows needs one of its own, on copies
        with torch.inference_mode(False), torch.enable_grad():
            shapes = mixing.shapes(values)
            # a failed factorisation leaves NaN, which its own problem reports; the others must go on
            q = quadratic.clone().nan_to_num(nan=1.0, posinf=1e300).clamp_min(0.0)
            leaves = [t.detach().requires_grad_() for t in (q, *(v.clone() for v in shapes.values()))]
            h = _log_integral(mixing, leaves[0], n, dict(zip(shapes, leaves[1:], strict=True)))
            slope, *rest = torch.autograd.grad(h.sum(), leaves)
        return h.detach(), slope, {f"scale.{name}": g for name, g in zip(shapes, rest, strict=True)}

    return Energy(value)


def _log_integral(mixing: Mixing, q: Tensor, n: int, shapes: Values) -> Tensor:
    if mixing.method == "closed_form" and isinstance(mixing.prior, InverseGamma):
        return log_inverse_gamma_evidence(mixing.prior, q, n, shapes)
    likelihood, centre = scaled_log_likelihood(q, n)
    return log_nodes(log_scale_integrand(mixing.prior, likelihood, shapes), centre, mixing.num_nodes).log_total


class FixedNoiseEvidence(NamedTuple):
    """As `Evidence`, for noise outside the scale.

    Attributes:
        model: The Gaussian process.
        layout: How the hyper-parameters lie in a vector, learned shapes included.
        x: (sets, n, d).
        y: (sets * k, n).
        mixing: How v is treated; the integral over it is by quadrature.
    """

    model: GP
    layout: Layout
    x: Tensor
    y: Tensor
    mixing: Mixing

    def __call__(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(theta (A, D), which problems (A)) -> (values (A), gradients (A, D)); O(n^3 + M n^2) for each."""
        n = self.y.shape[-1]
        size = max(1, _TILE_BYTES // (8 * n * (n + self.mixing.num_nodes)))
        parts = [self._tile(*pair) for pair in zip(theta.split(size), indices.split(size), strict=True)]
        value, gradient = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return -value / n, -gradient / n

    def _tile(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        problem = indices % self.y.shape[0]
        x, y = self.x[problem // (self.y.shape[0] // self.x.shape[0])], self.y[problem]
        values, constant = self.layout.unpack(theta)
        residual = y - self.model.mean_at(x, values, constant)
        k, pullback = self.model.kernel.value_and_pullback(x, self.model.kernel_values(values))
        lost = ~torch.isfinite(k).all(-1).all(-1)
        if bool(lost.any()):
            k = torch.where(lost[:, None, None], torch.eye(k.shape[-1], dtype=k.dtype, device=k.device), k)
        eigenvalues, vectors = torch.linalg.eigh(k)
        eigenvalues = eigenvalues.clamp_min(0.0)
        along = (vectors.mT @ residual.unsqueeze(-1)).squeeze(-1)
        noise = values["noise_variance"]
        value, v, weight, by_shapes = self._integrate(eigenvalues, along, noise, values)
        spread = v.unsqueeze(-1) * eigenvalues.unsqueeze(-2) + noise[:, None, None]  # (A, M, n)
        a = along.unsqueeze(-2) / spread
        tilted = weight * v
        root = a * tilted.sqrt().unsqueeze(-1)
        inner = root.mT @ root - torch.diag_embed((tilted.unsqueeze(-1) / spread).sum(-2))
        by_noise = 0.5 * (weight * (a.square().sum(-1) - spread.reciprocal().sum(-1))).sum(-1)
        by_residual = -(vectors @ (weight.unsqueeze(-2) @ a).mT).squeeze(-1)
        grads = pullback(0.5 * vectors @ inner @ vectors.mT)
        by_mean, by_constant = self.model.mean_pullback(x, values, -by_residual)
        prior, slopes = self.layout.log_prior(values)
        grads = {f"kernel.{name}": g for name, g in grads.items()} | {"noise_variance": by_noise} | by_mean | by_shapes
        grads = {name: g + slopes[name] for name, g in grads.items()}
        gradient = self.layout.chain(theta, grads, by_constant)
        return torch.where(lost, -torch.inf, value + prior), gradient

    def _integrate(
        self, eigenvalues: Tensor, along: Tensor, noise: Tensor, values: Values
    ) -> tuple[Tensor, Tensor, Tensor, Values]:
        """log p(y) (A), the nodes v and their weights (A, M), and gradients in the learned shapes."""
        shapes = {name: v.detach().clone().requires_grad_() for name, v in self.mixing.shapes(values).items()}
        likelihood, centre = fixed_noise_log_likelihood(eigenvalues, along, noise)
        with torch.enable_grad():
            nodes = log_nodes(log_scale_integrand(self.mixing.prior, likelihood, shapes), centre, self.mixing.num_nodes)
        grads: Values = {}
        if shapes:
            found = torch.autograd.grad(nodes.log_total.sum(), list(shapes.values()))
            grads = {f"scale.{name}": g for name, g in zip(shapes, found, strict=True)}
        constant = 0.5 * self.y.shape[-1] * math.log(2 * math.pi)
        return nodes.log_total.detach() - constant, nodes.u.exp(), nodes.log_weight.detach().exp(), grads


def dense_state(where: str, model: GP, x: Tensor, residual: Tensor, values: Values) -> ops.GPState:
    """The factored covariance of the targets at v = 1: x (*b, 1, n, d), residual (*b, k, n).

    Raises NumericalError where no jitter makes it positive definite; warns where some was needed.
    """
    k_xx = model.kernel(x, params=model.kernel_values(values))
    state = ops.condition(k_xx, x, residual, values["noise_variance"])
    jitter = float(state.jitter.max())
    if not bool(torch.isfinite(state.alpha).all()):
        wanted = "the kernel matrix must be positive definite."
        fix = "raise Gaussian(noise_variance=...) or its lower bound"
        fail(NumericalError, where, wanted, got=f"a failed factorisation with jitter {jitter:.1e}", fix=fix)
    if jitter > 0:
        message = f"{where}: the kernel matrix needed jitter {jitter:.1e} to factorise"
        warnings.warn(message, NumericalWarning, stacklevel=3)
    return state
