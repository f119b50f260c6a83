"""Files of other tools: steering vectors and LoRA folders."""
