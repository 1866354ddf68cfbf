"""What a surrogate answers at some points, before BoTorch has it: a Gaussian in groups of outputs, or members.

Both can be joined with those of other surrogates, cut down to some outputs, and made into a posterior of BoTorch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.exceptions.errors import UnsupportedError
from botorch.posteriors import GPyTorchPosterior
from botorch.posteriors import Posterior as BotorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import BlockDiagLinearOperator, CholLinearOperator, TriangularLinearOperator
from torch import Tensor

from bayesdl import ops
from bayesdl.errors import NumericalError, ShapeError, fail
from bayesdl.interop._botorch_laws import grouped, ungrouped
from bayesdl.interop._botorch_members import MemberPosterior


class GaussianAnswer(NamedTuple):
    """Mean (*b, q, m) and covariance (*b, g, p, p) of g independent groups of outputs, p = q m / g."""

    mean: Tensor
    covariance: Tensor

    def join(self, others: list[GaussianAnswer]) -> GaussianAnswer:
        """Side by side with independent answers at the same points."""
        parts = [self, *others]
        lead = torch.broadcast_shapes(*(part.mean.shape[:-2] for part in parts))
        mean = torch.cat([part.mean.expand(*lead, *part.mean.shape[-2:]) for part in parts], -1)
        blocks = [part.covariance.expand(*lead, *part.covariance.shape[-3:]) for part in parts]
        q = self.mean.shape[-2]
        if all(block.shape[-1] == q for block in blocks):
            return GaussianAnswer(mean, torch.cat(blocks, -3))
        singles = [block[..., i, :, :] for block in blocks for i in range(block.shape[-3])]
        total, at, rows = mean.shape[-2:].numel(), 0, []
        for block in singles:
            after = total - at - block.shape[-1]
            rows.append(torch.nn.functional.pad(block, (at, after)))
            at += block.shape[-1]
        whole = torch.cat(rows, -2)
        return GaussianAnswer(mean, whole.unsqueeze(-3))

    def select(self, outputs: list[int]) -> GaussianAnswer:
        """Some of the outputs."""
        q, m = self.mean.shape[-2:]
        if self.covariance.shape[-3] == m:
            return GaussianAnswer(self.mean[..., outputs], self.covariance[..., outputs, :, :])
        kept = torch.cat([torch.arange(i * q, (i + 1) * q, device=self.mean.device) for i in outputs])
        covariance = self.covariance.index_select(-1, kept).index_select(-2, kept)
        return GaussianAnswer(self.mean[..., outputs], covariance)

    def to_botorch(self, dtype: torch.dtype, transform: PosteriorTransform | None, x: Tensor) -> BotorchPosterior:
        """A `GaussianPosterior` in `dtype`, transformed where asked."""
        answer = GaussianPosterior(self.mean.to(dtype), self.covariance.to(dtype))
        return answer if transform is None else transform(posterior=answer, X=x)


class GaussianPosterior(GPyTorchPosterior):
    """A `GPyTorchPosterior` that is factored and given a distribution of gpytorch's only where that is asked for.

    Args:
        mean: (*b, q, m).
        covariance: (*b, g, p, p).
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self._mean, self._covariance = mean, covariance
        self._is_mt = mean.shape[-1] > 1

    @functools.cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of the covariance, (*b, g, p, p), with the jitter that it needs.

        Raises:
            NumericalError: No jitter makes the covariance positive definite.
        """
        factor, _, failed = ops.cholesky(self._covariance)
        if bool(failed.any()):
            wanted = "the joint covariance of the points must be positive definite."
            got = f"{int(failed.sum())} of {failed.numel()} that no jitter up to 1e-5 of their diagonal makes so"
            fix = "fewer points at once, no two of them equal, or more observation noise"
            fail(NumericalError, "to_botorch", wanted, got=got, fix=fix)
        return factor

    @functools.cached_property
    def _point_by_point(self) -> tuple[Tensor, Tensor]:
        """The factor with the outputs of a group beside one another at each point, and the order that leads there.

        So the draws at the first points do not depend on the points after them, as acquisitions take for granted that
        compare new points with old ones.
        """
        q, width = self._mean.shape[-2], self._covariance.shape[-1]
        order = torch.arange(width, device=self.device).reshape(-1, q).mT.reshape(-1)
        if width == q:
            return self.factor, order
        covariance = self._covariance.index_select(-1, order).index_select(-2, order)
        return GaussianPosterior(self._mean, covariance).factor, order

    @functools.cached_property
    def distribution(self) -> MultivariateNormal:
        """The multivariate normal; of several outputs, not interleaved."""
        operator = CholLinearOperator(TriangularLinearOperator(self.factor))
        if not self._is_mt:
            return MultivariateNormal(self._mean.squeeze(-1), operator[..., 0, :, :])
        groups = self._covariance.shape[-3]
        whole = BlockDiagLinearOperator(operator) if groups > 1 else operator[..., 0, :, :]
        return MultitaskMultivariateNormal(self._mean, whole, interleaved=False)

    @property
    def mean(self) -> Tensor:
        """(*b, q, m)."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """(*b, q, m)."""
        diagonal = self._covariance.diagonal(dim1=-2, dim2=-1)
        return ungrouped(diagonal, self._mean.shape[-1]).expand_as(self._mean)

    @property
    def device(self) -> torch.device:
        """Of the mean."""
        return self._mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the mean."""
        return self._mean.dtype

    @property
    def batch_shape(self) -> torch.Size:
        """*b."""
        return self._mean.shape[:-2]

    @property
    def base_sample_shape(self) -> torch.Size:
        """(*b, q) for one output, (*b, q, m) for several."""
        return self._mean.shape if self._is_mt else self._mean.shape[:-1]

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008 - BoTorch's own
        return torch.Size((*sample_shape, *self._mean.shape))

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """mean + L z, (*sample_shape, *b, q, m), where L goes point by point."""
        if base_samples.shape[: len(sample_shape)] != sample_shape:
            got = f"{tuple(sample_shape)} and {tuple(base_samples.shape)}"
            fix = "draw the base samples with the sampler"
            fail(ShapeError, "to_botorch", "sample_shape and base_samples must agree.", got=got, fix=fix)
        z = base_samples if self._is_mt else base_samples.unsqueeze(-1)
        factor, order = self._point_by_point
        numbers = grouped(z, self._covariance.shape[-3]).index_select(-1, order)
        grown = (factor @ numbers.unsqueeze(-1)).squeeze(-1).index_select(-1, order.argsort())
        return self._mean + ungrouped(grown, self._mean.shape[-1])


