"""Figures of an evaluation in an output: in aphroquant.json, in the model card, and the check sums of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aphroquant.checkpoint.disk import replace_file, telling_disk_errors
from aphroquant.checkpoint.writer import json_text
from aphroquant.errors import InputError
from aphroquant.provenance.checksums import sums_text
from aphroquant.provenance.records import CARD, OutputRecord

BEGIN, END = "<!-- aphroquant: measured quality -->", "<!-- aphroquant: end of measured quality -->"
NOT_MEASURED = "Not measured. `aphroquant eval DIR --against BASE --record` measures it and writes the figures here."

_FIGURES = (  # key, label, form, of the base too
    ("mean_kld", "mean KL divergence, nats", "{:.5f}", None),
    ("median_kld", "median", "{:.5f}", None),
    ("p99_kld", "99th percentile", "{:.4f}", None),
    ("max_kld", "largest", "{:.3f}", None),
    ("top1_agreement", "same most likely token", "{:.2%}", None),
    ("perplexity", "perplexity", "{:.4f}", "base_perplexity"),
)
_NOT_RECORDED = ("worst",)  # tokens of the evaluation text in their context: a report's, not the model's


def metrics_section(metrics: Mapping[str, Any] | None) -> str:
    """The card's table of figures and the protocol, between marks by which it is found again."""
    text = NOT_MEASURED if metrics is None else "\n".join([*_rows(metrics), "", _protocol(metrics)])
    return f"{BEGIN}\n{text}\n{END}"


def check_recordable(path: str | Path) -> OutputRecord:
    """The record that figures can be written into. InputError if there is none."""
    record = OutputRecord(Path(path).expanduser())
    if not record.manifest_path.exists():
        raise InputError(
            f"{record.path}: there is no {record.manifest_path.name} to write the figures into",
            hint="figures are recorded with what aphroquant convert has written",
        )
    return record


def record_evaluation(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Put the figures of `Evaluation.to_dict()` into an output's manifest, card and check sums.

    `path` is the directory or the .gguf file. InputError if no conversion has recorded anything of it.
    """
    record = check_recordable(path)
    kept = {key: value for key, value in metrics.items() if key not in _NOT_RECORDED}
    changed = {record.manifest_path: json_text({**record.manifest, "metrics": kept})}
    card = record.directory / CARD
    if record.path.is_dir() and (text := _with_figures(card, metrics)) is not None:
        changed[card] = text
    sums = dict(record.sums)
    for file, content in changed.items():
        if file.name in sums:
            sums[file.name] = hashlib.sha256(content.encode()).hexdigest()
    if record.sums_path.exists():
        changed[record.sums_path] = sums_text(sums)
    with telling_disk_errors(record.path, lambda: 0):
        for file, content in changed.items():
            replace_file(file, content.encode())


def _with_figures(card: Path, metrics: Mapping[str, Any]) -> str | None:
    """The card with these figures; None if there is none, or its owner has taken the section out."""
    text = card.read_bytes().decode("utf-8", errors="replace") if card.is_file() else ""
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        return None
    before, _, rest = text.partition(BEGIN)
    return before + metrics_section(metrics) + rest.partition(END)[2]


def _rows(metrics: Mapping[str, Any]) -> list[str]:
    lines = ["| figure | this model | base |", "|---|---|---|"]
    for key, label, form, base in _FIGURES:
        value = _told(metrics.get(key), form)
        if key == "mean_kld" and isinstance(error := metrics.get("mean_kld_stderr"), float):
            value += f" ± {error:.5f}"
        lines.append(f"| {label} | {value} | {_told(metrics.get(base), form) if base else ''} |")
    parts = metrics.get("texts") or []
    for part in parts if len(parts) > 1 else []:
        value = _told(part.get("mean_kld"), "{:.5f}")
        lines.append(f"| mean KL divergence on {_cell(Path(part['text']['name']).name)} | {value} | |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _told(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "not finite"


def _protocol(metrics: Mapping[str, Any]) -> str:
    """How it was measured, in one sentence."""
    protocol, versions = metrics["protocol"], metrics.get("versions", {})
    texts = ", ".join(f"{Path(text['name']).name} (SHA-256 {text['sha256'][:12]}…)" for text in protocol["texts"])
    drawn = "evenly spaced" if protocol["seed"] is None else f"drawn with seed {protocol['seed']}"
    return (
        f"Measured against {Path(str(metrics['against'])).name} on {protocol['windows']} windows of "
        f"{protocol['window_len']} tokens, {drawn}, of {texts}: {protocol['scored_tokens']} scored tokens, "
        f"teacher-forced, in {protocol['dtype']}, without BOS; ± is one standard error, clustered by window; "
        f"aphroquant {versions.get('aphroquant', '?')}, torch {versions.get('torch', '?')}."
    )
