"""Audit: what a checkpoint or adapter changed against its base, read off the files; no model is run."""

from compile_steer.audit.baked import Baked
from compile_steer.audit.settings import SettingsChange
from compile_steer.audit.stage import THRESHOLD, Audit, audit
from compile_steer.audit.tensors import TensorChange

__all__ = ["THRESHOLD", "Audit", "Baked", "SettingsChange", "TensorChange", "audit"]
