"""Integer weights as the CUDA kernels read them: one layout for decode, batch and prefill.

The kernels compute Y^T = W X^T, so the weight is the A operand of `mma.sync.m16n8k16`, and of `wgmma.m64nNk16` with A
in registers: lane l of a warp holds rows l/4 and l/4 + 8 and columns 2 (l%4) + {0, 1} and + 8 of a 16 x 16 tile. Rows
(output features) are padded to 64 and columns to 128. The codes are stored

    [super rows of 64][chunks of 64 columns][4 tiles of 16 rows][planes][32 lanes][a lane's 32 codes of 4 k16-steps]

so that a chunk of a super row is contiguous, and so is a whole super row. In one k16-step a lane has 8 codes, two for
each fragment register r = 0..3 (r & 1: row + 8; r >> 1: columns + 8); e = 0, 1 is the even or odd column. Bits of a
lane:

    4 bits  16 bytes, word s = step s:                              code (r, e) at bit 4 r + 16 e
    2 bits  8 bytes, word v = steps 2v, 2v + 1, p = 4 (s % 2) + r:  code (p, e) at bit 2 p + 16 e
    8 bits  two planes of 16 bytes, plane s / 2, word 2 (s % 2) + r / 2: code (r, e) at byte (r % 2) + 2 e
    3 bits  a plane with the low two bits as for 2 bits, then a plane of 4 bytes, with the high bit at 2 p + v + 16 e
    5 bits  a plane with the low four bits as for 4 bits, then one with the high bit as for 3 bits
    6 bits  a plane with the low four bits as for 4 bits, then one with the high two bits as for 2 bits

Both halves of a word thereby hold the two codes of one register at the same place: a shift, a mask and an OR with the
exponent of 128 (bf16) or 1024 (fp16) make two numbers at once.

Scales, zero points (uint8) and offsets are stored [super rows][groups][64], where row 16 t + 8 h + i of the 64 stands
at 8 i + 2 t + h: the eight values that a lane needs for its four tiles are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.integer.columns import arrange_columns
from aphroquant.kernels.cuda.lookup.tables import TABLE_BYTES, table_factor
from aphroquant.schemes import IntegerScheme, QuantizedWeight
from aphroquant.schemes.lookup import TableName

ROWS = 64  # of a super row
CHUNK = 64  # columns of a chunk
COLUMNS = 128  # columns are padded to a multiple of this
TILES = 4  # of 16 rows in a super row
LANES = 32

# Bytes of a lane in each plane of a chunk's tile, by the bits of a stored code.
PLANE_BYTES = {2: (8,), 3: (8, 4), 4: (16,), 5: (16, 4), 6: (16, 8), 8: (16, 16)}
_SLAB_CODES = 1 << 26  # codes that are re-laid at once, which bounds the memory that packing takes


@dataclass(frozen=True)
class PackedInteger:
    """An integer weight in the kernels' layout. Without zeros or offsets, the zero point is 2**(bits - 1)."""

    bits: int  # of a stored code: 2, 3, 4, 5, 6 or 8
    out_features: int
    in_features: int
    group_size: int  # packed columns that share a scale: 16, 32, 64, a multiple of 128, or all of them
    codes: Tensor  # uint8 [super rows, chunks, bytes of a chunk]
    scales: Tensor  # float16, bfloat16 or float32 [super rows, groups, 64]
    zeros: Tensor | None = None  # uint8 [super rows, groups, 64]
    offsets: Tensor | None = None  # as scales: W = codes * scales + offsets
    columns: Tensor | None = None  # int32 [padded columns]: the input of each packed column, -1 for none
    supers: Tensor | None = None  # float16 [super rows, columns / 256, 1 or 2, 64]: of scales, of offsets
    table: TableName | None = None  # what codes stand for, if not for themselves
    factor: float = 1.0  # of the whole weight

    @property
    def padded_columns(self) -> int:
        return self.codes.shape[1] * CHUNK

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def static_bytes(self) -> int:
        """Of shared memory, that kernels use beside what a launch asks for."""
        return 0 if self.table is None else TABLE_BYTES

    def output_factor(self, dtype: torch.dtype) -> float:
        """What the sums of kernels for inputs of `dtype` are multiplied with."""
        return self.factor if self.table is None else self.factor / table_factor(self.table, dtype)

    @property
    def num_bytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.offsets, self.columns, self.supers)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def pack(weight: QuantizedWeight, device: torch.device | str | None = None) -> PackedInteger:
    """The weight of an integer scheme, on `device`."""
    scheme = weight.scheme
    if not isinstance(scheme, IntegerScheme):
        raise UsageError(f"the integer kernels cannot pack a weight of scheme {scheme}")
    tensors = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    group_index = tensors.get("group_index")
    return pack_groups(
        scheme.bits,
        tensors["codes"],
        tensors["scales"],
        scheme.group_size,
        zeros=tensors.get("zeros"),
        offsets=tensors.get("offsets"),
        group_index=None if group_index is None else group_index.long(),
    )


