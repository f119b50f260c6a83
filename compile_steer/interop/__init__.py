"""Interop: steering vectors in the formats of other tools, read in and written out."""

from compile_steer.interop.foreign import Foreign, Given, LayerConvention
from compile_steer.interop.formats import Format, read
from compile_steer.interop.outward import shifts, write_gguf, write_svec, write_vllm_lens

__all__ = [
    "Foreign",
    "Format",
    "Given",
    "LayerConvention",
    "read",
    "shifts",
    "write_gguf",
    "write_svec",
    "write_vllm_lens",
]
