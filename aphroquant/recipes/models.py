"""The recipe's shape: every key, its type, its bounds and its meaning. `schema.json` is made from this.

Whether a setting fits a target or a model is not known here: the conversion's own plan says it, before any work.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from aphroquant.amounts import bytes_in

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_MAX_NAME, _MAX_PATH = 255, 4000  # bytes that Linux takes, with room for the recipe's directory


def _possible_place(place: str) -> str:
    if "\0" in place:
        raise ValueError("has a zero byte in it, which no path has")
    if len(place.encode()) > _MAX_PATH or any(len(name.encode()) > _MAX_NAME for name in place.split("/")):
        raise ValueError(f"is too long: a path has at most {_MAX_PATH} bytes, and {_MAX_NAME} between slashes")
    return place


Place = Annotated[Text, AfterValidator(_possible_place)]
Share = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    """Unknown keys are errors, and nothing is converted into what it is not."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class CalibrationSource(_Section):
    """One text to calibrate on."""

    path: Place
    """A text file, or JSONL with messages, text, or prompt and response; "default" is the bundled set."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the windows that come from here, relative to the other sources'. If one has a weight, all need one;
    without any, the texts are one stream."""


class Calibration(_Section):
    """The text that every output is calibrated on, in one pass."""

    sources: tuple[CalibrationSource, ...] = ()
    """Mixed in this order. Empty: the bundled set, which GGUF's encoders do without."""

    samples: Count | None = None
    """Windows; 0: none. Default: what the outputs' effort says."""

    seq_len: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window."""

    seed: Seed = 0
    """Chooses the windows."""

    packing: Literal["stream", "documents"] = "stream"
    """"stream" cuts windows anywhere; "documents" lets each begin where a text or conversation does."""

    chat_template: Place | None = None
    """A Jinja file for conversations, in place of the model's own template; "none": contents joined as they are."""

    @model_validator(mode="after")
    def _all_or_none_have_weights(self) -> Calibration:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("sources need a weight each, or none of them one")
        return self


class Rule(_Section):
    """What some modules get in place of what the output asks for all. The last rule that matches decides."""

    modules: Text
    """A role (attention, mlp, q, k, v, o, gate, up, down, experts, lm_head), a name, a pattern, or layers[0:2].down."""

    scheme: Text | None = None
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    solver: Text | None = None
    keep: bool = False
    """They stay dense."""


class Gates(_Section):
    """Bounds that a result must keep, for all texts together and for each."""

    max_kld: Bound | None = None
    """Mean KL divergence from the source, in nats."""

    max_p99_kld: Bound | None = None
    max_p999_kld: Bound | None = None
    min_top1: Share | None = None
    """Share of positions with the source's most likely token."""

    max_ppl_ratio: Bound | None = None
    """Perplexity, as a multiple of the source's."""


class AllGates(Gates):
    """Bounds, and others for some texts."""

    texts: dict[str, Gates] = {}
    """By the names of the evaluation's texts: bounds on that text alone, beside the others."""


class Output(_Section):
    """One format to write, and the numbers in it. What is left out is the best that the format and the model allow."""

    to: Text
    """awq, gptq, fp8, compressed-tensors, gguf, auto-round, hqq, modelopt, bitsandbytes, aqlm ..."""

    out: Place | None = None
    """The directory (for gguf also a file) to make. Default: outputs/NAME in the job's directory."""

    scheme: Text | None = None
    """As convert --scheme: w4a16, w8a8-int8, fp8-static, q4_k_m ..."""

    bits: int | float | None = None
    """Of a weight. With a point (3.5, 4.0): their average, for which each layer gets bits of its own."""

    size: int | Text | None = None
    """The same for all tensors together, in bytes, or as 2.5GiB, in place of bits."""

    group_size: int | None = None
    symmetric: bool | None = None
    solver: Text | None = None
    effort: Literal["fast", "normal", "best"] = "normal"
    refine_steps: Count | None = None
    distill_steps: Count | None = None
    kv_scales: bool = False
    """Store scales for an FP8 KV cache, from calibration, as convert --kv-scales."""

    calibrates: bool = True
    """false: without calibration text, whatever the others do."""

    ignore: tuple[Text, ...] = ()
    """Modules that stay dense, as convert --ignore."""

    rules: tuple[Rule, ...] = ()
    overwrite: bool = False
    """Replace also what this job has not made."""

    gates: AllGates | None = None
    """In place of the recipe's gates."""

    @field_validator("bits")
    @classmethod
    def _possible(cls, bits: int | float | None) -> int | float | None:
        most = 8 if isinstance(bits, int) else 32
        if bits is not None and not 1 <= bits <= most:
            raise ValueError(f"must be between 1 and {most}")
        return bits

    @field_validator("size")
    @classmethod
    def _bytes(cls, size: int | str | None) -> int | None:
        amount = bytes_in(size) if isinstance(size, str) else size
        if size is not None and amount is None:
            raise ValueError("is no amount of bytes; write bytes, 512MiB or 4GB")
        return amount


