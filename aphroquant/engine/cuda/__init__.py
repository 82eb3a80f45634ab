"""The engine on a GPU: weights in the kernels' layout, one forward, decode steps in CUDA graphs, sampling there."""
