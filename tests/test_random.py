"""Random streams: explicit, reproducible, independent of how many there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bayesdl._random import Streams, child_seeds, generator, root_seed
from bayesdl.errors import SettingError


@given(st.integers(0, 2**64 - 1), st.integers(1, 6), st.integers(1, 6))
def test_a_child_seed_does_not_depend_on_how_many_there_are(seed, few, more):
    few, more = sorted((few, more))
    assert child_seeds(seed, few) == child_seeds(seed, more)[:few]
    assert len(set(child_seeds(seed, more))) == more
    assert all(0 <= s < 2**63 for s in child_seeds(seed, more))


def test_children_of_neighbouring_seeds_are_unrelated():
    """Also a child of a child: chain 0 of run 0 must not be run 0 itself."""
    seeds = [s for root in range(50) for s in child_seeds(root, 4)]
    seeds += [s for root in range(50) for s in child_seeds(child_seeds(root, 1)[0], 4)]
    assert len(set(seeds)) == 400


@pytest.mark.parametrize("seed", [0, 7, np.int64(7), np.uint32(7), 2**64 - 1])
def test_an_int_gives_the_same_numbers_every_time(seed):
    a, b = (torch.rand(5, generator=generator(seed)) for _ in range(2))
    assert torch.equal(a, b)
    assert root_seed(seed) == int(seed)


def test_a_generator_is_used_itself_and_advanced():
    g = torch.Generator().manual_seed(3)
    assert generator(g) is g
    first, second = child_seeds(g, 2), child_seeds(g, 2)
    assert first != second
    g.manual_seed(3)
    assert child_seeds(g, 2) == first


def test_none_is_fresh_entropy():
    assert root_seed(None) != root_seed(None)
    assert child_seeds(None, 3) != child_seeds(None, 3)


@pytest.mark.parametrize("seed", [-1, 1.0, True, np.bool_(True), "0", 2**64, [1]])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(SettingError, match="seed must be an int"):
        generator(seed)
    with pytest.raises(SettingError, match=r"got  .*\n  fix"):
        child_seeds(seed, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stream_i_sees_the_same_numbers_alone_or_among_many(dtype):
    like = torch.zeros((), dtype=dtype)
    alone, many = Streams(11, 2), Streams(11, 64)
    for _ in range(2):
        a, b = alone.normal(3, 2, like=like), many.normal(3, 2, like=like)
        assert a.shape == (2, 3, 2)
        assert b.shape == (64, 3, 2)
        assert a.dtype == dtype
        assert torch.equal(a, b[:2])
        assert torch.equal(alone.uniform(like=like), many.uniform(like=like)[:2])
        assert torch.equal(alone.permutation(9), many.permutation(9)[:2])


def test_a_stream_is_what_its_own_generator_draws():
    """Second opinion: the numbers of stream i are those of a generator seeded with child i."""
    streams = Streams(5, 3)
    drawn = streams.normal(4, like=torch.zeros((), dtype=torch.float64))
    for i, seed in enumerate(child_seeds(5, 3)):
        g = torch.Generator().manual_seed(seed)
        assert torch.equal(drawn[i], torch.randn(4, generator=g, dtype=torch.float64))


def test_streams_are_normal_uniform_and_unrelated():
    """Kolmogorov-Smirnov and correlations at fixed seeds; each check fails one right implementation in 10 000."""
    streams = Streams(2, 8)
    like = torch.zeros((), dtype=torch.float64)
    z, u = streams.normal(500, like=like), streams.uniform(500, like=like)
    assert stats.kstest(z.flatten(), "norm").pvalue > 1e-4
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-4
    # 28 correlations of 500 pairs: the largest of 28 normals beyond 4.6 has probability 1e-4
    correlations = np.corrcoef(z.numpy())[np.triu_indices(8, 1)] * 500**0.5
    assert np.abs(correlations).max() < 4.6
    order = streams.permutation(500)
    assert all(row.sort().values.equal(torch.arange(500)) for row in order)
    assert len({tuple(row.tolist()) for row in order}) == 8
