"""What a job will take before it runs: `python -m momoe_titan.plan --help`, docs/memory_planning.md."""
