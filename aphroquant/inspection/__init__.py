"""Looking closely at checkpoints: `verify` finds what is wrong in one, `compare` what differs between two."""

from aphroquant.inspection.compare import Comparison, compare
from aphroquant.inspection.findings import Finding, Severity
from aphroquant.inspection.verify import Verification, verify

__all__ = ["Comparison", "Finding", "Severity", "Verification", "compare", "verify"]