def pack_groups(
    bits: int,
    codes: Tensor,
    scales: Tensor,
    group_size: int | None,
    *,
    zeros: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
) -> PackedInteger:
    """Codes uint8 [N, K] with scales [N, G], in groups of `group_size` columns or of `group_index` int64 [K]."""
    if zeros is not None and bits < 8 and bool((zeros > 2**bits).any()):
        # The kernels take zero points beside the codes' range only. The product is exact in float32.
        offsets, zeros = -zeros.float() * scales.float(), None
    if offsets is not None and offsets.dtype != scales.dtype:
        scales, offsets = scales.float(), offsets.float()
    stored = stored_bits(bits)
    # A symmetric weight has its zero point in the middle of the codes that are stored.
    shift = 2 ** (stored - 1) - 2 ** (bits - 1) if zeros is None and offsets is None else 0
    order = arrange_columns(codes.shape[1], scales.shape[1], group_size, group_index, COLUMNS)
    columns = None if order.columns is None else order.columns.to(codes.device)
    spread = [None if part is None else group_lines(order.spread(part)) for part in (scales, zeros, offsets)]
    packed = spread[0]
    assert packed is not None
    scale_dtype = packed.dtype if packed.dtype in (torch.float16, torch.bfloat16) else torch.float32
    return PackedInteger(
        bits=stored,
        out_features=codes.shape[0],
        in_features=codes.shape[1],
        group_size=order.group_size,
        codes=pack_codes(codes, stored, shift, columns, order.padded),
        scales=packed.to(scale_dtype),
        zeros=spread[1],
        offsets=spread[2] if spread[2] is None else spread[2].to(scale_dtype),
        columns=columns,
    )


def stored_bits(bits: int) -> int:
    """The bits that a code takes in memory."""
    return next(width for width in PLANE_BYTES if bits <= width)


def chunk_bytes(bits: int) -> int:
    """Bytes of the codes of 64 rows and 64 columns."""
    return TILES * LANES * sum(PLANE_BYTES[bits])


