"""Quality of a quantized model against its base: KL divergence, top-1 agreement, perplexity, drift, tasks."""

from aphroquant.evaluation.compare import evaluate, evaluate_models
from aphroquant.evaluation.drift import Drift, measure_drift
from aphroquant.evaluation.gate import Bounds, GateCheck, check_bounds
from aphroquant.evaluation.pairs import Comparison
from aphroquant.evaluation.result import Evaluation, EvaluationRun
from aphroquant.evaluation.tasks import TaskSettings, measure_tasks

__all__ = [
    "Bounds",
    "Comparison",
    "Drift",
    "Evaluation",
    "EvaluationRun",
    "GateCheck",
    "TaskSettings",
    "check_bounds",
    "evaluate",
    "evaluate_models",
    "measure_drift",
    "measure_tasks",
]
