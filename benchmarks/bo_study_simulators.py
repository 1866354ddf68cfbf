"""Small simulators for `bo_study`, each for many points at once; smaller is better."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

RATES = (("birth", 0.1, 5.0), ("hunt", 0.01, 1.0), ("death", 0.1, 5.0), ("feed", 0.01, 1.0))
_NOT_FINITE = 1e3  # what an explosion counts


def brusselator(x: Tensor) -> Tensor:
    """How far the pattern at time 20 is from the one that is wanted; x holds the rates a, b, d0, d1.

    That is the absolute difference of log(0.001 + s) from 0, for s the variance over cells of both substances:
    a pattern that has died out and one that swings wildly are both far off.

    u' = a + u^2 v - (b + 1) u + d0 lap u,  v' = b u - u^2 v + d1 lap v, explicit Euler, periodic; sides of 2 a cell.
    """
    a, b, d0, d1 = (column.reshape(-1, 1, 1) for column in x.unbind(-1))
    wave = torch.arange(32, dtype=x.dtype) * (2 * math.pi / 32)
    bumps = 0.1 * (wave.unsqueeze(-1).sin() * (2 * wave).cos() + (3 * wave.unsqueeze(-1) + wave).cos())
    u, v, dt = a + bumps, b / a + bumps.T, 0.02
    for _ in range(1000):
        lap_u, lap_v = _laplacian(u), _laplacian(v)
        reaction = u * u * v
        u, v = (
            u + dt * (a + reaction - (b + 1) * u + d0 * lap_u),
            v + dt * (b * u - reaction + d1 * lap_v),
        )  # fmt: skip
    spread = u.flatten(1).var(-1) + v.flatten(1).var(-1)
    return (1e-3 + torch.nan_to_num(spread, nan=_NOT_FINITE).clamp(0.0, _NOT_FINITE)).log().abs()


def _laplacian(u: Tensor) -> Tensor:
    neighbours = u.roll(1, -1) + u.roll(-1, -1) + u.roll(1, -2) + u.roll(-1, -2)
    return (neighbours - 4 * u) / 4.0


def pest(x: Tensor, seed: int = 0) -> Tensor:
    """Share of crop that is lost plus what control costs, summed over 25 stations.

    At each station pests spread by a draw that all points share. Pesticide k, where x is k + 1, kills a share that
    falls with every earlier use of k, and costs less the more often it was bought before.
    """
    g = torch.Generator().manual_seed(seed)
    spread = 0.1 + 0.4 * torch.rand(25, generator=g, dtype=x.dtype)
    price = torch.tensor([1.0, 0.8, 0.7, 0.5], dtype=x.dtype)
    strength = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=x.dtype) - 0.1 * torch.rand(4, generator=g, dtype=x.dtype)
    tolerance = torch.tensor([0.12, 0.09, 0.06, 0.03], dtype=x.dtype)
    pests = torch.full(x.shape[:1], 0.1, dtype=x.dtype)
    uses = torch.zeros(len(x), 4, dtype=x.dtype)
    total = torch.zeros(len(x), dtype=x.dtype)
    for station in range(25):
        chosen = torch.nn.functional.one_hot(x[:, station].long(), 5)[:, 1:].to(x.dtype)
        kills = (chosen * (strength * (1 - tolerance * uses).clamp_min(0.1))).sum(-1)
        bought = (chosen * price * (1 - 0.02 * uses)).sum(-1)
        uses = uses + chosen
        pests = ((pests + (1 - pests) * spread[station]) * (1 - kills)).clamp(0.0, 1.0)
        total = total + pests + bought
    return total


def cartpole(x: Tensor, seed: int = 0, episodes: int = 10, steps: int = 300) -> Tensor:
    """Mean over episodes of the share of time in which the pole is down, plus a tenth of the cart's mean distance.

    The pole falls at 12 degrees or at 2.4 from the centre; the force is tanh of a linear function of the state, times
    10. Starts are drawn with the seed, the same ones for every x.
    """
    g = torch.Generator().manual_seed(seed)
    state = 0.2 * torch.rand(episodes, 4, generator=g, dtype=x.dtype) - 0.1
    p, v, angle, spin = (part.expand(len(x), episodes) for part in state.unbind(-1))
    up = torch.ones(len(x), episodes, dtype=x.dtype)
    down, distance = torch.zeros_like(up), torch.zeros_like(up)
    gains = x.unsqueeze(1)
    for _ in range(steps):
        push = 10 * (gains * torch.stack([p, v, angle, spin], -1)).sum(-1).tanh()
        common = (push + 0.05 * spin.square() * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * common) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
        move = common - 0.05 * turn * angle.cos() / 1.1
        p, v = p + 0.02 * v * up, v + 0.02 * move * up
        angle, spin = angle + 0.02 * spin * up, spin + 0.02 * turn * up
        up = up * ((angle.abs() < 0.2095) & (p.abs() < 2.4))
        down, distance = down + (1 - up), distance + p.abs().clamp_max(2.4)
    return (down / steps + 0.1 * distance / steps).mean(-1)


def lander(x: Tensor, seed: int = 0, episodes: int = 8) -> Tensor:
    """Mean over episodes of a cost of landing: distance from the pad, speed at touch-down, fuel, and time.

    A craft of two thrusters starts at height 10 with a drawn place and speed, in a drawn wind. Sideways thrust follows
    its place and speed, downward thrust a speed that is wanted at each height; x in the unit cube sets the eight
    numbers of that rule.
    """
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(episodes, 4, generator=g, dtype=x.dtype)
    gain_p, gain_v, lead, gain_h, floor, slope, damp, most = (c.unsqueeze(-1) for c in x.unbind(-1))
    p = (8 * start[:, 0] - 4).expand(len(x), episodes)
    v = (2 * start[:, 1] - 1).expand(len(x), episodes)
    h, fall = torch.full_like(p, 10.0), (-2 * start[:, 2]).expand(len(x), episodes)
    wind = (start[:, 3] - 0.5).expand(len(x), episodes)
    flying = torch.ones_like(p)
    fuel, clock, speed = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for tick in range(300):
        gust = wind + 0.3 * math.sin(0.15 * tick)
        side = (-(4 * gain_p * p + 6 * gain_v * (v + 2 * lead * gust))).clamp(-3.0, 3.0)
        wanted = -(2 * floor + 2 * slope * h.clamp_min(0.0))
        lift = (9.8 * gain_h + 10 * damp * (wanted - fall)).clamp(min=0.0).clamp_max(5 + 15 * most)
        v, fall = v + 0.05 * (side + gust) * flying, fall + 0.05 * (lift - 4.9) * flying
        p, h = p + 0.05 * v * flying, h + 0.05 * fall * flying
        fuel, clock = fuel + 0.05 * (side.abs() + lift) * flying, clock + 0.05 * flying
        landed = flying * (h <= 0)
        speed = torch.where(landed > 0, (v.square() + fall.square()).sqrt(), speed)
        flying = flying * (h > 0)
    lost = 20 * flying + (h - 10).clamp(0.0, 30.0)  # still in the air
    cost = p.abs().clamp_max(20.0) + 3 * speed.clamp_max(20.0) + 0.05 * fuel + 0.2 * clock + lost
    return cost.mean(-1)


def predators(x: Tensor, seed: int = 0) -> Tensor:
    """Log of the mean square error of log counts at 20 times, from a run with known rates and 10 % noise."""
    seen = _counts(torch.tensor([[1.0, 0.1, 1.5, 0.075]], dtype=x.dtype))
    g = torch.Generator().manual_seed(seed)
    seen = seen + 0.1 * torch.randn(seen.shape, generator=g, dtype=x.dtype)
    error = (_counts(x) - seen).square().mean((-1, -2))
    return torch.nan_to_num(error, nan=_NOT_FINITE, posinf=_NOT_FINITE).clamp_max(_NOT_FINITE).log()


def _counts(x: Tensor) -> Tensor:
    """Log numbers of prey and predators (n, 2, 20) from 10 and 5, by the classical Runge-Kutta method."""
    birth, hunt, death, feed = x.unbind(-1)

    def slope(z: Tensor) -> Tensor:  # of the logs, which keeps both positive
        prey, predator = z.clamp_max(30.0).exp().unbind(-1)
        return torch.stack([birth - hunt * predator, feed * prey - death], -1)

    z = torch.tensor([10.0, 5.0], dtype=x.dtype).log().expand(len(x), 2)
    found, dt = [], 0.01
    for tick in range(1, 1001):
        k1 = slope(z)
        k2 = slope(z + 0.5 * dt * k1)
        k3 = slope(z + 0.5 * dt * k2)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + slope(z + dt * k3))
        z = z.clamp(-60.0, 60.0)
        if tick % 50 == 0:
            found.append(z)
    return torch.stack(found, -1)


@functools.cache
def _regression(seed: int) -> tuple[Tensor, Tensor]:
    """200 points of a function of five inputs of unlike scales, of which three matter."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 5, generator=g, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0]).double()
    y = (2 * x[:, 0]).sin() + (0.1 * x[:, 1]) ** 2 + 5 * x[:, 2] * x[:, 0]
    y = y + 0.2 * torch.randn(200, generator=g, dtype=torch.float64)
    return x, (y - y.mean()) / y.std()


