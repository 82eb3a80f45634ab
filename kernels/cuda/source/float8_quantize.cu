// Activations to FP8 e4m3 codes with scales for each token, for each 128 columns of a token, or with one given scale. The
// macros are those of float8_quantize.cuh.
#include "float8_quantize.cuh"
#include "ptx/grid_dependency.cuh"

// `stride` bytes from a token's codes to the next. scales: [tokens], [groups][tokens, padded to scale_stride], or [1].
extern "C" __global__ void __launch_bounds__(THREADS)
    float8_quantize(const Element* x, uint8_t* codes, float* scales, int columns, int stride, int scale_stride) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t token = blockIdx.x;
    quantize_row(x + token * columns, codes + token * stride, scales + (MODE == 2 ? 0 : token), columns, stride,
                 scale_stride);
}