class Evaluation(_Section):
    """How every output is measured against the source."""

    texts: dict[str, Place] = {}
    """Names and UTF-8 files; "default" is the bundled held-out text. Empty: that one."""

    windows: Annotated[int, Field(ge=1)] = 8
    """Of each text."""

    window_len: Annotated[int, Field(ge=2)] = 1024
    seed: Seed | None = None
    """Draws the windows at random. Default: evenly spaced."""

    noise_floor: bool = True
    """Measure what bfloat16 alone changes in the source, so that a bound beyond it is told."""

    allow_calibration_text: bool = False
    """Measure also on a text that an output was calibrated on, where it looks better than it is."""


class Report(_Section):
    """Copies of the reports, beside those in the job's directory."""

    json_file: Annotated[Place | None, Field(alias="json")] = None
    markdown: Place | None = None
    junit: Place | None = None
    html: Place | None = None


class Publish(_Section):
    """Where outputs go that kept their gates."""

    to: Place
    """A directory, hf://org/name for the Hub, or any URL that fsspec knows (s3://bucket/path ...)."""

    outputs: tuple[Text, ...] = ()
    """Names; empty: all, each in a folder of its own where there are several."""

    private: bool = False
    """Make a new Hub repository private."""

    revision: Text | None = None
    """Branch of the Hub repository."""


class Recipe(_Section):
    """What is made of a source."""

    version: Literal[1] = 1
    """Of this file's form."""

    name: Text | None = None
    description: Text | None = None
    source: Place | None = None
    """A directory, a .gguf file or a Hub id. Shipped recipes have none: it is given when they are run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    requantize: bool = False
    """Allow a loss: quantize anew what is quantized already and cannot stay as it is."""

    rotate: bool = False
    """Write the model in other channels first, by a rotation drawn with the calibration's seed, as convert --rotate."""

    calibration: Calibration = Calibration()
    outputs: Annotated[dict[str, Output], Field(min_length=1)]
    """By name: all are written from one pass over the source."""

    evaluation: Evaluation | None = Evaluation()
    """null: nothing is measured, and there are no gates."""

    gates: AllGates = AllGates()
    report: Report = Report()
    publish: tuple[Publish, ...] = ()

    @field_validator("outputs")
    @classmethod
    def _plain_names(cls, outputs: dict[str, Output]) -> dict[str, Output]:
        for name in outputs:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for an output: letters, digits, '.', '_' and '-'")
        return outputs

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        for place in self.publish:
            unknown = [name for name in place.outputs if name not in self.outputs]
            if unknown:
                raise ValueError(
                    f"publish names the output {unknown[0]!r}, which is not among {', '.join(self.outputs)}"
                )
        texts = ["default"] if self.evaluation is None or not self.evaluation.texts else list(self.evaluation.texts)
        for gates in (self.gates, *(output.gates for output in self.outputs.values())):
            unknown = [name for name in (gates.texts if gates else {}) if name not in texts]
            if unknown:
                raise ValueError(f"gates name the text {unknown[0]!r}, which is not among {', '.join(texts)}")
        if self.evaluation is None and any(gates_of(self, name) for name in self.outputs):
            raise ValueError("gates need an evaluation, which is null")
        return self


def gates_of(recipe: Recipe, output: str) -> AllGates | None:
    """The gates of an output; None if there are none."""
    own = recipe.outputs[output].gates
    found = recipe.gates if own is None else own
    return found if found.model_fields_set else None
