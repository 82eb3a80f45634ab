"""Quality of a quantized model against its base: KL divergence, top-1 agreement, perplexity, drift, tasks."""

from aphroquant.evaluation.compare import evaluate, evaluate_models
from aphroquant.evaluation.gate import Bounds, GateCheck, check_bounds
from aphroquant.evaluation.pairs import Comparison
from aphroquant.evaluation.result import Evaluation, EvaluationRun

__all__ = [
    "Bounds",
    "Comparison",
    "Evaluation",
    "EvaluationRun",
    "GateCheck",
    "check_bounds",
    "evaluate",
    "evaluate_models",
]
