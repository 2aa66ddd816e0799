// W · xᵀ with W in 16 bits, for up to 16 rows of x (few_rows.cuh). Launched by linear16_cuda.py.

#ifndef FP16  // defaults for a build without the launcher's definitions
#define FP16 false
#define GATED false
#define TILES 1
#define HEIGHT 4
#define SLABS 2
#endif

#include "few_rows.cuh"

struct Numbers16 {
    static constexpr bool HALF = FP16, SCALED = false;
    using Sum = float4;
    using Piece = uint4;
    struct Weights {
        unsigned first[4], second[4];
    };

    static __device__ __forceinline__ Piece piece(uint4 words) { return words; }

    static __device__ __forceinline__ Weights weights(uint4 low, uint4 high) {
        return {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
    }

    static __device__ __forceinline__ void multiply_add(Sum& sum, const Weights& w, const Piece& x) {
        ::multiply_add<HALF>(sum, w.first, x.x, x.y);
        ::multiply_add<HALF>(sum, w.second, x.z, x.w);
    }

    static __device__ __forceinline__ float4 floats(Sum sum) { return sum; }
};

extern "C" __global__ void __launch_bounds__((WARPS + BRINGERS + 1) * 32, 1) linear16(const __grid_constant__ Arguments a) {
    run<Numbers16, GATED, TILES, HEIGHT, SLABS>(a);
}
