// Instructions for decode attention that C++ cannot express: operands of the matrix unit, copies, overlapping launches.

__device__ __forceinline__ void load_matrices(unsigned (&a)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&a)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ unsigned transpose(unsigned v) {
    unsigned turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
    return turned;
}

__device__ __forceinline__ float infinity() {
    return __uint_as_float(0x7f800000u);
}

template <bool TO_F16>
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned both;
    if constexpr (TO_F16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Converts the lower two of four e4m3 numbers to float16.
__device__ __forceinline__ unsigned widen_low(unsigned four) {
    unsigned both;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(static_cast<unsigned short>(four)));
    return both;
}

__device__ __forceinline__ unsigned widen_high(unsigned four) {
    return widen_low(four >> 16);
}

// Returns two numbers of a query in the type that is multiplied. One beyond its range becomes its largest number.
__device__ __forceinline__ unsigned as_factors(unsigned pair) {
    if constexpr (F16 && !HALF) {
        const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u), most = 65504.f;
        return pack<true>(fminf(fmaxf(low, -most), most), fminf(fmaxf(high, -most), most));
    }
    return pair;
}

__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void copy_piece(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last LEFT groups have arrived.
template <int LEFT>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void release_followers() {
    asm volatile("griddepcontrol.launch_dependents;");
}

__device__ __forceinline__ void wait_for_predecessors() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
