"""The probes that are compiled ahead."""

from aphroquant.kernels.cuda.variants import KernelVariant

VARIANTS = (
    KernelVariant("launch_probe.cu", "launch_probe", no_sass=("LDL", "STL")),
    KernelVariant("launch_probe.cu", "tensor_map_probe", architectures=("sm_90a",), sass=("UTMALDG",)),
)
