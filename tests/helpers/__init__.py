"""Tiny models, data and runs that the tests share."""
