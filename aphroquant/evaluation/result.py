"""The result of an evaluation: figures, sizes, and the protocol without which they mean nothing."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from aphroquant.evaluation.size import StoredSize
from aphroquant.evaluation.summary import Summary
from aphroquant.evaluation.texts import TextSource


@dataclass(frozen=True)
class Protocol:
    """How it was measured. `windows` may be fewer than `requested_windows` where the text is short."""

    texts: tuple[TextSource, ...]
    num_text_tokens: int
    windows: int
    requested_windows: int
    window_len: int
    scored_tokens: int  # windows * (window_len - 1): the first token of a window follows nothing
    seed: int | None  # None: windows evenly spaced over the text
    vocab_size: int  # tokens compared; padding columns of the head are left out
    dtype: str = "float32"
    bos: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluation(Summary):
    """A model measured against its base: the figures of Summary, sizes, and how it was done."""

    model: str
    against: str
    size: StoredSize
    base_size: StoredSize
    protocol: Protocol
    seconds: float
    versions: dict[str, str]

    @property
    def perplexity_ratio(self) -> float:
        return math.exp(self.log_ratio) if self.log_ratio < 700 else math.inf

    @property
    def num_bytes(self) -> int:
        return self.size.num_bytes

    @property
    def bits_per_weight(self) -> float:
        return self.size.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. A figure that is not finite becomes None: JSON has no infinity."""
        plain: dict[str, Any] = _finite({**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio})
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
