// Instructions that several kernels need and C++ cannot express: 16-bit numbers, the matrix unit of a warp, barriers.

template <bool F16>
__device__ __forceinline__ float widen(unsigned short v) {
    float wide;
    if constexpr (F16)
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v));
    else
        wide = __uint_as_float(static_cast<unsigned>(v) << 16);
    return wide;
}

template <bool F16>
__device__ __forceinline__ unsigned short narrow(float v) {
    unsigned short result;
    if constexpr (F16)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(v));
    else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(v));
    return result;
}

// Returns the scale of block `j` of the two (four, if SMALL, in float16) whose scales are the bits of `both`.
template <bool SMALL>
__device__ __forceinline__ float scale_of(float2 both, int j) {
    if constexpr (SMALL) return widen<true>(static_cast<unsigned short>(__float_as_uint(j >> 1 ? both.y : both.x) >> (16 * (j & 1))));
    return j ? both.y : both.x;
}

// Multiplies 16 × 16 by 16 × 8 and adds to the 16 × 8 sums that 32 lanes hold.
template <bool F16>
__device__ __forceinline__ void multiply_add(float4& d, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (F16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d.x), "+f"(d.y), "+f"(d.z), "+f"(d.w) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d.x), "+f"(d.y), "+f"(d.z), "+f"(d.w) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void initialize(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
