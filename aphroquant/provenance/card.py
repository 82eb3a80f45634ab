"""The model card: README.md with Hub metadata, what the model is, what it lost, how it was made and how to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.compatibility import support
from aphroquant.provenance.base_card import BaseCard, Value, read_base_card
from aphroquant.provenance.commands import convert_command, serving_commands
from aphroquant.provenance.metrics import metrics_section

MAKER = "aphroquant"
_HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_BITS = re.compile(r"int(\d)\b|Q(\d)_|IQ(\d)_|\b(?:nf|fp|mxfp|nvfp)([48])\b", re.IGNORECASE)


def model_card(manifest: Mapping[str, Any], checkpoint: Checkpoint, name: str, *, quantized_by: str = MAKER) -> str:
    """The card of a conversion that `manifest` tells of, from the source `checkpoint`, into a directory or .gguf file
    called `name`."""
    base = read_base_card(checkpoint)
    data = _metadata(manifest, checkpoint, base, quantized_by)
    sections = [
        f"# {name.removesuffix('.gguf')}",
        _introduction(manifest, data),
        f"## Quality\n\n{metrics_section(manifest.get('metrics'))}",
        _making(manifest, name),
        _serving(manifest, name),
        *([f"## Card of the base model\n\n{base.text}"] if base.text else []),
    ]
    return f"---\n{_yaml(data)}---\n\n" + "\n\n".join(sections) + "\n"


def _base_model(manifest: Mapping[str, Any], checkpoint: Checkpoint, base: BaseCard) -> str | None:
    """The Hub id of the source: known of one from the Hub, of a local copy whose config names it, and of GGUF files
    that do so."""
    source = manifest["source"].get("repository") or base.origin or checkpoint.config.get("_name_or_path")
    known = isinstance(source, str) and _HUB_ID.fullmatch(source) and not Path(source).exists()
    return source if known and isinstance(source, str) else None


def _metadata(
    manifest: Mapping[str, Any], checkpoint: Checkpoint, base: BaseCard, quantized_by: str
) -> dict[str, Value]:
    is_gguf = manifest["result"]["to"] == "gguf"
    inherited = dict(base.metadata)
    tags = inherited.pop("tags", [])
    inherited.setdefault("library_name", "transformers")
    if is_gguf:
        inherited["library_name"] = "gguf"
    inherited.setdefault("pipeline_tag", "text-generation")
    base_model = _base_model(manifest, checkpoint, base)
    of_base: dict[str, Value] = {} if base_model is None else {"base_model": base_model}
    return {
        **of_base,
        "base_model_relation": "quantized",
        "quantized_by": quantized_by,
        **inherited,
        "tags": list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *_own_tags(manifest)])),
    }


def _own_tags(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from (MAKER, "quantized", manifest["result"]["to"])
    bits = {next(filter(None, match.groups())) for match in _BITS.finditer(manifest["result"]["scheme"])}
    yield from (f"{number}-bit" for number in sorted(bits))


def _yaml(data: Mapping[str, Value]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return text


def _introduction(manifest: Mapping[str, Any], data: Mapping[str, Value]) -> str:
    result, base_model = manifest["result"], data.get("base_model")
    source = f"[{base_model}]({_HUB}/{base_model})" if base_model else f"`{_last(str(result['source']))}`"
    if base_model and (revision := manifest["source"].get("revision")):
        source += f" at `{revision[:12]}`"
    share = f", {result['num_bytes'] / result['source_bytes']:.1%} of its source's" if result["source_bytes"] else ""
    told = {
        "base model": source,
        "format": f"{result['to']}, {result['scheme']}",
        "size": f"{result['num_bytes'] / 1e6:,.1f} MB of tensors{share}",
        "quantized": f"{result['num_modules']} layers, {result['bits_per_weight']:.3f} bits a weight, scales included",
        "numbers": result["outcome"],
        "licence": _licence(data),
    }
    rows = "\n".join(f"| {label} | {_cell(value)} |" for label, value in told.items())
    return f"Quantized with aphroquant {manifest['aphroquant']}.\n\n| | |\n|---|---|\n{rows}"


def _licence(data: Mapping[str, Value]) -> str:
    found = data.get("license_name") or data.get("license")
    if not found:
        return "that of the base model, which names none"
    name = ", ".join(found) if isinstance(found, list) else found
    link = data.get("license_link")
    return f"that of the base model: {name}" + (f" ({link})" if isinstance(link, str) else "")


def _making(manifest: Mapping[str, Any], name: str) -> str:
    from aphroquant.conversion.manifest import request_arguments
    from aphroquant.conversion.request import ConversionRequest

    request = {**manifest["request"], "source": _last(str(manifest["request"]["source"]))}
    defaults = request_arguments(ConversionRequest(source="", to="", out=Path()))
    lines = ["## How it was made", "", "```bash", convert_command(request, name, defaults), "```", ""]
    if data := manifest.get("calibration"):
        count, length = data["windows"]
        texts = ", ".join(_last(source["name"]) for source in data["sources"])
        lines += [f"Calibrated on {count} windows of {length} tokens, seed {request['seed']}, of {texts}.", ""]
    sidecar = f"{name}.aphroquant.json" if name.endswith(".gguf") else "aphroquant.json"
    place = name if name.endswith(".gguf") else "."
    lines += [
        f"`{sidecar}` records versions, settings, hardware, and the hashes of everything read and written.",
        f"`aphroquant verify {place}` checks the files, `aphroquant reproduce {place}` makes them again and compares.",
    ]
    return "\n".join(lines)


def _serving(manifest: Mapping[str, Any], name: str) -> str:
    result = manifest["result"]
    lines = ["## How to run it"]
    for command in serving_commands(support(result["to"], schemes_in(result["scheme"])), name):
        note = f" ({command.note})" if command.note else ""
        lines += ["", f"{command.title}{note}:", "", f"```{command.language}", command.text, "```"]
    return "\n".join(lines)


def schemes_in(text: str) -> list[str]:
    """The schemes that a result tells of: "int4 sym g64 (209), int8 sym g64 (1)" are two."""
    return [re.sub(r" \(\d+\)$", "", part) for part in text.split(", ")]


def _last(path: str) -> str:
    """A path without what only its owner knows of; a Hub id as it is."""
    if path.startswith("default: ") or (_HUB_ID.fullmatch(path) and not Path(path).exists()):
        return path
    return Path(path).name or path


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
