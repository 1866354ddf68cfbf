r"""A belief held as S functions, as BoTorch sees it: their values at the points asked for, and how to draw from them.

One standard normal number z picks a member, the one numbered floor(S Phi(z)); where noise is wanted, q m more numbers
make it. Every sampler of BoTorch that gives normal base samples can therefore drive a `MemberPosterior`, its base
samples are shared by all t-batches, and a sample is the same member at every point, however often it is asked.
"""

from __future__ import annotations

import torch
from botorch.posteriors import Posterior
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import NormalMCSampler
from torch import Tensor
from torch.quasirandom import SobolEngine

_NOT_GAUSSIAN = (
    "the view by members has no multivariate normal distribution, which entropy searches and other Gaussian formulas "
    "need; use posterior.to_botorch(view='gaussian')"
)


class MemberPosterior(Posterior):
    """S equally likely values of f: their mean, their variance (divisor S), and samples.

    Args:
        values: (*b, S, q, m).
        noise_variance: (*b, S, q, m) or what broadcasts with it, added to every draw; None for draws of f.
    """

    def __init__(self, values: Tensor, noise_variance: Tensor | None = None) -> None:
        self.values = values
        self.noise_variance = noise_variance

    @property
    def num_members(self) -> int:
        """S."""
        return self.values.shape[-3]

    @property
    def batch_shape(self) -> torch.Size:
        """*b."""
        return self.values.shape[:-3]

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def mean(self) -> Tensor:
        """(*b, q, m)."""
        return self.values.mean(-3)

    @property
    def variance(self) -> Tensor:
        """(*b, q, m), with the noise where there is any."""
        spread = self.values.var(-3, correction=0)
        return spread if self.noise_variance is None else spread + self.noise_variance.expand_as(self.values).mean(-3)

    def __getattr__(self, name: str) -> None:
        """What Gaussians have and members do not: an `AttributeError` says what to do instead."""
        told = f": {_NOT_GAUSSIAN}" if name in ("distribution", "mvn", "covariance_matrix") else ""
        raise AttributeError(f"MemberPosterior has no {name}{told}")

    @property
    def base_sample_shape(self) -> torch.Size:
        """(*b, 1), or (*b, 1 + q m) with noise."""
        noise = 0 if self.noise_variance is None else self.values.shape[-2:].numel()
        return torch.Size((*self.batch_shape, 1 + noise))

    @property
    def batch_range(self) -> tuple[int, int]:
        """All axes but the last are t-batches, which share their base samples."""
        return (0, -1)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008 - BoTorch's own
        return torch.Size((*sample_shape, *self.batch_shape, *self.values.shape[-2:]))

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Draws (*sample_shape, *b, q, m) from a fixed quasi-random set, so that the same call gives the same draws."""
        shape = torch.Size((1,)) if sample_shape is None else sample_shape
        return SobolQMCNormalSampler(shape, seed=0)(self)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Draws (*sample_shape, *b, q, m) from standard normal numbers (*sample_shape, *b or 1s, 1 or 1 + q m)."""
        index = (torch.special.ndtr(base_samples[..., 0]) * self.num_members).long().clamp(0, self.num_members - 1)
        draws = self._pick(sample_shape, index)
        if self.noise_variance is None:
            return draws
        z = base_samples[..., 1:].unflatten(-1, self.values.shape[-2:])
        own = MemberPosterior(self.noise_variance.sqrt().expand_as(self.values))._pick(sample_shape, index)
        return draws + own * z

    def _pick(self, sample_shape: torch.Size, index: Tensor) -> Tensor:
        """Members by number, one for each sample and element of the batch: index (*sample_shape, *b or 1s)."""
        k = len(sample_shape)
        # base samples are shared over t-batches: expanded axes have stride 0, and one index then serves them all
        shared = all(size == 1 or step == 0 for size, step in zip(index.shape[k:], index.stride()[k:], strict=True))
        if shared:
            first = index.reshape(*sample_shape, -1)[..., 0] if index.ndim > k else index
            chosen = self.values.index_select(-3, first.reshape(-1)).movedim(-3, 0)
            return chosen.reshape(*sample_shape, *chosen.shape[1:])
        place = index.expand(*sample_shape, *self.batch_shape)[..., None, None, None]
        values = self.values.expand(*sample_shape, *self.values.shape)
        return values.gather(-3, place.expand(*place.shape[:-3], 1, *self.values.shape[-2:])).squeeze(-3)


class MemberSampler(NormalMCSampler):
    """Base samples that go through the members in turn: all of them once where as many samples are wanted.

    A sample shape (N,) with N above the number of members becomes (S,): S samples say everything that there is to say.
    Fewer samples are members at equal distances, the middles of N equal shares.

    Args:
        sample_shape: Of the samples.
        seed: Of the noise's part of the base samples.
        num_members: S.
    """

    def __init__(self, sample_shape: torch.Size, seed: int | None = None, *, num_members: int) -> None:
        if len(sample_shape) == 1:
            sample_shape = torch.Size((min(sample_shape[0], num_members),))
        super().__init__(sample_shape, seed=0 if seed is None else seed)

    def _construct_base_samples(self, posterior: MemberPosterior) -> None:
        shape = self._get_collapsed_shape(posterior)
        if self.base_samples is None or self.base_samples.shape != shape:
            num, width = self.sample_shape.numel(), shape[-1]
            middle = (torch.arange(num, dtype=torch.float64) + 0.5) / num
            columns = [torch.special.ndtri(middle).unsqueeze(-1), self._noise(num, width - 1)]
            base = torch.cat(columns, -1).reshape(shape)
            self.register_buffer("base_samples", base.to(device=posterior.device, dtype=posterior.dtype))
        if self.base_samples.device != posterior.device or self.base_samples.dtype != posterior.dtype:
            self.to(device=posterior.device, dtype=posterior.dtype)

    def _noise(self, num: int, width: int) -> Tensor:
        if width == 0:
            return torch.zeros(num, 0, dtype=torch.float64)
        if width > SobolEngine.MAXDIM:
            g = torch.Generator().manual_seed(self.seed)
            return torch.randn(num, width, generator=g, dtype=torch.float64)
        uniform = SobolEngine(width, scramble=True, seed=self.seed).draw(num, dtype=torch.float64)
        return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))

    def _update_base_samples(self, posterior: Posterior, base_sampler: MCSampler) -> None:
        """Nothing to do: a sample is the same member whatever other points stand beside."""


@GetSampler.register(MemberPosterior)
def _member_sampler(posterior: MemberPosterior, sample_shape: torch.Size, *, seed: int | None = None) -> MemberSampler:
    return MemberSampler(sample_shape, seed, num_members=posterior.num_members)
