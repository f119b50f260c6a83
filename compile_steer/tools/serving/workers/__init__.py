"""Scripts that run under an engine's own interpreter, and import nothing of ours."""
