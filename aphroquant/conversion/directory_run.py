"""A conversion whose output is a directory of safetensors files."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from aphroquant.calibration.data import CalibrationData
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import CheckpointWriter
from aphroquant.checkpoint.base import naming
from aphroquant.checkpoint.carried import carried_name
from aphroquant.checkpoint.hashes import FileRecord
from aphroquant.conversion.ahead import in_order
from aphroquant.conversion.blocks import SolvedBlock, solve_without_data
from aphroquant.conversion.conversion import Conversion, peak_memory
from aphroquant.conversion.fused import unequal_groups
from aphroquant.conversion.kv_cache import FP8_PER_TENSOR, in_targets_shape, with_cache_scheme, written_names
from aphroquant.conversion.loss import (
    DENSE_OUTCOME,
    repacked,
    requantized,
    would_be_repacked,
)
from aphroquant.conversion.manifest import manifest
from aphroquant.conversion.plan import DEQUANTIZED_DTYPE, EXACT_DTYPE, ConversionPlan, make_plan, read_carried
from aphroquant.conversion.promises import promised_tensors
from aphroquant.conversion.repack import RepackPlan, Stack, fetched_modules, make_repack_plan, repack_module
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.soundness import (
    check_carried,
    check_complete,
    check_output_place,
    check_tokenizer,
    rebuilds_tokenizer,
)
from aphroquant.conversion.targets import ENGINE_BITS
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.formats.base import Format
from aphroquant.prefetch import prefetched
from aphroquant.provenance.card import model_card
from aphroquant.provenance.checksums import FILE_NAME as SUMS
from aphroquant.provenance.checksums import sums_text
from aphroquant.provenance.records import CARD, MANIFEST
from aphroquant.schemes import FloatScheme, IntegerScheme

Plan = ConversionPlan | RepackPlan


class DirectoryConversion(Conversion):
    """One run with a directory of safetensors as its output."""

    plan: Plan

    def _prepare(self) -> None:
        self.modules: dict[str, dict[str, Any]] = {}
        self.scaling: dict[str, dict[str, Any]] = {}
        self.refinement: dict[str, dict[str, Any]] = {}
        self.distillation: dict[str, Any] = {}
        self._num_rescaled = 0
        self._changed: dict[str, Tensor] = {}
        check_output_place(self.checkpoint, self.request.out)
        check_complete(self.checkpoint)
        check_tokenizer(self.checkpoint)
        self.plan = self._make_plan()
        self.writer = CheckpointWriter(self.request.out, overwrite=self.request.overwrite, hashed=True)

    @property
    def place(self) -> Path:
        return self.writer.directory

    @property
    def read_late(self) -> Sequence[str]:
        return self.plan.dense_names

    @property
    def calibrates(self) -> bool:
        return self.solved_plan is not None

    @property
    def solved_plan(self) -> ConversionPlan | None:
        return self.plan if isinstance(self.plan, ConversionPlan) and self.plan.calibrates else None

    def check(self) -> None:
        if self.solved_plan is not None:  # else it is found soon enough while copying
            with self.timed("check"):
                check_carried(self.checkpoint, self.solved_plan.dense_names)
        elif self.request.calibration:
            self.note("the calibration text is not read: this scheme and solver need none")

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self.writer as writer:
            for line in writer.removed:
                self.progress.note(line)
            writer.promise(promised_tensors(self.plan))
            yield

    def write_alone(self) -> None:
        if isinstance(self.plan, RepackPlan):
            self._repack(self.plan)
            return
        total = self.plan.spec.num_layers
        self.progress.stage("solving")
        self.progress.block(0, total)
        with naming(self.checkpoint.path):
            for solved in solve_without_data(self.plan):
                self.take(solved)
                self.progress.block(min(solved.layer + 1, total), total)

    def take(self, solved: SolvedBlock) -> None:
        assert isinstance(self.plan, ConversionPlan)
        self._changed |= solved.changed
        self._write_block(self.plan, solved)

    def distilled(self, report: dict[str, Any], seconds: float) -> None:
        self.distillation = report
        self.timings["distillation"] = seconds

    def write_rest(self, statistics: Mapping[str, InputStatistics]) -> None:
        with naming(self.checkpoint.path):
            self._carry_tensors(self._changed)
        self._carry_files(self._target.side_files())

    def finish(self, data: CalibrationData | None, source_files: Mapping[str, FileRecord]) -> ConversionResult:
        config = self.checkpoint.config | {"quantization_config": self._target.quantization_config()}
        with self.timed("hashes"):
            files = self.writer.records(config)
        result = self._result(done=True)
        told = manifest(
            self.request,
            result,
            data,
            self.timings,
            checkpoint=self.checkpoint,
            source_files=source_files,
            files=files,
            tensor_sums=self.writer.tensor_sums(),
        )
        card = self.writer.write_text(CARD, model_card(told, self.checkpoint, self.writer.directory.name))
        sums = files | {CARD: card, MANIFEST: self.writer.write_json(MANIFEST, told)}
        self.writer.write_text(SUMS, sums_text({name: record.sha256 for name, record in sums.items()}))
        self.writer.finish(config)
        return replace(result, seconds=time.monotonic() - self.started, peak_memory_bytes=peak_memory())

    @cached_property
    def _target(self) -> Format:
        if isinstance(self.plan, ConversionPlan) and self.plan.cache_scales:
            return self.plan.format.with_cache_scheme(FP8_PER_TENSOR)
        return with_cache_scheme(self.plan.format, self.checkpoint)

    def _make_plan(self) -> Plan:
        found = make_repack_plan(self.checkpoint, self.request) if self.reason is None else None
        if found is not None:
            if self.request.kv_scales:
                raise UsageError(
                    f"--kv-scales calibrates, but {self.checkpoint.source} is quantized already and is only repacked",
                    hint="give it with the conversion of the dense model, or with --requantize and other numbers",
                )
            self._tell_repack(found)
            return found
        self.allocate()
        plan = make_plan(self.checkpoint, self.resolved)
        if partial := _partial_blocks(plan):
            self.note(f"{partial} is no whole number of blocks, which transformers and some engines refuse")
        if unequal := unequal_groups(plan.spec, plan.schemes):
            self.warn(unequal)
        if beyond := sorted(_beyond_engines(plan)):
            widths = " and ".join(map(str, ENGINE_BITS[self.request.to]))
            told = ", ".join(map(str, beyond))
            self.note(f"vLLM runs {self.request.to} of {widths} bits only, not of {told}; transformers runs all")
        return plan

    def _tell_repack(self, plan: RepackPlan) -> None:
        self.note(f"{self.checkpoint.format_name} to {self.request.to} without loss: the numbers stay as they are")
        if plan.dequantized:
            names = " and ".join(plan.dequantized)
            self.note(f"{names}, which {self.request.to} keeps dense, in float32, which holds every bit")

    def _repack(self, plan: RepackPlan) -> None:
        self.progress.stage("repacking")
        stacks = list(plan.stacks)
        coming = fetched_modules(plan, (module for modules, _ in stacks for module in modules))
        repacked = in_order(coming, partial(repack_module, plan))
        done = 0
        for modules, num_entries in stacks:
            stack = Stack(num_entries)
            for fetched, (tensors, rescaled) in islice(repacked, len(modules)):
                self._num_rescaled += rescaled
                self._add_module(fetched.module, tensors, stack)
                done += 1
                self.progress.block(done, len(plan.schemes))
            for name, tensor in stack.tensors.items():
                self.writer.add(name, tensor)

    def _write_block(self, plan: ConversionPlan, solved: SolvedBlock) -> None:
        if solved.scaling:
            self.scaling[plan.spec.block_prefix(solved.layer)] = solved.scaling
        if solved.refinement:
            self.refinement[plan.spec.block_prefix(solved.layer)] = solved.refinement
        stack = Stack(0)
        for module, solution in solved.solutions.items():
            tensors = plan.format.write(module, solution.weight)
            if self.shares and not plan.format.read(module, tensors).same_values(solution.weight):
                raise AphroquantError(f"{module}: {self.request.to} does not hold the numbers that it shares")
            self._add_module(module, tensors, stack)
            self.modules[module] = {
                "scheme": str(solution.weight.scheme),
                "relative_error": solution.relative_error,
                **solution.details,
            }
            for warning in solution.warnings:
                self.warn(f"{module}: {warning}")
        assert not stack.tensors, "solvers know no stacked modules"

    def _add_module(self, module: str, tensors: dict[str, Tensor], stack: Stack) -> None:
        """Write the tensors of one module, or put them into the stack that they are a part of."""
        for suffix, tensor in tensors.items():
            name, entry = self.plan.format.place(module, suffix)
            if entry is None:
                self.writer.add(name, tensor)
            else:
                stack.put(name, entry, tensor)

    def _carry_tensors(self, changed: dict[str, Tensor]) -> None:
        """All that is not quantized: as it is, but for what scaling has changed, and the names of cache scales."""
        target, names = self.request.to, self.plan.dense_names
        dtype = EXACT_DTYPE if isinstance(self.plan, RepackPlan) else DEQUANTIZED_DTYPE
        written = written_names(self.checkpoint, names, target)
        for name in names:
            for new_name in written[name]:
                if name in changed:
                    self.writer.add(new_name, changed[name])
                    continue
                carried = read_carried(self.checkpoint, name, target, dtype)
                shape = in_targets_shape(new_name, carried.shape, target)
                with closing(prefetched(carried.pieces)) as pieces:
                    self.writer.add_pieces(new_name, carried.dtype, shape, pieces)
        if isinstance(self.plan, ConversionPlan):
            for name, new_name in self.plan.cache_scales.items():
                self.writer.add(new_name, changed[name].reshape(in_targets_shape(new_name, (1,), target)))
        left_out = [name for name in names if not written[name]]
        if left_out:
            self.note(f"{left_out[0]} is left out: the same scale is stored under another name, which counts")

    def _carry_files(self, side_files: dict[str, Any]) -> None:
        for path in self.checkpoint.carried_files():
            self.writer.add_file(path, carried_name(path))
        if rebuilds_tokenizer(self.checkpoint):
            with tempfile.TemporaryDirectory() as directory:
                self.checkpoint.save_tokenizer(Path(directory))
                for path in sorted(Path(directory).iterdir()):
                    self.writer.add_file(path)
        for name, content in side_files.items():
            self.writer.write_json(name, content)

    def _result(self, *, done: bool) -> ConversionResult:
        plan = self.plan
        errors = [module["relative_error"] for module in self.modules.values()]
        solver = _solver_text(plan) if isinstance(plan, ConversionPlan) else None
        return ConversionResult(
            **self.measured(),
            mode=self._mode(),
            outcome=self._outcome(done=done),
            scheme=_scheme_text(plan),
            solver=solver,
            num_modules=len(plan.modules),
            num_bytes=plan.num_bytes,
            bits_per_weight=plan.bits_per_weight,
            mean_relative_error=sum(errors) / len(errors) if errors else None,
            modules=self.modules,
            scaling=self.scaling,
            refinement=self.refinement,
            distillation=self.distillation,
        )

    def _mode(self) -> str:
        if isinstance(self.plan, RepackPlan):
            return "repack"
        return "quantize" if self.reason is None else "requantize"

    def _outcome(self, *, done: bool) -> str:
        if isinstance(self.plan, RepackPlan):
            count = len(self.plan.schemes)
            return repacked(count, self._num_rescaled) if done else would_be_repacked(count)
        return DENSE_OUTCOME if self.reason is None else requantized(self.reason)


def _scheme_text(plan: Plan) -> str:
    """The scheme; of a mixture all of them, the commonest first, with how many modules have each."""
    counts = Counter(str(scheme) for scheme in plan.schemes.values()).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{scheme} ({count})" for scheme, count in counts)


def _solver_text(plan: ConversionPlan) -> str | None:
    """The solvers of all that is not FP8, for which there is no choice; the commonest first."""
    names = Counter(
        plan.solvers[module].name for module, scheme in plan.schemes.items() if not isinstance(scheme, FloatScheme)
    )
    return ", ".join(name for name, _ in names.most_common()) or None


def _beyond_engines(plan: ConversionPlan) -> set[int]:
    """Bits of weight-only layers that vLLM has no kernel for."""
    usual = ENGINE_BITS.get(plan.request.to)
    schemes = [scheme for scheme in plan.schemes.values() if isinstance(scheme, IntegerScheme)]
    if usual is None:
        return set()
    return {scheme.bits for scheme in schemes if scheme.activations is None} - set(usual)


def _partial_blocks(plan: ConversionPlan) -> str | None:
    """The first module whose scales include one for a block cut short by the edge, with its shape."""
    for name, (rows, columns) in plan.modules.items():
        scheme = plan.schemes[name]
        block = scheme.block_shape if isinstance(scheme, FloatScheme) else None
        if block is not None and (rows % block[0] or columns % block[1]):
            return f"{name} {rows}x{columns}"
    return None
