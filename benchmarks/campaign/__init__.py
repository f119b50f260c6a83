"""What breaks other tools, tried on this one: `python -m benchmarks.campaign`."""
