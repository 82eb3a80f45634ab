"""Damage to JSON documents: values of other types, keys gone, doubled or deep, hostile patterns and templates."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

from fuzzing.directories import Entry

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 128, 1000, 2**16, 2**31 - 1, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 0.0, -0.5, 0.5, 1.5, 1e-30, 1e30, 1e308, math.nan, math.inf,
    -math.inf, "", "a", "4", "true", "nan", "../x", "/etc/passwd", "\x00", "\x1b[31mred", "\ud800", "é" * 50,
    "x" * 5000,
    [], [0], [1, 2], [[]], [None], ["a"], [-1, 2**40], [128, 128], {}, {"a": 1}, {"": None}, {"bits": 4}, [{}],
    "group", "channel", "tensor", "block", "float", "int", "gemm", "gemv", "gptq_v2", "marlin", "torch.float16",
    "linear", "yarn", "llama3", "dynamic", "longrope", "qwen3", "mistral", "qwen2", "deepseek_v3", "re:.*", "Linear",
]  # fmt: skip
# Each matches in exponential or high polynomial time, or is costly even to compile.
PATTERNS = (
    r"(a+)+$", r"(.*)*x$", r"(.*.*)*!", r"([a-z.0-9_]+)+$!", r"^(.|..|...)*Z$", r"(?:.*){30}Z", r"(\w+\.?)*!",
    r"(((((.*)*)*)*)*)*!", r"(?:(?:(?:.{0,50}){0,50}){0,50}){0,50}Z", r"(.{1,999}){1,999}Z", r"(x{0,9999}){0,9999}",
    r"(?=(.*)*Z)", r"(?P<a>.*)(?P=a)(?P=a)Z", r"(.*?)*Z|(.+)+Y", "(" * 500, "(" * 90 + ".*" + ")*" * 90, "[" * 50,
    r".*" * 25 + "Z", r"(?:a?){64}a{64}" , "a" * 100_000, r"(?:\w|\d|[a-z]|.)*\d\d\d\d\d!", r"(?i:(m|M|mo)+)*Q",
    r"\p{L}+", r"(?<=a+)b", r"(?R)", r"(?(1)a|b)", r"[[a-z]--[m]]", "\\", "(?", "*", "(?s:.)*+Z", "{e<=9}", "(?:x){e}",
)  # fmt: skip
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'x' * 10000000000 }}", "{{ ''.__class__.__mro__ }}", "{{ 9 ** 99999999 }}", "{% if",
    "{{ raise_exception('no') }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{{ '%1000000000d' | format(1) }}",
    "{{ messages | center(10000000000) }}", "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__ }}",
)  # fmt: skip


def damage_config(entries: dict[str, Entry], random: Random) -> str:
    names = [name for name in sorted(entries) if name.endswith("config.json") and "token" not in name]
    name = random.choices(names, [9 if name == "config.json" else 4 for name in names])[0]
    _damage_json(entries, name, random)
    return "config"


def damage_tokenizer(entries: dict[str, Entry], random: Random) -> str:
    name = random.choice([name for name in ("tokenizer.json", "tokenizer_config.json") if name in entries])
    if random.random() < 0.3:
        document = _document(entries, "tokenizer_config.json")
        match random.randrange(4):
            case 0:
                document["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
                document["tokenizer_class"] = "Evil"
                entries["tokenization_evil.py"] = b"open('code-was-run', 'w')\nclass Evil: pass\n"
            case 1:
                document["trust_remote_code"] = True
                document["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
                entries["tokenization_evil.py"] = b"open('code-was-run', 'w')\nclass Evil: pass\n"
            case _:
                document["chat_template"] = random.choice(TEMPLATES)
                entries.pop("chat_template.jinja", None)
        _store(entries, "tokenizer_config.json", document)
        return "tokenizer"
    _damage_json(entries, name, random)
    return "tokenizer"


def damage_patterns(entries: dict[str, Entry], random: Random) -> str:
    """Regular expressions wherever a format takes them."""
    document = _document(entries, "config.json")
    quantization = document["quantization_config"]
    patterns = random.sample(PATTERNS, 2)
    match quantization["quant_method"]:
        case "gptq":
            quantization["dynamic"] = {random.choice(["", "+:", "-:"]) + pattern: {} for pattern in patterns}
        case "auto-round":
            quantization["extra_config"] = {pattern: {"bits": 4} for pattern in patterns}
        case "compressed-tensors":
            chosen = [f"re:{pattern}" for pattern in patterns]
            if random.random() < 0.5:
                quantization["ignore"] = chosen
            else:
                group = quantization["config_groups"]["group_0"]
                group["targets"] = chosen + group["targets"]
        case _:
            for key in ("modules_to_not_convert", "ignore", "ignored_layers", "skip_modules", "exclude_modules"):
                quantization[key] = list(patterns)
    _store(entries, "config.json", document)
    return "patterns"


def damage_index(entries: dict[str, Entry], random: Random) -> str:
    name = "model.safetensors.index.json"
    if name not in entries:
        entries[name] = json.dumps({"weight_map": {"a": "model.safetensors"}}).encode()
        if random.random() < 0.5:
            entries["model-00001-of-00001.safetensors"] = entries.pop("model.safetensors")
    document = _document(entries, name)
    mapping = document["weight_map"]
    key = random.choice(sorted(mapping))
    match random.randrange(6):
        case 0:
            mapping[key] = random.choice(
                ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", "", "."]
            )
        case 1:
            mapping[key] = random.choice(JUNK)
        case 2:
            mapping[key] = random.choice(sorted(mapping.values(), key=str))
        case 3:
            del mapping[key]
        case 4:
            mapping[random.choice(["new", "", "\x1b[2J", "a" * 9999])] = mapping[key]
        case _:
            document["weight_map"] = random.choice(JUNK)
    _store(entries, name, document)
    return "index"


def changed_document(document: Any, random: Random) -> Any:
    """The document with one place changed."""
    places = _places(document)
    if not places:
        return random.choice(JUNK)
    container, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[random.choice(["", "x", "\x1b[2J", str(key).upper()])] = container.pop(key)
        case 2:
            container[key] = [container[key]]
        case 3:
            container[key] = _near(container[key], random)
        case _:
            container[key] = random.choice(JUNK)
    return document


def _near(value: Any, random: Random) -> Any:
    """A value like the old one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)])
    if isinstance(value, float):
        whole = int(value) if math.isfinite(value) else 0
        return random.choice([value * 2, -value, whole, str(value)])
    if isinstance(value, str):
        return random.choice([value.upper(), value + "x", value[:-1], value + "\0", [value]])
    if isinstance(value, list):
        return random.choice([value * 2, value[:-1], value[::-1], tuple(value)])
    return [value, value]


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in the document, those near the top several times."""
    found: list[tuple[Any, Any]] = []
    waiting = [(document, 0)]
    while waiting and len(found) < 5000:
        container, depth = waiting.pop(0)
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs)[:200]:
            found += [(container, key)] * max(1, 4 - depth)
            if isinstance(value, dict | list):
                waiting.append((value, depth + 1))
    return found


def _damage_json(entries: dict[str, Entry], name: str, random: Random) -> None:
    if random.random() < 0.1:
        entries[name] = _hostile_text(entries[name], random)
        return
    _store(entries, name, changed_document(_document(entries, name), random))


def _hostile_text(content: Entry, random: Random) -> bytes:
    if not isinstance(content, bytes):
        raise ValueError("no file any more")
    depth = random.choice([100, 10_000, 1_000_000])
    return random.choice(
        [
            b"[" * depth,
            b'{"a":' * depth,
            b"1" * 10_000,
            b'{"hidden_size": ' + b"9" * 10_000 + b"}",
            content.replace(b"{", b'{"model_type": "llama", ', 1),
            content.replace(b"{", b'{"quantization_config": null, ', 1),
            b"\xef\xbb\xbf" + content,
            content.decode("utf-8", "replace").encode("utf-16"),
            b"\xff\xfe" + content,
            content + content,
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"NaN",
        ]
    )


def _document(entries: dict[str, Entry], name: str) -> Any:
    content = entries[name]
    if not isinstance(content, bytes):
        raise ValueError(f"{name} is no file any more")
    return json.loads(content)


def _store(entries: dict[str, Entry], name: str, document: Any) -> None:
    entries[name] = json.dumps(document).encode("utf-8", "surrogatepass")
