"""Verify: is what is on disk the steered model? Reads artifacts as a user's stack would; imports no backend."""

from compile_steer.verify.parity import Parity
from compile_steer.verify.reference import Reference
from compile_steer.verify.stage import require_same_origin, verify_artifact

__all__ = ["Parity", "Reference", "require_same_origin", "verify_artifact"]
