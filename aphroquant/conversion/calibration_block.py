"""A decoder block whose weights can be looked at, scaled and replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.team.team import Team
from aphroquant.kernels.reference.matmul import linear
from aphroquant.models.decoder import Attend, CosSin, DecoderBlock, causal_attention
from aphroquant.models.loader import load_block
from aphroquant.models.rope import cos_sin
from aphroquant.models.spec import DOWN, O
from aphroquant.schemes import QuantizedWeight


@dataclass
class BlockLinear:
    """x @ weight.T + bias, in float32."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CacheMaxima:
    """The greatest magnitudes of what an attention would put into its cache, [] each."""

    def __init__(self) -> None:
        self.key = self.value = torch.zeros(())

    def join(self, team: Team) -> None:
        """Take over what other workers have seen that is greater."""
        own = float(self.key), float(self.value)
        seen = team.solve(range(team.size), lambda workers: dict.fromkeys(workers, own))
        self.key, self.value = (torch.tensor(max(each)) for each in zip(*seen.values(), strict=True))

    def watching(self, attend: Attend) -> Attend:
        """The attention, looked at."""

        def watched(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self.key, self.value = (
                torch.maximum(own.to(seen.device), seen.abs().amax().float())
                for own, seen in ((self.key, k), (self.value, v))
            )
            return attend(q, k, v, layer)

        return watched


@dataclass
class CalibrationBlock:
    """Block `layer` in float32. `linears` and `norms` are those of `block`, to be changed in place.

    `changed` holds the tensors that are no longer what the source says, by their full names, in the stored dtype;
    `divided_rows` what scaling has divided the rows of linears by.
    `cache`, if there is one, is told of the keys and values of every `attention_mix`.
    """

    block: DecoderBlock
    linears: dict[str, BlockLinear]
    window_len: int
    changed: dict[str, Tensor] = field(default_factory=dict)
    divided_rows: dict[str, Tensor] = field(default_factory=dict)
    cache: CacheMaxima | None = None

    @property
    def norms(self) -> dict[str, Tensor]:
        return self.block.norms

    @property
    def prefix(self) -> str:
        return self.block.spec.block_prefix(self.block.layer)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output [T, H] for hidden states [T, H]."""
        return self.block.forward(hidden, self._rope(hidden), causal_attention(self.block.spec, self.window_len))

    def attention_mix(self, x: Tensor) -> Tensor:
        """The input of o_proj [T, heads * d] for the normed input x [T, H] of the block."""
        attend = causal_attention(self.block.spec, self.window_len)
        if self.cache is not None:
            attend = self.cache.watching(attend)
        return self._without(O).attention(x, self._rope(x), attend)

    def attention(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """The attention's output [T, H] for the same; `attend` in place of causal attention over the windows."""
        attend = attend or causal_attention(self.block.spec, self.window_len)
        return self.block.attention(x, self._rope(x), attend)

    def mlp_inner(self, x: Tensor) -> Tensor:
        """The input of down_proj [T, I] for the normed input x [T, H] of the MLP."""
        return self._without(DOWN).mlp(x)

    def replaced(self, weights: dict[str, Tensor]) -> CalibrationBlock:
        """The same block with other weights; this one is not modified."""
        linears = self.linears | {name: BlockLinear(w, self.linears[name].bias) for name, w in weights.items()}
        block = replace(self.block, linears=dict(linears))
        return CalibrationBlock(block, linears, self.window_len)

    def copy(self) -> CalibrationBlock:
        """A block of its own to change: tensors are shared, and are replaced, never written to."""
        linears = {name: BlockLinear(linear.weight, linear.bias) for name, linear in self.linears.items()}
        block = replace(self.block, linears=dict(linears), norms=dict(self.block.norms))
        return CalibrationBlock(block, linears, self.window_len)

    def _without(self, name: str) -> DecoderBlock:
        linears = {**self.block.linears, name: lambda x: x}
        return replace(self.block, linears=linears)

    def _rope(self, x: Tensor) -> CosSin:
        spec = self.block.spec
        positions = torch.arange(self.window_len).repeat(x.shape[0] // self.window_len)
        cos, sin = cos_sin(spec.rope, spec.head_dim, positions)
        return cos.to(x.device), sin.to(x.device)


def load_calibration_block(
    checkpoint: Checkpoint, layer: int, window_len: int, device: torch.device | None = None
) -> CalibrationBlock:
    """Read and dequantize one block, on a device."""
    linears: dict[str, BlockLinear] = {}
    prefix = f"{checkpoint.spec.block_prefix(layer)}."

    def make(module: str, weight: QuantizedWeight, bias: Tensor | None) -> BlockLinear:
        matrix = (weight if device is None else weight.to(device)).dequantize()
        made = BlockLinear(matrix, None if bias is None else bias.float().to(device))
        linears[module.removeprefix(prefix)] = made
        return made

    block = load_block(checkpoint, layer, torch.float32, make)
    block.norms = {name: gain.to(device) for name, gain in block.norms.items()}
    return CalibrationBlock(block, linears, window_len)
