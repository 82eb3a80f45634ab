"""Quality of a quantized model against its base: KL divergence, top-1 agreement, perplexity."""

from aphroquant.evaluation.compare import evaluate
from aphroquant.evaluation.gate import Bounds, GateCheck, check_bounds
from aphroquant.evaluation.result import Evaluation

__all__ = ["Bounds", "Evaluation", "GateCheck", "check_bounds", "evaluate"]
