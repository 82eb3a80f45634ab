"""A conversion from beginning to end: plan, calibrate, solve block by block, write."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aphroquant.calibration.data import CalibrationData, calibration_windows
from aphroquant.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from aphroquant.conversion.blocks import CalibratedSolver, SolvedBlock, solve_without_data
from aphroquant.conversion.kv_cache import with_kv_scheme
from aphroquant.conversion.manifest import FILE_NAME, manifest
from aphroquant.conversion.plan import ConversionPlan, make_plan, read_carried
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.repack import RepackPlan, make_repack_plan, repack_module
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.soundness import check_carried, check_complete, check_output_place
from aphroquant.schemes import FloatScheme

Plan = ConversionPlan | RepackPlan


def convert(
    source: str | Path,
    *,
    to: str,
    out: str | Path,
    scheme: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    solver: str | None = None,
    calibration: Sequence[str | Path] | str | Path | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    ignore: Sequence[str] | str = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Quantize the checkpoint `source` into the directory `out`, in the format `to`.

    Left out arguments take the best that the target and the model allow: 4 bits, the largest usual group size that
    divides every layer, zero points (not for compressed-tensors, whose other readers run them only dequantized), the
    solver with the lowest measured divergence, the bundled calibration texts.
    A source that is quantized already, in numbers that `to` can hold, is repacked without loss unless other numbers
    are asked for. The directory appears only when it is complete. `samples` = 0 does without calibration (rtn, FP8).
    """
    paths = [calibration] if isinstance(calibration, str | Path) else calibration or ()
    request = ConversionRequest(
        source=str(source),
        to=to,
        out=Path(out),
        scheme=scheme,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        solver=solver,
        calibration=tuple(Path(path) for path in paths),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        overwrite=overwrite,
    )
    conversion = _Conversion(request, open_checkpoint(source), progress or Progress())
    return conversion.preview() if dry_run else conversion.run()


