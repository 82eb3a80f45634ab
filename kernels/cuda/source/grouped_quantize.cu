// Activations of sorted tokens to FP8 e4m3 codes, one row a place. The macros are those of float8_quantize.cuh; with MODE 2
// each expert has a scale of its own, which is written down for each of its places.
#include "float8_quantize.cuh"
#include "ptx/grid_dependency.cuh"

#ifndef HAS_ROWS  // x is in the order of tokens, else in that of places
#define HAS_ROWS 1
#endif

struct Quantize {
    const Element* x;
    const int32_t* rows;    // the token of each place
    const int32_t* owners;  // its expert
    const int32_t* lines;   // where its scale stands (MODE 1)
    const int32_t* count;   // places in use
    float* given;           // [experts] (MODE 2)
    uint8_t* codes;         // [places][stride]
    float* scales;          // [places]; MODE 1: [groups][scale_stride]
    int columns, stride, scale_stride;
};

extern "C" __global__ void __launch_bounds__(THREADS) grouped_quantize(const __grid_constant__ Quantize quantize) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t place = blockIdx.x;
    if (place >= *quantize.count) return;
    const int64_t row = HAS_ROWS ? quantize.rows[place] : place;
    float* scale = quantize.scales + place;
    if (MODE == 1) scale = quantize.scales + quantize.lines[place];
    if (MODE == 2) {
        float* given = quantize.given + quantize.owners[place];
        if (threadIdx.x == 0) *scale = *given;
        scale = given;
    }
    quantize_row(quantize.x + row * quantize.columns, quantize.codes + place * quantize.stride, scale, quantize.columns,
                 quantize.stride, quantize.scale_stride);
}
