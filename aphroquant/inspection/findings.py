"""What a check found: how bad, where, what, and what to do about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aphroquant.checkpoint.inspection import layer_ranges, role

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
# error: the model cannot be what its maker meant. warning: it may well be, but hardly. info: worth knowing.


@dataclass(frozen=True)
class Finding:
    """One fact. `subject` is the tensor, module or config key, `file` the name of the file that holds it.

    `check` names the kind of fact, the same in every release: scripts filter by it.
    """

    severity: Severity
    check: str
    subject: str
    message: str
    advice: str = ""
    file: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, otherwise in the order found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def collapsed(findings: Sequence[Finding]) -> list[tuple[Finding, str]]:
    """Findings that say the same of the same role in several layers as one, with its subject and layers in words."""
    groups: dict[tuple[Severity, str, str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        key = finding.severity, finding.check, role(finding.subject), finding.message, finding.advice
        groups[key].append(finding)
    told = []
    for members in groups.values():
        subject = members[0].subject
        if len(members) > 1:
            names = [member.subject for member in members]
            subject = f"{role(subject)} (layers {layer_ranges(names)})" if role(subject) != subject else subject
        told.append((members[0], subject))
    return told
