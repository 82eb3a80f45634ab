"""Commands that a model card gives: how it was made, and how to run it in the engines that are known to load it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from aphroquant.compatibility import Support
from aphroquant.conversion.rules import ModuleRule

_TITLES = {"aphroquant": "aphroquant", "transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang"}
_LEFT_OUT = ("source", "device")


class Command(NamedTuple):
    """`language` is that of a code block; `note` says what is needed, or how it is known to work."""

    title: str
    language: str
    text: str
    note: str


def convert_command(request: Mapping[str, Any], out: str, defaults: Mapping[str, Any]) -> str:
    """`aphroquant convert ...` with everything that was asked for, but for what is the default anyway."""
    words = ["aphroquant", "convert", str(request.get("source"))]
    for name, value in request.items():
        if name not in _LEFT_OUT and value is not None and value != defaults.get(name):
            words += _option(name, value)
    return shlex.join([*words, "--out", out])


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "symmetric":
        return ["--symmetric" if value else "--asymmetric"]
    if isinstance(value, bool):
        return [flag] if value else []
    if name == "rules":
        return [word for rule in value for word in ("--rule", str(ModuleRule(**rule)))]
    if isinstance(value, list):
        return [word for item in value for word in (flag, str(item))]
    return [flag, str(value)]


def serving_commands(found: list[Support], name: str) -> Iterator[Command]:
    """One command for each engine that loads the model `name`, a directory or a .gguf file."""
    for entry in found:
        language, text = _command(entry, name)
        yield Command(_TITLES.get(entry.engine, entry.engine), language, text, _note(entry))


def _command(entry: Support, name: str) -> tuple[str, str]:
    quoted = shlex.quote(name)
    match entry.engine:
        case "transformers":
            place = f'".", gguf_file={name!r}' if name.endswith(".gguf") else repr(name)
            lines = (
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f"tokenizer = AutoTokenizer.from_pretrained({place})",
                f"model = AutoModelForCausalLM.from_pretrained({place})",
            )
            return "python", "\n".join(lines)
        case "vllm":
            return "bash", f"vllm serve {quoted}"
        case "sglang":
            quantization = " --quantization modelopt_fp8" if entry.format == "modelopt" else ""
            return "bash", f"python -m sglang.launch_server --model-path {quoted}{quantization}"
        case "llama.cpp":
            return "bash", f"llama-server -m {quoted}"
    return "bash", f"aphroquant serve {quoted}"


def _note(entry: Support) -> str:
    needs = f"needs {entry.needs}" if entry.needs else ""
    known = f"by its [documentation]({entry.evidence})" if entry.is_documented else ""
    return "; ".join(filter(None, (needs, known)))
