"""Export: a WeightPatch -> files that stock libraries load, each with its chain of origin."""

from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.export.merged import write_merged
from compile_steer.export.provenance import PROVENANCE, Provenance

__all__ = ["PROVENANCE", "Provenance", "read_patch", "write_merged", "write_patch"]
