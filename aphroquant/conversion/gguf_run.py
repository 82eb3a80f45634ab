"""A conversion into one GGUF file: numbers that it can hold stay, all others are encoded in the types asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aphroquant.calibration.data import CalibrationData
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint, GgufWriter
from aphroquant.checkpoint.disk import replace_file, telling_disk_errors
from aphroquant.checkpoint.gguf import GgufCheckpoint
from aphroquant.checkpoint.hashes import FileRecord
from aphroquant.checkpoint.writer import json_text
from aphroquant.conversion.ahead import in_order
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.gguf_plan import GgufPlan, keeps_numbers, make_gguf_plan
from aphroquant.conversion.gguf_rows import encoded_rows, pieces
from aphroquant.conversion.gguf_types import label
from aphroquant.conversion.loss import (
    DENSE_OUTCOME,
    repacked,
    requantized,
    would_be_repacked,
)
from aphroquant.conversion.manifest import manifest
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.soundness import check_carried, check_complete, check_output_place
from aphroquant.provenance.card import model_card
from aphroquant.provenance.checksums import sums_text
from aphroquant.provenance.records import CARD, OutputRecord

# About the tensors of the old file, or about how they were placed.
_NOT_CARRIED = ("general.file_type", "general.quantization_version", "general.alignment", "split.")
_OF_THE_ENCODING = ("quantize.",)  # how the old numbers were found


class GgufConversion(Conversion):
    """One run with a GGUF file as its output."""

    plan: GgufPlan

    def _prepare(self) -> None:
        self._num_rescaled = 0
        self._squared = [0.0, 0.0]  # of errors, and of the weights that have them
        check_complete(self.checkpoint)
        if not keeps_numbers(self.checkpoint, self.reason):
            self.allocate()
        self.plan = make_gguf_plan(self.checkpoint, self.resolved, self.reason)
        check_output_place(self.checkpoint, self.plan.path)
        self._writer = self._make_writer()
        self._tell_plan()

    @property
    def file_bytes(self) -> int:
        """Of the file that is planned, its header included."""
        return self._writer.planned_bytes(self.plan.tensors)

    @property
    def place(self) -> Path:
        return self.plan.path

    @property
    def calibrates(self) -> bool:
        return bool(self.request.calibration) and self.request.samples > 0 and self._encodes

    def check(self) -> None:
        if self.request.calibration and not self.calibrates:
            self.note("the calibration text is not read: nothing is encoded with it")
        with self.timed("check"):
            check_carried(self.checkpoint, self.plan.carried)

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._writer as writer:
            for line in writer.removed:
                self.progress.note(line)
            yield

    def write_alone(self) -> None:
        self._write_tensors({})

    def write_rest(self, statistics: Mapping[str, InputStatistics]) -> None:
        if self.calibrates:
            self._write_tensors({module: found.mean_square.cpu() for module, found in statistics.items()})

    def finish(self, data: CalibrationData | None, source_files: Mapping[str, FileRecord]) -> ConversionResult:
        writer, output = self._writer, OutputRecord(self._writer.path)
        with telling_disk_errors(writer.path, lambda: self.plan.num_bytes):
            for path in (output.manifest_path, output.sums_path):
                path.unlink(missing_ok=True)  # of the file that is replaced
        writer.finish()
        assert writer.record is not None
        result, files = self._result(done=True), {writer.path.name: writer.record}
        told = manifest(
            self.request,
            result,
            data,
            self.timings,
            checkpoint=self.checkpoint,
            source_files=source_files,
            files=files,
            tensor_sums={writer.path.name: writer.tensor_sums()},
        )
        with telling_disk_errors(output.manifest_path, lambda: self.plan.num_bytes):
            self._write_records(output, told, writer.record.sha256)
        return result

    def _write_records(self, output: OutputRecord, told: Mapping[str, Any], sha256: str) -> None:
        """What stands beside the file; a model card where the directory was given, and has none."""
        name, card = output.path.name, output.path.with_name(CARD)
        replace_file(output.manifest_path, json_text(told).encode())
        replace_file(output.sums_path, sums_text({name: sha256}).encode())
        if self.plan.path != self.request.out and not card.exists():
            replace_file(card, model_card(told, self.checkpoint, name).encode())

    @property
    def _encodes(self) -> bool:
        return any(module not in self.plan.exact for module in self.plan.modules)

    def _write_tensors(self, importance: Mapping[str, Tensor]) -> None:
        writer, total, done, name = self._writer, len(self.plan.tensors), 0, ""
        writer.plan(self.plan.tensors)
        self.progress.stage("repacking" if self.plan.exact else "encoding")
        work = partial(encoded_rows, self.checkpoint, self.plan, writer, importance)
        for piece, rows in in_order(pieces(self.checkpoint, self.plan), work):
            if piece.name != name:
                name, done = piece.name, done + 1
                self.progress.block(done, total)
            writer.add_rows(piece.name, piece.start, rows.encoded)
            self._squared = [mine + its for mine, its in zip(self._squared, rows.squares, strict=True)]
            self._num_rescaled += rows.rescaled

    def _make_writer(self) -> GgufWriter:
        options: dict[str, Any] = {"overwrite": self.request.overwrite}
        checkpoint = self.checkpoint
        if not isinstance(checkpoint, GgufCheckpoint):
            return GgufWriter(self.plan.path, checkpoint.config, checkpoint.tokenizer(), name=self._name(), **options)
        left = _NOT_CARRIED if self.plan.exact else _NOT_CARRIED + _OF_THE_ENCODING
        metadata = {key: value for key, value in checkpoint.stored_metadata().items() if not key.startswith(left)}
        return GgufWriter(
            self.plan.path,
            checkpoint.config,
            None,
            name=self._name(),
            metadata=metadata,
            rope_divisors=checkpoint.rope_factors,
            **options,
        )

    def _name(self) -> str:
        return Path(self.checkpoint.source.rstrip("/")).name or self.checkpoint.path.name

    def _tell_plan(self) -> None:
        plan = self.plan
        if self.reason is None and plan.exact:
            self.note(f"{self.checkpoint.format_name} to gguf without loss: the numbers stay as they are")
        if stand_ins := plan.stand_ins:
            kinds = ", ".join(sorted({plan.types[module] for module in stand_ins}))
            self.note(f"{len(stand_ins)} layers are {kinds}: their rows are no whole blocks of what was asked for")
        quantizing = [module for module in plan.exact if _quantizes_inputs(self.checkpoint, module)]
        if quantizing:
            self.note(f"the source quantizes the inputs of {len(quantizing)} layers, which a GGUF file says nothing of")
        if plan.left_out.tied_head:
            self.note(f"{plan.left_out.tied_head[0]} is left out: the config ties it to the embedding")
        if plan.left_out.kv_scales:
            self.note(f"{len(plan.left_out.kv_scales)} scales of the KV cache are left out: GGUF has no place for them")
        if plan.left_out.others:
            first, count = plan.left_out.others[0], len(plan.left_out.others)
            self.warn(f"{count} tensors are left out, for which llama.cpp's model has no place: {first} and so on")

    def _result(self, *, done: bool) -> ConversionResult:
        plan = self.plan
        error, total = self._squared
        fields = self.measured() | {"out": str(plan.path)}
        return ConversionResult(
            **fields,
            mode=self._mode(),
            outcome=self._outcome(done=done),
            scheme=label(plan.layer_types, plan.types_name),
            solver=None,
            num_modules=len(plan.modules),
            num_bytes=plan.num_bytes,
            bits_per_weight=plan.bits_per_weight,
            weight_relative_error=error / total if total else None,
            modules={module: {"type": kind} for module, kind in plan.types.items()},
        )

    def _mode(self) -> str:
        if self.plan.exact:
            return "repack"
        return "quantize" if self.reason is None else "requantize"

    def _outcome(self, *, done: bool) -> str:
        if self.plan.exact:
            count = len(self.plan.exact)
            return repacked(count, self._num_rescaled) if done else would_be_repacked(count)
        return DENSE_OUTCOME if self.reason is None else requantized(self.reason)


def _quantizes_inputs(checkpoint: Checkpoint, module: str) -> bool:
    return getattr(checkpoint.schemes()[module], "activations", None) is not None