class MemberAnswer(NamedTuple):
    """Values (*b, S, q, m) of S members, and the variance of the noise on them or None."""

    values: Tensor
    noise_variance: Tensor | None

    def join(self, others: list[MemberAnswer]) -> MemberAnswer:
        """Outputs of other surrogates beside these, member by member; as many members as the least of them has."""
        parts = [self, *others]
        num = min(part.values.shape[-3] for part in parts)
        lead = torch.broadcast_shapes(*(part.values.shape[:-3] for part in parts))
        values = torch.cat([p.values[..., :num, :, :].expand(*lead, num, *p.values.shape[-2:]) for p in parts], -1)
        if self.noise_variance is None:
            return MemberAnswer(values, None)
        noise = [p.noise_variance.expand_as(p.values)[..., :num, :, :] for p in parts]
        return MemberAnswer(values, torch.cat([n.expand(*lead, *n.shape[-3:]) for n in noise], -1))

    def select(self, outputs: list[int]) -> MemberAnswer:
        """Some of the outputs."""
        noise = self.noise_variance
        return MemberAnswer(
            self.values[..., outputs], None if noise is None else noise.expand_as(self.values)[..., outputs]
        )

    def to_botorch(self, dtype: torch.dtype, transform: PosteriorTransform | None, x: Tensor) -> BotorchPosterior:
        """A `MemberPosterior` in `dtype`, every member transformed where asked.

        Raises:
            UnsupportedError: Noise is wanted through a transform other than a weighted sum of outputs.
        """
        values = self.values.to(dtype)
        noise = None if self.noise_variance is None else self.noise_variance.to(dtype)
        if transform is not None:
            weights = getattr(transform, "weights", None)
            linear = getattr(transform, "scalarize", False) and isinstance(weights, Tensor) and weights.ndim == 1
            if noise is not None and not linear:
                raise UnsupportedError(
                    f"MemberModel.posterior: {type(transform).__name__} of noisy values is not supported; ask for the "
                    "values without noise, or use posterior.to_botorch(view='gaussian')"
                )
            if noise is not None:
                noise = (noise.expand_as(values) @ weights.to(noise).square()).unsqueeze(-1)
            before = values.ndim
            values = transform.evaluate(values, x.unsqueeze(-3))
            values = values if values.ndim == before else values.unsqueeze(-1)
        return MemberPosterior(values, noise)
