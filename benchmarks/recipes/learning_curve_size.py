"""The shipped network `learning-curve-size`: curves over training-set sizes.

    bayesdl pretrain --prior benchmarks/recipes/learning_curve_size.py --out learning-curve-size.safetensors

Sizes are 1, sqrt 2, 2, ... in units of the smallest: 36 of them, as in the learning-curve database.
"""

from bayesdl.amortized import Architecture, Schedule
from bayesdl.priors.tasks import LearningCurves

prior = LearningCurves(axis="size", horizon=36)
architecture = Architecture(
    max_inputs=1, head="mixture", outputs=8, width=64, num_layers=4, hidden=128, num_conditions=1
)
schedule = Schedule(
    num_steps=12_000, batch=64, n_min=1, n_max=30, num_queries=12, rows=36, decay="linear", appended_share=0.25,
    noiseless_share=0.25, targets="expected",
)  # fmt: skip
card = {"name": "learning-curve-size", "licence": "Apache-2.0", "inputs": "raw", "targets": "raw"}
