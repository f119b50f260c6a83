"""Weight patch -> adapter, merged checkpoint, GGUF file."""
