"""What is on disk, compared with the steered model. Imports no backend."""