def pack_codes(codes: Tensor, bits: int, shift: int, columns: Tensor | None, padded: int) -> Tensor:
    """uint8 [N, K] -> uint8 [super rows, chunks, bytes of a chunk]. `shift` is added to every code."""
    super_rows = -(-codes.shape[0] // ROWS)
    packed = codes.new_empty(super_rows, padded // CHUNK, chunk_bytes(bits))
    step = max(1, _SLAB_CODES // (ROWS * padded))
    for first in range(0, super_rows, step):
        rows = codes[first * ROWS : (first + step) * ROWS]
        slab = rows.new_zeros(min(step, super_rows - first) * ROWS, padded)
        if columns is None:
            slab[: rows.shape[0], : rows.shape[1]] = rows
        else:
            used = columns >= 0
            slab[: rows.shape[0], used] = rows[:, columns[used].long()]
        packed[first : first + step] = _pack_slab(slab + shift if shift else slab, bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [padded rows, padded columns], in packed order, shifted as stored."""
    super_rows, chunks, _ = packed.shape
    lanes = _unpack_lanes(packed, bits)  # [super rows, chunks, tile, lane, step, register, 2]
    lanes = lanes.view(super_rows, chunks, TILES, 8, 4, 4, 2, 2, 2)
    return lanes.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(super_rows * ROWS, chunks * CHUNK)


def group_lines(values: Tensor) -> Tensor:
    """[N, G] -> [super rows, G, 64] in the order of the kernels' lanes; zeros in the padding."""
    rows, groups = values.shape
    padded = values.new_zeros(-(-rows // ROWS) * ROWS, groups)
    padded[:rows] = values
    return padded.view(-1, TILES, 2, 8, groups).permute(0, 4, 3, 1, 2).reshape(-1, groups, ROWS).contiguous()


def ungroup_lines(lines: Tensor) -> Tensor:
    """The inverse: [super rows, G, 64] -> [padded rows, G]."""
    super_rows, groups, _ = lines.shape
    return lines.view(super_rows, groups, 8, TILES, 2).permute(0, 3, 4, 2, 1).reshape(super_rows * ROWS, groups)


def unpack(packed: PackedInteger, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that the kernels multiply by, computed in `dtype`."""
    codes = unpack_codes(packed.codes, packed.bits).to(dtype)
    group = torch.arange(packed.padded_columns, device=codes.device) // packed.group_size
    scales = ungroup_lines(packed.scales).to(dtype)[:, group]
    if packed.offsets is not None:
        weight = codes * scales + ungroup_lines(packed.offsets).to(dtype)[:, group]
    elif packed.zeros is not None:
        weight = (codes - ungroup_lines(packed.zeros).to(dtype)[:, group]) * scales
    else:
        weight = (codes - 2 ** (packed.bits - 1)) * scales
    weight = weight[: packed.out_features]
    if packed.columns is None:
        return weight[:, : packed.in_features]
    used = packed.columns >= 0
    ordered = weight.new_empty(packed.out_features, packed.in_features)
    ordered[:, packed.columns[used].long()] = weight[:, used]
    return ordered


def _pack_slab(slab: Tensor, bits: int) -> Tensor:
    """[rows, columns] uint8 -> [super rows, chunks, bytes]."""
    rows, columns = slab.shape
    # [super row, tile, row + 8, lane / 4, chunk, step, column + 8, lane % 4, odd column]
    split = slab.view(rows // ROWS, TILES, 2, 8, columns // CHUNK, 4, 2, 4, 2)
    lanes = split.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(rows // ROWS, columns // CHUNK, TILES, LANES, 4, 4, 2)
    planes = [plane.flatten(3) for plane in _planes(lanes, bits)]
    return torch.cat(planes, 3).flatten(2)


def _planes(lanes: Tensor, bits: int) -> list[Tensor]:
    """Codes [..., lane, step, register, 2] -> planes uint8 [..., lane, bytes]."""
    if bits == 8:
        # byte (r % 2) + 2 e of word r / 2
        plane = _split(lanes, -2, (2, 2)).transpose(-1, -2).flatten(-3)
        return [plane[..., :2, :].flatten(-2), plane[..., 2:, :].flatten(-2)]
    if bits == 4:
        return [_or_bytes(lanes, [[(byte % 2 * 2 + high, byte // 2) for high in (0, 1)] for byte in range(4)], 4)]
    if bits in (5, 6):
        return [*_planes(lanes & 15, 4), _one_bit(lanes >> 4) if bits == 5 else _two_bits(lanes >> 4)]
    return [_two_bits(lanes & 3)] if bits == 2 else [_two_bits(lanes & 3), _one_bit(lanes >> 2)]


def _two_bits(lanes: Tensor) -> Tensor:
    """[..., lane, step, register, 2] -> [..., lane, 8 bytes]."""
    table = [[(byte % 2 * 4 + place, byte // 2) for place in range(4)] for byte in range(4)]
    return _or_bytes(_pairs(lanes), table, 2)


def _pairs(lanes: Tensor) -> Tensor:
    """[..., lane, step, register, 2] -> [..., lane, word, pair, 2]."""
    return _split(lanes, -3, (2, 2)).flatten(-3, -2)


def _or_bytes(fields: Tensor, table: list[list[tuple[int, int]]], width: int) -> Tensor:
    """[..., word, field, 2] -> [..., bytes]: byte b of a word holds the codes table[b], lowest bits first."""
    columns = []
    for byte in table:
        value = torch.zeros_like(fields[..., 0, 0])
        for place, (field, odd) in enumerate(byte):
            value = value | fields[..., field, odd] << (place * width)
        columns.append(value)
    return torch.stack(columns, -1).flatten(-2)


def _one_bit(lanes: Tensor) -> Tensor:
    """[..., lane, step, register, 2] -> [..., lane, 4 bytes]: bit 2 p + v + 16 e."""
    bits = _pairs(lanes)  # [..., lane, 2 words, 8 pairs, 2]
    table = [[(bit // 2 + byte % 2 * 4, bit % 2, byte // 2) for bit in range(8)] for byte in range(4)]
    columns = []
    for byte in table:
        value = torch.zeros_like(bits[..., 0, 0, 0])
        for place, (pair, word, odd) in enumerate(byte):
            value = value | bits[..., word, pair, odd] << place
        columns.append(value)
    return torch.stack(columns, -1)


def _split(values: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`values` with one dimension split into several; -1 for what is left."""
    shape = list(values.shape)
    dim %= len(shape)
    return values.reshape(shape[:dim] + list(sizes) + shape[dim + 1 :])


def _unpack_lanes(packed: Tensor, bits: int) -> Tensor:
    """uint8 [super rows, chunks, bytes] -> codes [super rows, chunks, tile, lane, step, register, 2]."""
    tiles = _split(packed, -1, (TILES, -1))
    low = PLANE_BYTES[bits][0]
    plane = _split(tiles[..., : LANES * low], -1, (LANES, low))
    if bits == 8:
        second = _split(tiles[..., LANES * low :], -1, (LANES, low))
        both = _split(torch.stack([plane, second], -2), -1, (2, 2, 2, 2))  # [plane, step, word, odd, register % 2]
        return both.transpose(-1, -2).flatten(-3, -2).flatten(-4, -3)
    if bits in (4, 5, 6):
        halves = _split(plane, -1, (4, 2, 2))  # [step, odd, byte]: registers 0, 1 in byte 0
        fields = torch.stack([halves & 15, halves >> 4], -1).flatten(-2).transpose(-1, -2)
    else:
        fields = _unpack_two_bits(plane)
    if bits in (2, 4):
        return fields
    rest = _split(tiles[..., LANES * low :], -1, (LANES, -1))
    if bits == 6:
        return fields | _unpack_two_bits(rest) << 4
    return fields | _unpack_one_bit(rest) << bits - 1


def _unpack_two_bits(plane: Tensor) -> Tensor:
    """uint8 [..., lane, 8] -> [..., lane, step, register, 2]."""
    halves = _split(plane, -1, (2, 2, 2))  # [word, odd, byte]
    fields = torch.stack([halves >> (2 * place) & 3 for place in range(4)], -1).flatten(-2).transpose(-1, -2)
    return _split(fields, -2, (2, 4)).flatten(-4, -3)


def _unpack_one_bit(plane: Tensor) -> Tensor:
    """uint8 [..., lane, 4] -> [..., lane, step, register, 2]."""
    halves = _split(plane, -1, (2, 2))  # [odd, byte]
    places = _split(torch.stack([halves >> place & 1 for place in range(8)], -1), -1, (4, 2))
    fields = places.flatten(-3, -2).permute(0, 1, 2, 3, 6, 5, 4)
    return _split(fields, -2, (2, 4)).flatten(-4, -3)
