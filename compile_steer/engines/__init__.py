"""Serving engines: what each of them loads, and what it then computes, run in an environment of its own."""
