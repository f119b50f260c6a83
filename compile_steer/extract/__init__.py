"""Extract: training data -> candidate directions, one a block, and their shuffled-label controls."""

from compile_steer.extract.stage import extract, source

__all__ = ["extract", "source"]
