"""Directions -> a program and a report that says whether to compile it."""
