"""What a plan costs before it runs: memory per rank, step time, and the search for a better one."""
