"""The shipped network `learning-curve`: how a training curve goes on, by the prior of LC-PFN.

    bayesdl pretrain --prior benchmarks/recipes/learning_curve.py \\
        --out bayesdl/amortized/weights/learning-curve.safetensors

It began with the weights of one that had been trained for 6500 steps of 24 curves on drawn targets (`--start`).

A curve has 100 epochs; the first n are known, and the queries are epochs after them. The log tells the mean negative
log likelihood of the rest of a thousand fresh curves, in units of accuracy.
"""

import functools
import math

import torch

from bayesdl.amortized import Architecture, Pretrained, Schedule
from bayesdl.amortized.heads import log_score
from bayesdl.priors.tasks import LearningCurves, Tasks

prior = LearningCurves()
architecture = Architecture(
    max_inputs=1, head="mixture", outputs=10, width=96, num_layers=4, hidden=256, num_conditions=1
)
schedule = Schedule(
    num_steps=22_000, batch=64, n_min=1, n_max=90, num_queries=16, rows=100, decay="linear", appended_share=0.25,
    noiseless_share=0.25, targets="expected",
)  # fmt: skip
card = {"name": "learning-curve", "licence": "Apache-2.0", "inputs": "raw", "targets": "raw"}


@functools.cache
def curves() -> Tasks:
    """The curves on which it is judged on the way."""
    return prior.sample(1000, prior.horizon, 1, torch.Generator().manual_seed(1_000_003))


@torch.no_grad()
def evaluate(trained: Pretrained) -> dict[str, float]:
    """Mean negative log likelihood of each later epoch, given the first 5, 10, 20 or 40."""
    x, y = curves().x, curves().y
    per_accuracy = math.log(float(prior.target(torch.tensor(1.0)) - prior.target(torch.tensor(0.0))))
    found = {}
    for n in (5, 10, 20, 40):
        raw = trained.network(x[:, :n], y[:, :n], x[:, n:])
        score = log_score(architecture, raw, trained.borders, y[:, n:])
        found[f"nll_{n}"] = -float(score.mean()) - per_accuracy
    return found
