"""Which GGUF type each tensor gets: by a type's name for all layers, or by the name of one of llama.cpp's mixes.

A mix gives the sensitive layers more bits: attn_v and ffn_down of the first and the last eighth of the blocks, and of
every third block between them. Whatever the name, the matrix that makes the logits (lm_head, or an embedding that is
tied to it) has at least six bits. Rows that are no whole blocks of a type get llama.cpp's stand-in for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.formats.gguf import ENCODABLE, block_type, type_for_rows
from aphroquant.models.spec import DOWN, EMBEDDING, LM_HEAD, DecoderSpec, V
from aphroquant.schemes import DenseScheme


class Mix(NamedTuple):
    """`base` for most layers, `raised` for the sensitive ones."""

    base: str
    raised: str


MIXES: Mapping[str, Mix] = {"q4_k_m": Mix("Q4_K", "Q6_K"), "q5_k_m": Mix("Q5_K", "Q6_K")}
PURE: Mapping[str, str] = {name.lower(): name for name in ENCODABLE}
DEFAULT = "q4_k_m"
BY_BITS: Mapping[int, str] = {2: "q2_k", 3: "q3_k", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}
_SENSITIVE = (V, DOWN)
_LOGITS = "Q6_K"  # of the matrix that makes them, where the layers have fewer bits
_WIDE = ("F32", "F16", "BF16", "Q8_0", "Q6_K")
_LAYERS_ONLY = ("MXFP4",)  # an embedding in it would lose most


def type_names() -> list[str]:
    """What --scheme takes for gguf."""
    return [*MIXES, *PURE]


def resolve_types(request: ConversionRequest) -> str:
    """The name that a request means. UsageError naming what does not go with GGUF."""
    for option, value in (("--group-size", request.group_size), ("--symmetric", request.symmetric)):
        if value is not None:
            raise UsageError(f"{option} does not go with gguf, whose types fix it", hint=_known())
    for option, steps in (("--refine-steps", request.refine_steps), ("--distill-steps", request.distill_steps)):
        if steps:
            raise UsageError(f"{option} {steps} does not go with gguf, whose encoders are not trained")
    if request.kv_scales:
        raise UsageError("--kv-scales does not go with gguf, which has no place for scales of a KV cache")
    if request.solver is not None:
        raise UsageError(
            f"--solver {request.solver} does not go with gguf, whose encoders search by themselves",
            hint="leave it out; --calibration FILE lets them weigh errors by the inputs of each layer",
        )
    if request.scheme is None:
        if request.whole_bits is None:
            return DEFAULT
        if request.whole_bits not in BY_BITS:
            raise UsageError(f"gguf has types of {_listed(BY_BITS)} bits, not of {request.whole_bits}", hint=_known())
        return BY_BITS[request.whole_bits]
    name = request.scheme.lower()
    if name not in type_names():
        near = difflib.get_close_matches(name, type_names(), n=1)
        raise UsageError(
            f"gguf has no scheme {request.scheme!r}", hint=(f"Did you mean {near[0]!r}? " if near else "") + _known()
        )
    if request.whole_bits is not None and BY_BITS.get(request.whole_bits) != name:
        raise UsageError(
            f"--bits {request.whole_bits} does not go with --scheme {request.scheme}, which fixes the bits"
        )
    return name


def type_of(name: str, module: str, columns: int, spec: DecoderSpec, *, by_rule: bool = False) -> str:
    """The type of one matrix in the mix or type `name`. A type that a rule gives a module is what it gets."""
    return type_for_rows(block_type(wished_type(name, module, spec, by_rule=by_rule)), columns).name


def wished_type(name: str, module: str, spec: DecoderSpec, *, by_rule: bool = False) -> str:
    """The same if rows of any length were whole blocks of it."""
    if by_rule and name in PURE:
        return PURE[name]
    base, raised = MIXES.get(name) or Mix(PURE[name], PURE[name])
    makes_logits = module == LM_HEAD or (module == EMBEDDING and spec.tie_word_embeddings)
    if base not in _WIDE and (makes_logits or (module == EMBEDDING and base in _LAYERS_ONLY)):
        return _LOGITS
    return raised if _is_sensitive(module, spec.num_layers) else base


def label(types: Mapping[str, str], name: str | None) -> str:
    """What a file of these types (module -> type) is called: the mix's name, or the commonest type."""
    if name is not None:
        return name.upper()
    kinds = list(types.values())
    return max(dict.fromkeys(kinds), key=kinds.count) if kinds else "F32"


def is_dense(type_name: str) -> bool:
    return isinstance(block_type(type_name).scheme, DenseScheme)


def _is_sensitive(module: str, num_layers: int) -> bool:
    if not module.endswith(_SENSITIVE):
        return False
    layer, eighth = int(module.split(".")[2]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _known() -> str:
    return f"--scheme takes {', '.join(type_names())}"


def _listed(bits: Mapping[int, str]) -> str:
    *first, last = map(str, bits)
    return f"{', '.join(first)} or {last}"
