"""For experimental.custom_import: the flavor "tiny" of momoe_llama, which checkpoints in no time."""

import momoe_titan.register  # noqa: F401
from momoe_titan.model import flavors
from tests.support.tiny import tiny_args

# 6 experts: 2 ranks can share them. One MoE layer: most of a short job's time goes into the tensors of its checkpoints
flavors["tiny"] = tiny_args(vocab_size=2048, n_layers=2, moe={"num_experts": 6})
