"""Checkpoints of other systems, read as our logical tensors: `hf`, `mamba_ssm`, `megatron`; `run` makes a run of one.

Each reader gives a `Foreign`: the model's configuration, its tensors as a lazy source, and what is worth knowing.
"""
