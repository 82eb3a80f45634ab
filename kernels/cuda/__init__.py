"""CUDA kernels: sources that NVRTC compiles for the GPU found, what launches them, and the layers made of them."""
