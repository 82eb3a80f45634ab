"""Whether launching works."""

from aphroquant.kernels.cuda.device import architecture
from aphroquant.kernels.cuda.probe import launches
from aphroquant.kernels.cuda.self_test import SelfTest

_ROUNDING = 1e-6  # of float32, over the few operations of a chain


def self_tests() -> tuple[SelfTest, ...]:
    """Those that this GPU has the features for."""
    tests = [
        SelfTest("launch: arguments and shared memory", launches.arguments_and_shared_memory, _ROUNDING),
        SelfTest("launch: dependent launches", launches.dependent_launches, _ROUNDING),
        SelfTest("launch: graph replay", launches.graph_replay, _ROUNDING),
        SelfTest("launch: another stream", launches.other_stream, _ROUNDING),
    ]
    if architecture() == "sm_90a":
        tests.append(SelfTest("launch: clusters", launches.clusters, 0.0))
        tests.append(SelfTest("launch: tensor maps", launches.tensor_map, 0.0))
    return tuple(tests)
