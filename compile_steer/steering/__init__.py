"""Programs and the models that they act on: what is steered, where, and the hooks that do it."""
