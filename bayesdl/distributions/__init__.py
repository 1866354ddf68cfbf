r"""Predictive distributions: what a posterior believes about y at given inputs, in the user's own units.

Every class is a `torch.distributions.Distribution` over a scalar: `batch_shape` (*b), empty `event_shape`. It has
`mean`, `variance`, `stddev`, `log_prob`, `cdf`, `quantile(q)` and `sample(sample_shape, seed)`. Two things differ from
torch: `quantile` exists for all of them, and sampling never touches the global random state (`seed=None` means fresh
entropy from the operating system). `Normal`, `Bernoulli` and `Categorical` are torch's own with these additions, so
`kl_divergence`, `entropy` and `expand` keep working.

`value` and `q` may be numbers, NumPy arrays, pandas columns or tensors; they are brought to the dtype and device of the
distribution.
"""

from bayesdl.distributions.bar import BarDistribution, pool
from bayesdl.distributions.discrete import Bernoulli, Categorical
from bayesdl.distributions.empirical import Empirical
from bayesdl.distributions.mixture import GaussianMixture
from bayesdl.distributions.normal import Normal
from bayesdl.distributions.student import StudentT

__all__ = ["BarDistribution", "Bernoulli", "Categorical", "Empirical", "GaussianMixture", "Normal", "StudentT", "pool"]