def tuning(x: Tensor, seed: int = 0) -> Tensor:
    """Log of the error of kernel ridge regression, trained on 120 and tested on 80 points; x as in `tuning`'s space."""
    inputs, targets = _regression(seed)
    found = []
    for kernel, lengthscale, ridge, degree, scaled in x.tolist():
        z = inputs / inputs.std(0) if scaled == 0 else inputs
        gram = _gram(int(kernel), z, lengthscale, int(degree))
        train, test = slice(0, 120), slice(120, 200)
        mean = targets[train].mean()
        identity = torch.eye(120, dtype=z.dtype)
        solved, info = torch.linalg.solve_ex(gram[train, train] + ridge * identity, targets[train] - mean)
        error = (gram[test, train] @ solved + mean - targets[test]).square().mean()
        found.append(error if int(info) == 0 else torch.tensor(_NOT_FINITE, dtype=z.dtype))
    return torch.nan_to_num(torch.stack(found), nan=_NOT_FINITE).clamp(1e-6, _NOT_FINITE).log()


def _gram(kernel: int, z: Tensor, lengthscale: float, degree: int) -> Tensor:
    if kernel == 0:
        return (-0.5 * torch.cdist(z, z).square() / lengthscale**2).exp()
    if kernel == 1:
        return (-torch.cdist(z, z, p=1.0) / lengthscale).exp()
    return (1 + z @ z.T / lengthscale**2 / z.shape[-1]) ** degree
