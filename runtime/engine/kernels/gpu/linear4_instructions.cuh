// Instructions for linear4_wgmma.cu that C++ cannot express: tensor copies and waiting for them, arithmetic on pairs, the
// matrix unit of four warps.

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

__device__ __forceinline__ void expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier, int phase) {
    for (int i = 0;; ++i) {
        unsigned done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
        if (done) break;
        if (i > 1 << 20) __trap();
    }
}

__device__ __forceinline__ void copy_tile(unsigned to, const TensorMap& map, int x, int y, int z, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&map),
                 "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void copy_tile(unsigned to, const TensorMap& map, int x, int y, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(x),
                 "r"(y), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ float2 load_scales(const float* p) {
    float2 v;
    asm volatile("ld.global.nc.L2::256B.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ unsigned acquired(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

template <bool HALF>
__device__ __forceinline__ unsigned twice(float v) {
    unsigned pair;
    if constexpr (HALF)
        asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v));
    return pair;
}

template <bool HALF>
__device__ __forceinline__ unsigned scaled(unsigned pair, unsigned by) {
    unsigned product;
    if constexpr (HALF)
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(by));
    else
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(by));
    return product;
}

__device__ __forceinline__ float activated(float g, int kind) {
    if (kind == 1) return g / (1.f + __expf(-g));
    if (kind == 2) return g / (1.f + __expf(-1.5957691216057308f * (g + 0.044715f * g * g * g)));
    return 0.5f * g * (1.f + erff(g * 0.7071067811865476f));
}

// Returns act(gate) · up of two adjacent elements, rounded where separate kernels would round.
template <bool HALF>
__device__ __forceinline__ unsigned gated(unsigned gate, unsigned up, int kind) {
    unsigned pair = 0;
#pragma unroll
    for (int i = 0; i < 32; i += 16) {
        const float g = widen<HALF>(narrow<HALF>(activated(widen<HALF>(static_cast<unsigned short>(gate >> i)), kind)));
        pair |= static_cast<unsigned>(narrow<HALF>(g * widen<HALF>(static_cast<unsigned short>(up >> i)))) << i;
    }
    return pair;
}

// The sums need more registers than an even share, and the fetching group needs few. By the number of computing
// warpgroups: 232, 152, 104.
template <int COLUMNS, int GROUPS>
__device__ __forceinline__ void fewer_registers() {
    if constexpr (COLUMNS >= 64 || GROUPS == 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}

template <int COLUMNS, int GROUPS>
__device__ __forceinline__ void more_registers() {
    if constexpr (COLUMNS >= 64 || GROUPS == 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 232 : GROUPS == 3 ? 152 : 104));
}

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Multiplies 64 rows of W in registers by all columns of the tile in shared memory that `b` describes, over 16 elements of
// K.
#define MULTIPLY_ADD(COLUMNS, SUMS, A0, A1, A2, A3, B)                                                                                            \
    template <bool HALF>                                                                                                                          \
    __device__ __forceinline__ void multiply_add(float (&d)[SUMS], const unsigned (&a)[4], unsigned long long b) {                                \
        if constexpr (HALF)                                                                                                                       \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.f16.f16 {" NAMES_##SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 \
                         "}, %" #B ", 1, 1, 1, 0;"                                                                                                \
                         : SUMS_##SUMS(0)                                                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                   \
        else                                                                                                                                      \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 \
                         "}, %" #B ", 1, 1, 1, 0;"                                                                                                \
                         : SUMS_##SUMS(0)                                                                                                         \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                   \
    }

MULTIPLY_ADD(16, 8, 8, 9, 10, 11, 12)
MULTIPLY_ADD(32, 16, 16, 17, 18, 19, 20)
MULTIPLY_ADD(64, 32, 32, 33, 34, 35, 36)
MULTIPLY_ADD(128, 64, 64, 65, 66, 67, 68)
MULTIPLY_ADD(256, 128, 128, 129, 130, 131, 132)
