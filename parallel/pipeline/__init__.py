"""Pipeline parallelism: where to cut the stack, in which order stages work, and what that costs."""
