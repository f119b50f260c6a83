"""What is slower than a test: the targets, measured. `make bench` writes docs/BENCHMARKS.md."""
