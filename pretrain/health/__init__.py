"""Guards of a run: hangs, NaN, spikes, slow ranks, replicas that drift apart, exhausted memory. See docs/health.md."""
