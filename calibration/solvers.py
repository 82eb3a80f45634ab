"""The solvers by name: whether channels are scaled first (AWQ), and how weights are rounded.

Measured with `aphroquant convert` and `aphroquant eval` on SmolLM2-135M-Instruct, made independent of the grid of its
file by function-preserving transformations; 4 bits, groups of 64 with zero points, calibration 128 x 512 tokens of
State of the Union addresses, 8 x 1024 tokens of Wikipedia (standard errors of the divergence 0.007 to 0.017):

    solver                       mean KLD    top-1    perplexity (20.02)    relative time
    rtn, samples = 0                0.529    64.5 %                30.45             0.03
    rtn                             0.309    71.4 %                25.40              1.0
    gptq                            0.213    77.0 %                23.55              1.6
    awq                             0.156    79.3 %                22.68              1.8
    awq-gptq                        0.131    81.9 %                22.26              2.4
    awq-gptq, another seed          0.135    82.0 %                22.47              2.4
    awq-gptq, shorter search        0.137    81.6 %                22.40    not timed beside
    awq-gptq, symmetric             0.165    80.1 %                23.09              2.4
    awq-gptq, bundled texts         0.138    81.3 %                22.39              2.4

The shorter search (12 ratios on 1,024 tokens instead of 20 on 2,048) is the one in use.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from aphroquant.calibration.solution import Rounding, TwoSidedRounding
from aphroquant.errors import UsageError
from aphroquant.schemes import AdditiveScheme, AffineScheme, FloatScheme, IntegerScheme, LookupScheme, Scheme

ChannelScaling = Literal["awq", "smoothquant"]  # how the candidates for channels' scales are made


@dataclass(frozen=True)
class Solver:
    """`modules` has the rounding for each kind of scheme that it makes; `summary` is one line for the user.

    `data` says whether calibration text is needed, used if there is some, or never looked at.
    """

    name: str
    summary: str
    modules: Mapping[type, str]
    scales_channels: ChannelScaling | None = None
    needs_second_moment: bool = False
    data: Literal["needed", "used", "unused"] = "needed"
    follows_source: bool = False  # weights are corrected for what layers in front have lost
    needs_output_moments: bool = False  # E[g g^T] of gradients by outputs; its rounding takes them as well

    def obstacle(self, scheme: Scheme) -> str | None:
        """Why it cannot make weights of a scheme, as the rest of a sentence; None if it can."""
        if type(scheme) not in self.modules:
            return f"makes {' and '.join(_KINDS[kind] for kind in self.modules)}, not {scheme}"
        if self.name == "hqq" and isinstance(scheme, IntegerScheme) and (scheme.symmetric or scheme.activations):
            return f"finds zero points, which {scheme} has none of"
        if self.name == "smoothquant" and getattr(scheme, "activations", None) is None:
            return f"is about the rounding of inputs, which {scheme} leaves alone"
        return None


_KINDS: Mapping[type, str] = {
    IntegerScheme: "integer codes",
    LookupScheme: "codes into tables",
    FloatScheme: "FP8",
    AdditiveScheme: "sums of codebook vectors",
    AffineScheme: "integer codes with real zero points",
}


def _codes(module: str) -> dict[type, str]:
    return {IntegerScheme: module, LookupScheme: module}


SOLVERS: Mapping[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            "rtn",
            "round to nearest, ranges searched by E[x**2]",
            _codes("rtn") | {FloatScheme: "fp8"},
            data="used",
        ),
        Solver(
            "mse", "round to nearest, ranges searched without data", _codes("mse") | {FloatScheme: "mse"}, data="unused"
        ),
        Solver(
            "hqq",
            "zero points for the least sparse error, without data",
            {IntegerScheme: "hqq", AffineScheme: "hqq"},
            data="unused",
        ),
        Solver(
            "gptq", "error feedback between columns", _codes("gptq") | {FloatScheme: "gptq"}, needs_second_moment=True
        ),
        Solver("awq", "channels scaled by activations, then as rtn", _codes("rtn"), scales_channels="awq"),
        Solver(
            "awq-gptq",
            "channels scaled by activations, then as gptq",
            _codes("gptq"),
            scales_channels="awq",
            needs_second_moment=True,
        ),
        Solver(
            "smoothquant",
            "channels scaled by the largest activations, for schemes that round inputs, then as gptq",
            _codes("gptq"),
            scales_channels="smoothquant",
            needs_second_moment=True,
        ),
        Solver(
            "awq-gptaq",
            "as awq-gptq, and each layer makes up for what those before it lost",
            _codes("gptq"),
            scales_channels="awq",
            needs_second_moment=True,
            follows_source=True,
        ),
        Solver(
            "awq-yaqa",
            "as awq-gptq, with error feedback between outputs too, by gradients of the logits",
            {IntegerScheme: "two_sided"},
            scales_channels="awq",
            needs_second_moment=True,
            needs_output_moments=True,
        ),
        Solver("aqlm", "sums of codebook vectors, for AQLM", {AdditiveScheme: "aqlm.solve"}, needs_second_moment=True),
    )
}


def rounding_for(scheme: Scheme, solver: Solver) -> Rounding:
    """What makes weights of a scheme, imported when it is first needed."""
    module = importlib.import_module(f"aphroquant.calibration.{solver.modules[type(scheme)]}")
    return cast(Rounding, module.solve)


def two_sided_rounding(scheme: Scheme, solver: Solver) -> TwoSidedRounding:
    """What `rounding_for` gives for a solver that needs output moments."""
    return cast(TwoSidedRounding, rounding_for(scheme, solver))


def find_solver(name: str) -> Solver:
    """The solver of that name. UsageError listing the known ones."""
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, n=1)
        known = f"the solvers are {', '.join(SOLVERS)}"
        raise UsageError(f"unknown solver {name!r}", hint=f"Did you mean {near[0]!r}? {known}" if near else known)
    return SOLVERS[name]
