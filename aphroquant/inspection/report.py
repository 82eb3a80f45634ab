"""A verification or a comparison in words and rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from aphroquant.checkpoint.inspection import layer_ranges, role
from aphroquant.inspection.compare import Comparison
from aphroquant.inspection.findings import SEVERITIES, collapsed
from aphroquant.inspection.verify import Verification
from aphroquant.inspection.weights import Difference

FINDING_HEADINGS = ("severity", "where", "what", "what to do", "file")
DIFFERENCE_HEADINGS = ("module or tensor", "layers", "A", "B", "different", "relative error", "largest", "SQNR dB")
CHANGE_HEADINGS = ("kind", "what", "A", "B", "changes the function")
Rows = list[tuple[str, ...]]
_NOUNS = {"error": "errors", "warning": "warnings", "info": "infos"}


def finding_rows(found: Verification) -> Rows:
    """One row a finding, the same one of several layers in one."""
    return [
        (finding.severity, subject, finding.message, finding.advice, finding.file)
        for finding, subject in collapsed(found.findings)
    ]


def verification_line(found: Verification) -> str:
    """What was checked, and what came of it."""
    checked = f"checked {found.num_modules} modules, {found.num_tensors} tensors, {found.num_bytes / 1e6:.2f} MB"
    return f"{checked}: {counts(found)}"


def counts(found: Verification) -> str:
    """ "2 errors, 1 warning", or "nothing wrong"."""
    told = []
    for severity in SEVERITIES:
        number = found.count(severity)
        if number:
            told.append(f"{number} {severity if number == 1 else _NOUNS[severity]}")
    return ", ".join(told) or "nothing wrong"


def difference_rows(found: Comparison) -> Rows:
    """The modules and tensors that differ, by role: counts, and the worst of each role."""
    groups: dict[tuple[str, str, str], list[Difference]] = defaultdict(list)
    for entry in (*found.different_modules, *found.different_tensors):
        groups[role(entry.name), entry.scheme, entry.other_scheme].append(entry)
    rows: Rows = []
    for (name, ours, theirs), members in groups.items():
        worst = max(members, key=lambda entry: math.inf if entry.relative_error is None else entry.relative_error)
        share = sum(entry.num_different for entry in members) / sum(entry.count for entry in members)
        layers = layer_ranges(entry.name for entry in members)
        rows.append(
            (name, layers, ours, theirs, f"{share:.2%}", *_errors(worst)),
        )
    return rows


def change_rows(found: Comparison) -> Rows:
    """Everything but numbers that differs; the same change of several layers once."""
    rows: dict[tuple[str, ...], None] = {}
    for kind, name, ours, theirs, matters in found.changes:
        rows[kind, role(name), ours, theirs, "yes" if matters else "no"] = None
    return list(rows)


def comparison_lines(found: Comparison) -> list[str]:
    """The verdict and what stands behind it, one fact a line."""
    lines = [f"A  {found.ours} ({found.formats[0]})", f"B  {found.theirs} ({found.formats[1]})", ""]
    for label, names in (("only in A", found.only_ours), ("only in B", found.only_theirs)):
        if names:
            lines.append(f"{label}: {_listed(names)}")
    lines += [f"{name} has the shape {text}" for name, text in found.shapes]
    return [*lines, verdict(found), *_notes(found)]


def verdict(found: Comparison) -> str:
    """The comparison in one line."""
    if found.verdict == "same bytes":
        return "same bytes: every file of the model is the same"
    total = len(found.modules)
    if found.verdict == "same function":
        exact = all(entry.same_bits for entry in (*found.modules, *found.tensors))
        how = "to the same bits" if exact else "to the same numbers (zeros differ in sign)"
        return f"same function: all {total} modules dequantize {how}"
    parts = []
    worst = found.worst
    if worst is not None:
        error, _, sqnr = _errors(worst)
        told = f"worst {worst.name}: relative error {error}" + (f", SQNR {sqnr} dB" if sqnr else "")
        parts.append(f"in {len(found.different_modules)} of {total} modules, {told}")
    if found.different_tensors:
        parts.append(f"in {len(found.different_tensors)} of {len(found.tensors)} other tensors")
    missing = len(found.only_ours) + len(found.only_theirs)
    if missing:
        parts.append(f"in {_tensors(missing)} that only one of them has")
    if found.shapes:
        parts.append(f"in the shape of {_tensors(len(found.shapes))}")
    what = sorted({change.kind for change in found.changes if change.changes_function})
    if what:
        parts.append(f"in {' and '.join(what)}")
    return f"different: {'; '.join(parts)}"


def _notes(found: Comparison) -> list[str]:
    notes = []
    same = found.modules and not found.different_modules and not found.different_tensors
    if found.verdict == "different" and same:
        notes.append(f"all {len(found.modules)} modules that both have dequantize to the same numbers")
    if found.norms_differ and found.different_modules:
        notes.append(
            "norms differ too: AWQ and SmoothQuant scale channels there and undo it in the weights behind, so that "
            "weights may differ while the function hardly does; --logits measures the function"
        )
    return notes


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _errors(entry: Difference) -> tuple[str, str, str]:
    error, sqnr = entry.relative_error, entry.sqnr_db
    if error is None:
        return "not finite", f"{entry.largest_error:.3g}", ""
    return f"{error:.3e}", f"{entry.largest_error:.3g}", "" if sqnr is None else f"{sqnr:.1f}"


def _listed(names: Sequence[str]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[role(name)].append(name)
    told = [
        members[0] if len(members) == 1 else f"{name} (layers {layer_ranges(members)})"
        for name, members in groups.items()
    ]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")
