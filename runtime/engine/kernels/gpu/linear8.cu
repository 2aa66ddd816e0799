// W · xᵀ with W and x in int8 or e4m3 and a scale for each of their rows, for few rows of x (few_rows.cuh). Launched by
// linear8_cuda.py.
//
// A warp's matrix unit has no product of e4m3 on Hopper: the compiler would widen both operands to fp16 at each use, and add
// the sums apart. fp16 holds every e4m3 number, so they are widened here, x only once for all slabs of a chunk. In a row's
// 16 bytes each word holds four neighbours of K, the two lower ones for the first half of the unit's K and the others for
// the second. W and x have the same order, so the sum over K is complete.

#ifndef FP16  // defaults for a build without the launcher's definitions
#define FP16 false
#define INT8 false
#define GATED false
#define TILES 1
#define HEIGHT 4
#define SLABS 2
#endif

#include "few_rows.cuh"

struct Pair {
    unsigned low, high;  // two fp16 numbers each
};

__device__ __forceinline__ Pair widened(unsigned codes) {
    Pair pair;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}" : "=r"(pair.low), "=r"(pair.high) : "r"(codes));
    return pair;
}

struct NumbersE4m3 {
    static constexpr bool HALF = FP16, SCALED = true;
    using Sum = float4;
    struct Piece {
        Pair words[4];
    };
    struct Weights {
        unsigned words[4][4];
    };

    static __device__ __forceinline__ Piece piece(uint4 codes) { return {{widened(codes.x), widened(codes.y), widened(codes.z), widened(codes.w)}}; }

    static __device__ __forceinline__ Weights weights(uint4 low, uint4 high) {
        const Piece l = piece(low), h = piece(high);
        Weights w;
#pragma unroll
        for (int i = 0; i < 4; ++i) w.words[i][0] = l.words[i].low, w.words[i][1] = h.words[i].low, w.words[i][2] = l.words[i].high, w.words[i][3] = h.words[i].high;
        return w;
    }

    static __device__ __forceinline__ void multiply_add(Sum& sum, const Weights& w, const Piece& x) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ::multiply_add<true>(sum, w.words[i], x.words[i].low, x.words[i].high);
    }

    static __device__ __forceinline__ float4 floats(Sum sum) { return sum; }
};

struct NumbersInt8 {
    static constexpr bool HALF = FP16, SCALED = true;
    using Sum = int4;
    using Piece = uint4;
    struct Weights {
        unsigned first[4], second[4];
    };

    static __device__ __forceinline__ Piece piece(uint4 codes) { return codes; }

    static __device__ __forceinline__ Weights weights(uint4 low, uint4 high) {
        return {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
    }

    static __device__ __forceinline__ void multiply_add(Sum& sum, const Weights& w, const Piece& x) {
        multiply_add(sum, w.first, x.x, x.y);
        multiply_add(sum, w.second, x.z, x.w);
    }

    static __device__ __forceinline__ void multiply_add(Sum& sum, const unsigned (&w)[4], unsigned x0, unsigned x1) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(sum.x), "+r"(sum.y), "+r"(sum.z), "+r"(sum.w) : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
    }

    static __device__ __forceinline__ float4 floats(Sum sum) {
        return make_float4(static_cast<float>(sum.x), static_cast<float>(sum.y), static_cast<float>(sum.z), static_cast<float>(sum.w));
    }
};

template <bool INTEGERS>
struct NumbersOf {
    using Type = NumbersE4m3;
};
template <>
struct NumbersOf<true> {
    using Type = NumbersInt8;
};

extern "C" __global__ void __launch_bounds__((WARPS + BRINGERS + 1) * 32, 1) linear8(const __grid_constant__ Arguments a) {
    run<NumbersOf<INT8>::Type, GATED, TILES, HEIGHT, SLABS>(a);
}
