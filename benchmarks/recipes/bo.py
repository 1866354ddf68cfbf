"""The shipped network `bo`: objectives of Bayesian optimisation in one to eight dimensions, by the HEBO+ prior.

bayesdl pretrain --prior benchmarks/recipes/bo.py --out bayesdl/amortized/weights/bo.safetensors
"""

from bayesdl.amortized import Architecture, Schedule
from bayesdl.priors.tasks import HEBOPlus

prior = HEBOPlus(inputs="mixed")
architecture = Architecture(max_inputs=8, head="mixture", outputs=10, width=128, num_layers=4, num_conditions=1)
schedule = Schedule(num_steps=12_000, batch=16, n_max=60, num_queries=32, decay="linear")
card = {"name": "bo", "licence": "Apache-2.0"}
