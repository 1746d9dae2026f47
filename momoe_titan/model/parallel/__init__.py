"""Parallelism of the llama-MoE model.

parallelize.py: applies all that a job asks for. fsdp.py, tensor.py, expert.py, pipeline.py and
activation_checkpoint.py: one kind each. collectives.py and dispatch.py: what the layers call.
"""
