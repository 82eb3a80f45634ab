"""Which instructions a cubin holds, read from its bytes: a kernel can be checked without a disassembler.

Since Volta an instruction has 16 bytes, its operation in the lowest 9 bits and the width of a memory access in bits 73
to 75. The numbers below were read off NVIDIA's own disassembly (CUDA 13.0) for sm_80, sm_89 and sm_90a.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

_OPERATIONS = {
    0x03C: "HMMA",
    0x037: "IMMA",
    0x07A: "QMMA",
    0x1F0: "HGMMA",
    0x1F3: "QGMMA",
    0x181: "LDG",
    0x186: "STG",
    0x184: "LDS",
    0x188: "STS",
    0x183: "LDL",
    0x187: "STL",
    0x1AE: "LDGSTS",
    0x03B: "LDSM",
    0x1BA: "UBLKCP",
    0x1B4: "UTMALDG",
    0x18E: "RED",
    0x1A6: "REDG",
    0x02E: "ACQBULK",
    0x02D: "PREEXIT",
}
_WIDE = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS"}
_WIDTHS = {0: 8, 1: 8, 2: 16, 3: 16, 4: 32, 5: 64, 6: 128}
NAMES = frozenset(_OPERATIONS.values()) | {f"{name}.{width}" for name in _WIDE for width in set(_WIDTHS.values())}


def count_instructions(cubin: bytes, entry: str) -> Counter[str]:
    """How often each known operation occurs in a kernel; memory accesses also by width: "LDG" and "LDG.128".

    HMMA, IMMA, QMMA (fp8): mma.sync. HGMMA, QGMMA: wgmma. LDG, STG: global memory; LDS, STS: shared; LDL, STL: local
    (spills, indexed register arrays). LDGSTS: cp.async. LDSM: ldmatrix. UBLKCP, UTMALDG: cp.async.bulk, .tensor.
    RED, REDG: atomic additions. ACQBULK: griddepcontrol.wait. PREEXIT: griddepcontrol.launch_dependents.
    """
    counts: Counter[str] = Counter()
    code = dict(_sections(cubin))[f".text.{entry}"]
    for low, high in struct.iter_unpack("<QQ", code):
        name = _OPERATIONS.get(low & 0x1FF)
        if name is None:
            continue
        counts[name] += 1
        width = _WIDTHS.get(high >> 9 & 7)
        if name in _WIDE and width is not None:
            counts[f"{name}.{width}"] += 1
    return counts


def entries(cubin: bytes) -> list[str]:
    """The functions that the cubin holds."""
    return [name.removeprefix(".text.") for name, _ in _sections(cubin) if name.startswith(".text.")]


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each section of a 64-bit little-endian ELF file."""
    assert elf[:6] == b"\x7fELF\x02\x01", "a cubin is an ELF file"
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, length in headers:
        start = names + name
        data = b"" if kind == 8 else elf[offset : offset + length]  # 8: no bits in the file
        yield elf[start : elf.index(b"\0", start)].decode(), data
