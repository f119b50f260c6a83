"""Serving engines: what they load, and what they compute of it."""
