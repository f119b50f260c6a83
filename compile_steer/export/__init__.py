"""Export: a WeightPatch -> files that stock libraries load, each with its chain of origin."""

from compile_steer.export.adapter import (
    CURVES,
    PATCH_FILE,
    is_adapter,
    kept_patch,
    read_patch,
    write_lora,
    write_patch,
)
from compile_steer.export.gguf_lora import write_lora_gguf
from compile_steer.export.gguf_model import GGUF_FILE, GGUF_KINDS, gguf_refusals, write_gguf, write_gguf_file
from compile_steer.export.merged import is_merged, write_merged
from compile_steer.interop.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CURVES",
    "GGUF_FILE",
    "GGUF_KINDS",
    "PATCH_FILE",
    "gguf_refusals",
    "is_adapter",
    "is_merged",
    "kept_patch",
    "read_patch",
    "write_gguf",
    "write_gguf_file",
    "write_lora",
    "write_lora_gguf",
    "write_merged",
    "write_patch",
]
