"""Scripts that are run by an engine's own interpreter, never imported here; they know numpy and their engine alone."""
