"""Compose: what several programs do at once, and whether their adapters, at once, do the same.

A judge: it loads what is on disk through stock PEFT and imports no backend.
"""

from compile_steer.compose.findings import Composition
from compile_steer.compose.stage import JOINT, LOADED, STACKED, Member, measure, summed

__all__ = ["JOINT", "LOADED", "STACKED", "Composition", "Member", "measure", "summed"]
