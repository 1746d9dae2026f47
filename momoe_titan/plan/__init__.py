"""What a job will take before it runs: `python -m momoe_titan.plan --help`, docs/planning.md."""
