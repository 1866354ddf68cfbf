"""The shipped network `tabular`: classification of small tables, by the structural causal models of TabPFN.

bayesdl pretrain --prior benchmarks/recipes/tabular.py --out bayesdl/amortized/weights/tabular.safetensors
"""

from bayesdl.amortized import Architecture, Schedule
from bayesdl.priors.tasks import Tabular

prior = Tabular()
architecture = Architecture(max_inputs=20, head="classes", outputs=10, width=128, num_layers=4)
schedule = Schedule(
    num_steps=36_000, batch=8, n_min=2, n_max=500, num_queries=48, decay="linear", appended_share=0.0,
    noiseless_share=0.0,
)  # fmt: skip
card = {"name": "tabular", "licence": "Apache-2.0"}