class _Conversion:
    """One run. Times its stages, and gathers what the report needs."""

    def __init__(self, request: ConversionRequest, checkpoint: Checkpoint, progress: Progress) -> None:
        self.request = request
        self.checkpoint = checkpoint
        self.progress = progress
        self.timings: dict[str, float] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.scaling: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.started = time.monotonic()
        with self._timed("plan"):
            check_output_place(checkpoint, request.out)
            check_complete(checkpoint)
            self.plan = self._make_plan()
            self.writer = CheckpointWriter(request.out, overwrite=request.overwrite)

    def preview(self) -> ConversionResult:
        return replace(self._result(), dry_run=True, seconds=0.0, peak_memory_bytes=0)

    def run(self) -> ConversionResult:
        with self._timed("check"):
            check_carried(self.checkpoint, self.plan.dense_names)
        data = self._read_calibration()
        with self.writer as writer:
            with self._timed("blocks"):
                if isinstance(self.plan, RepackPlan):
                    self._repack(self.plan, writer)
                else:
                    self._quantize(self.plan, data, writer)
            with self._timed("files"):
                self._carry_files(writer)
            result = self._result()
            writer.write_json(FILE_NAME, manifest(self.request, result, data, self.timings))
            self.progress.stage("writing")
            quantization = self.plan.format.quantization_config()
            described = with_kv_scheme(quantization, self.checkpoint, self.request.to)
            writer.finish(self.checkpoint.config | {"quantization_config": described})
        return replace(result, seconds=time.monotonic() - self.started, peak_memory_bytes=_peak_memory())

    def _make_plan(self) -> Plan:
        found = make_repack_plan(self.checkpoint, self.request)
        if isinstance(found, RepackPlan):
            self._note(f"{self.checkpoint.format_name} to {self.request.to} without loss: the numbers stay as they are")
            return found
        if found:
            self._note(f"the source is quantized already and is quantized anew, with a loss, because {found}")
        plan = make_plan(self.checkpoint, self.request)
        if partial := _partial_blocks(plan):
            self._note(f"{partial} is no whole number of blocks, which transformers and some engines refuse")
        return plan

    def _read_calibration(self) -> CalibrationData | None:
        if not isinstance(self.plan, ConversionPlan) or not self.plan.calibrates:
            if self.request.calibration:
                self._note("the calibration text is not read: this scheme and solver need none")
            return None
        request = self.request
        self.progress.stage("reading calibration data")
        with self._timed("calibration data"):
            return calibration_windows(
                self.checkpoint.tokenizer(),
                request.calibration,
                samples=request.samples,
                seq_len=request.seq_len,
                seed=request.seed,
            )

    def _repack(self, plan: RepackPlan, writer: CheckpointWriter) -> None:
        self.progress.stage("repacking")
        for number, module in enumerate(plan.schemes, 1):
            self._add_module(writer, module, repack_module(plan, module))
            self.progress.block(number, len(plan.schemes))
        for name in plan.dense_names:
            writer.add(name, read_carried(self.checkpoint, name))

    def _quantize(self, plan: ConversionPlan, data: CalibrationData | None, writer: CheckpointWriter) -> None:
        total = plan.spec.num_layers
        self.progress.stage("calibrating and solving" if data else "solving")
        self.progress.block(0, total)
        if data is None:
            solved_blocks = solve_without_data(plan)
        else:
            solver = CalibratedSolver(plan, data.windows)
            if solver.spilled:
                self._note("the hidden states are kept in a temporary file")
            solved_blocks = solver.solve()
        changed: dict[str, Tensor] = {}
        for solved in solved_blocks:
            changed |= solved.changed
            self._write_block(plan, solved, writer)
            self.progress.block(solved.layer + 1, total)
        for name in plan.dense_names:
            writer.add(name, changed[name] if name in changed else read_carried(self.checkpoint, name))

    def _write_block(self, plan: ConversionPlan, solved: SolvedBlock, writer: CheckpointWriter) -> None:
        if solved.scaling:
            self.scaling[plan.spec.block_prefix(solved.layer)] = solved.scaling
        for module, solution in solved.solutions.items():
            self._add_module(writer, module, plan.format.write(module, solution.weight))
            self.modules[module] = {"relative_error": solution.relative_error, **solution.details}
            for warning in solution.warnings:
                self.warnings.append(f"{module}: {warning}")
                self.progress.warn(self.warnings[-1])

    def _add_module(self, writer: CheckpointWriter, module: str, tensors: dict[str, Tensor]) -> None:
        for suffix, tensor in tensors.items():
            name, entry = self.plan.format.place(module, suffix)
            assert entry is None
            writer.add(name, tensor)

    def _carry_files(self, writer: CheckpointWriter) -> None:
        carried = self.checkpoint.carried_files()
        for path in carried:
            writer.add_file(path)
        if self.checkpoint.format_name == "gguf" and not any(path.name == "tokenizer.json" for path in carried):
            with tempfile.TemporaryDirectory() as directory:
                self.checkpoint.save_tokenizer(Path(directory))
                for path in sorted(Path(directory).iterdir()):
                    writer.add_file(path)
        for name, content in self.plan.format.side_files().items():
            writer.write_json(name, content)

    def _result(self) -> ConversionResult:
        plan = self.plan
        errors = [module["relative_error"] for module in self.modules.values()]
        solver = None
        if isinstance(plan, ConversionPlan) and not isinstance(plan.scheme, FloatScheme):
            solver = plan.solver.name
        return ConversionResult(
            source=self.request.source,
            out=str(self.request.out),
            to=self.request.to,
            mode="quantize" if isinstance(plan, ConversionPlan) else "repack",
            scheme=_scheme_text(plan),
            solver=solver,
            num_modules=len(plan.modules),
            num_bytes=plan.num_bytes,
            source_bytes=self.checkpoint.num_bytes,
            bits_per_weight=plan.bits_per_weight,
            mean_relative_error=sum(errors) / len(errors) if errors else None,
            seconds=time.monotonic() - self.started,
            peak_memory_bytes=_peak_memory(),
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
            modules=self.modules,
            scaling=self.scaling,
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.note(text)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.timings[stage] = time.monotonic() - begun


def _scheme_text(plan: Plan) -> str:
    if isinstance(plan, ConversionPlan):
        return str(plan.scheme)
    return ", ".join(sorted({str(scheme) for scheme in plan.schemes.values()}))


def _partial_blocks(plan: ConversionPlan) -> str | None:
    """The first module whose scales include one for a block cut short by the edge, with its shape."""
    if not isinstance(plan.scheme, FloatScheme) or plan.scheme.block_shape is None:
        return None
    rows, columns = plan.scheme.block_shape
    cut = (f"{name} {n}x{k}" for name, (n, k) in plan.modules.items() if n % rows or k % columns)
    return next(cut, None)


def _peak_memory() -> int:
    """Greatest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
