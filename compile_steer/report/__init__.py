"""What was measured: in the terminal, as a page, as a model card."""
