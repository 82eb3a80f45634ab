"""Recipes as text: one that means what the flags of `convert` mean, and shipped ones with another source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from aphroquant.calibration.effort import find_effort
from aphroquant.conversion.request import ConversionRequest
from aphroquant.recipes.models import Recipe

HEADER = "# Paths are relative to this file's directory. aphroquant pipeline run FILE\n"


def recipe_text(request: ConversionRequest, threads: int | None = None) -> str:
    """A recipe of one output that is what the request is, byte for byte."""
    return HEADER + dumped(recipe_data(request, threads))


def recipe_data(request: ConversionRequest, threads: int | None = None) -> dict[str, Any]:
    """The same as plain values, without what is the default anyway."""
    name = request.out.name.removesuffix(".gguf") or "model"
    recipe = {
        "version": 1,
        "source": request.source,
        "device": request.device,
        "threads": threads,
        "requantize": request.requantize,
        "rotate": request.rotate,
        "calibration": _calibration(request),
        "outputs": {
            "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in name).strip("-_")
            or "model": _output(request)
        },
        "evaluation": None,
    }
    return {key: value for key, value in recipe.items() if key in ("version", "evaluation") or _is_set(key, value)}


def dumped(data: Any) -> str:
    """YAML in the order of the keys."""
    text: str = yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False, allow_unicode=True, width=120)
    return text


def with_source(text: str, source: str) -> str:
    """A recipe's text, its comments too, with this source in place of its own, or in front of its first key."""
    line = f"source: {json.dumps(source, ensure_ascii=False)}\n"
    lines = [each for each in text.splitlines(keepends=True) if not each.startswith("source:")]
    place = next((i for i, each in enumerate(lines) if each.strip() and not each.startswith("#")), len(lines))
    return "".join([*lines[:place], line, *lines[place:]])


def _calibration(request: ConversionRequest) -> dict[str, Any]:
    weights = request.weights or [None] * len(request.calibration)
    sources = [
        {"path": str(path)} | ({} if weight is None else {"weight": weight})
        for path, weight in zip(request.calibration, weights, strict=True)
    ]
    default = find_effort(request.effort).samples
    settings = {
        "sources": sources,
        "samples": None if request.samples == default else request.samples,
        "seq_len": request.seq_len,
        "seed": request.seed,
        "packing": request.packing,
        "chat_template": None if request.chat_template is None else str(request.chat_template),
    }
    defaults: dict[str, Any] = {"seq_len": 512, "seed": 0, "packing": "stream"}
    return {key: value for key, value in settings.items() if value not in (None, [], defaults.get(key))}


def _output(request: ConversionRequest) -> dict[str, Any]:
    names = ("scheme", "bits", "size", "group_size", "symmetric", "solver", "effort", "refine_steps", "distill_steps")
    settings = {name: getattr(request, name) for name in names}
    found = {
        key: value for key, value in settings.items() if value is not None and (key, value) != ("effort", "normal")
    }
    if request.ignore:
        found["ignore"] = list(request.ignore)
    if request.rules:
        found["rules"] = [_rule(rule.to_dict()) for rule in request.rules]
    found |= {name: True for name in ("kv_scales", "overwrite") if getattr(request, name)}
    return {"to": request.to, "out": str(request.out), **found}


def _rule(settings: dict[str, Any]) -> dict[str, Any]:
    return {"modules": settings.pop("match"), **settings}


def _is_set(key: str, value: Any) -> bool:
    default = Recipe.model_fields[key].default
    return value is not None and value != {} and value != default


def schema_text() -> str:
    """The JSON schema of recipes, as schema.json has it."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "aphroquant recipe"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


SCHEMA = Path(__file__).with_name("schema.json")
