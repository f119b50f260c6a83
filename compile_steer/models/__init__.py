"""Load a model, tokenise, run, generate, and read log-probabilities."""
