"""Mixture-of-Experts layers that need torch alone, and the core that TorchTitan's layers share with them.

router.py: scores and choice of experts. balancing.py: how the experts' biases move. expert_stats.py:
tokens per expert and the router's entropy. float32_buffers.py: buffers that no cast changes.
layers.py: `MoMoE`, `TopKRouter` and `MoE`. arguments.py: checks of what users pass to them.
"""
