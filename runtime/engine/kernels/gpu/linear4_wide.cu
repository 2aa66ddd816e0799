// W · xᵀ with W in 4 bits, for some dozens to some hundreds of rows of x, on Hopper's matrix unit. linear4_wide.py launches it.
//
// Weights are unpacked into registers as in linear4.cu, scaled there, and are the first operand of wgmma; x is the second, from shared memory.
// wgmma fixes which elements of K meet, so `linear4_image` first writes x in the order of the codes, in tiles that lie as shared memory wants them.

constexpr int TABLE_BYTES = 256 * 32 * 4, THREADS = 256, TILE_N = 256, STAGES = 8, LAG = 4;

struct ImageArguments {
    const unsigned short* x;
    unsigned char* image;
    int num_rows, in_features, x_stride, tile_rows;
};

struct Arguments {
    const unsigned char* words;
    const float* absmax;
    const unsigned char* image;
    const unsigned short* bias;  // or null
    unsigned short* out;
    float4* partials;
    int* counters;
    int num_rows, num_outputs, num_groups, groups_each;
    unsigned short codes[16];
};

// x[m][k] to image[tile of rows][64 of K][row][16-byte cells, exclusive-or by row]: cell 2s + b holds elements 16(2b + e) + 4t + s at 2t + e.
extern "C" __global__ void __launch_bounds__(256) linear4_image(const __grid_constant__ ImageArguments a) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int k0 = blockIdx.x * 64;
    uint4* tile = reinterpret_cast<uint4*>(a.image) + (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * a.tile_rows * 8;
    const int row = blockIdx.z * 32 + (threadIdx.x >> 3), cell = threadIdx.x & 7, m = blockIdx.y * a.tile_rows + row;
    unsigned words[4] = {0, 0, 0, 0};
    if (m < a.num_rows && k0 < a.in_features) {
        const unsigned short* from = a.x + static_cast<long long>(m) * a.x_stride + k0 + (cell & 1) * 32 + (cell >> 1);
#pragma unroll
        for (int t = 0; t < 4; ++t) words[t] = from[4 * t] | static_cast<unsigned>(from[16 + 4 * t]) << 16;
    }
    tile[row * 8 + (cell ^ (row & 7))] = make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool HALF>
__device__ __forceinline__ void multiply_add(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
    if constexpr (HALF)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <bool HALF>
__device__ __forceinline__ void multiply_add(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    if constexpr (HALF)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ uint4 load_words(const unsigned char* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ float2 load_scales(const float* p) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
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

template <bool HALF>
__device__ __forceinline__ unsigned short narrow(float v) {
    unsigned short result;
    if constexpr (HALF)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(v));
    else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(v));
    return result;
}

template <bool HALF>
__device__ __forceinline__ float widen(unsigned short v) {
    float wide;
    if constexpr (HALF)
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v));
    else
        wide = __uint_as_float(static_cast<unsigned>(v) << 16);
    return wide;
}

__device__ __forceinline__ void wait_for(unsigned barrier, int phase) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier), "r"(phase) : "memory");
}

template <bool HALF, int COLUMNS>
__device__ __forceinline__ void run(const Arguments& a) {
    extern __shared__ __align__(1024) char memory[];
    constexpr int STAGE_BYTES = COLUMNS * 128, SUMS = COLUMNS / 2;
    const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
    const unsigned ring = (base + TABLE_BYTES + 1023) & ~1023u, full = ring + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
    char* ring_memory = memory + (ring - base);
    unsigned* table = reinterpret_cast<unsigned*>(memory);
    asm volatile("griddepcontrol.launch_dependents;");
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int group0 = blockIdx.z * a.groups_each, num_groups = min(a.groups_each, a.num_groups - group0), turns = 2 * num_groups;
    const int row0 = blockIdx.x * TILE_N + (warp >> 2) * 128 + (warp & 3) * 16 + g;

    uint4 low[2], high[2];
    float2 low_scale[2], high_scale[2];
    auto load = [&](int group) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned at_low = min(row0 + i * 64, a.num_outputs - 1) * a.num_groups + group0 + group;
            const unsigned at_high = min(row0 + i * 64 + 8, a.num_outputs - 1) * a.num_groups + group0 + group;
            low[i] = load_words(a.words + t * 16 + at_low * 64ull);
            high[i] = load_words(a.words + t * 16 + at_high * 64ull);
            low_scale[i] = load_scales(a.absmax + at_low * 2ull);
            high_scale[i] = load_scales(a.absmax + at_high * 2ull);
        }
    };
    load(0);
#pragma unroll 4
    for (int i = 0; i < 32; ++i) {
        const int entry = warp * 32 + i;
        table[entry * 32 + lane] = static_cast<unsigned>(a.codes[entry >> 4]) << 16 | a.codes[entry & 15];
    }
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + s * 8));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(empty + s * 8));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();
    const unsigned char* image = a.image + (static_cast<long long>(blockIdx.y) * a.num_groups * 2 + group0 * 2) * STAGE_BYTES;
    auto copy = [&](int turn) {
        const int s = turn % STAGES;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + s * 8), "r"(STAGE_BYTES) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(ring + s * STAGE_BYTES),
                     "l"(image + static_cast<long long>(turn) * STAGE_BYTES), "r"(STAGE_BYTES), "r"(full + s * 8)
                     : "memory");
    };
    if (threadIdx.x == 0)
        for (int turn = 0; turn < min(STAGES, turns); ++turn) copy(turn);

    const char* own = memory + lane * 4;
    auto values = [&](unsigned word, int byte) { return *reinterpret_cast<const unsigned*>(own + (__byte_perm(word, 0, 0x4440 | byte) << 7)); };
    float sums[2][SUMS];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < SUMS; ++j) sums[i][j] = 0.f;
    unsigned w[2][4][4];
    for (int group = 0; group < num_groups; ++group) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int turn = 2 * group + h;
            // The other four warps keep the matrix unit busy meanwhile; registers of products under way must not be written to.
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (turn >= 1 && lane == 0)
                asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + (turn - 1) % STAGES * 8) : "memory");
            if (threadIdx.x == 0 && turn >= LAG && turn - LAG + STAGES < turns) {
                wait_for(empty + (turn - LAG) % STAGES * 8, (turn - LAG) / STAGES & 1);
                copy(turn - LAG + STAGES);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const unsigned top[4] = {low[i].x, low[i].y, low[i].z, low[i].w}, bottom[4] = {high[i].x, high[i].y, high[i].z, high[i].w};
                const unsigned upper = twice<HALF>(h ? low_scale[i].y : low_scale[i].x), lower = twice<HALF>(h ? high_scale[i].y : high_scale[i].x);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    w[i][s][0] = scaled<HALF>(values(top[s], 2 * h), upper);
                    w[i][s][1] = scaled<HALF>(values(bottom[s], 2 * h), lower);
                    w[i][s][2] = scaled<HALF>(values(top[s], 2 * h + 1), upper);
                    w[i][s][3] = scaled<HALF>(values(bottom[s], 2 * h + 1), lower);
                }
            }
            if (h == 1 && group + 1 < num_groups) load(group + 1);
            wait_for(full + turn % STAGES * 8, turn / STAGES & 1);
            // 128-byte rows, eight of them 1024 bytes apart, swizzled over 128 bytes
            const unsigned long long tile = 1ull << 62 | 64ull << 32 | 1ull << 16 | ((ring + turn % STAGES * STAGE_BYTES) >> 4 & 0x3FFF);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int s = 0; s < 4; ++s)  // the compiler must not put the unpacking off until the products are under way
                    asm volatile("" : "+r"(w[i][s][0]), "+r"(w[i][s][1]), "+r"(w[i][s][2]), "+r"(w[i][s][3])::"memory");
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int i = 0; i < 2; ++i) multiply_add<HALF>(sums[i], w[i][s], tile + 2 * s);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < SUMS; ++j) asm volatile("" : "+f"(sums[i][j])::"memory");
    __syncthreads();

    if (gridDim.z > 1) {  // the last of the parts to arrive adds them up, in their order
        const int place = blockIdx.y * gridDim.x + blockIdx.x;
        float4* parts = a.partials + static_cast<long long>(place) * gridDim.z * (SUMS / 2) * THREADS + threadIdx.x;
        float4* mine = parts + static_cast<long long>(blockIdx.z) * (SUMS / 2) * THREADS;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < SUMS / 4; ++j)
                __stcg(mine + (i * (SUMS / 4) + j) * THREADS, make_float4(sums[i][4 * j], sums[i][4 * j + 1], sums[i][4 * j + 2], sums[i][4 * j + 3]));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *reinterpret_cast<volatile int*>(memory) = atomicAdd(a.counters + place, 1);
        __syncthreads();
        if (*reinterpret_cast<volatile int*>(memory) != static_cast<int>(gridDim.z) - 1) return;
        __threadfence();
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < SUMS; ++j) sums[i][j] = 0.f;
        for (int z = 0; z < gridDim.z; ++z, parts += (SUMS / 2) * THREADS)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < SUMS / 4; ++j) {
                    const float4 v = __ldcg(parts + (i * (SUMS / 4) + j) * THREADS);
                    sums[i][4 * j] += v.x, sums[i][4 * j + 1] += v.y, sums[i][4 * j + 2] += v.z, sums[i][4 * j + 3] += v.w;
                }
        if (threadIdx.x == 0) a.counters[place] = 0;
    }
    // Through shared memory, so that rows of the result are written whole.
    constexpr int STRIDE = TILE_N + 8;
    unsigned short* tile = reinterpret_cast<unsigned short*>(ring_memory);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            const int n = (warp >> 2) * 128 + i * 64 + (warp & 3) * 16 + g + c * 4, at = blockIdx.x * TILE_N + n;
            const float bias = a.bias && at < a.num_outputs ? widen<HALF>(a.bias[at]) : 0.f;
#pragma unroll
            for (int j = 0; j < SUMS / 4; ++j) {
                tile[(8 * j + 2 * t) * STRIDE + n] = narrow<HALF>(sums[i][4 * j + c] + bias);
                tile[(8 * j + 2 * t + 1) * STRIDE + n] = narrow<HALF>(sums[i][4 * j + c + 1] + bias);
            }
        }
    __syncthreads();
    const int rows = min(COLUMNS, a.num_rows - static_cast<int>(blockIdx.y) * COLUMNS), n0 = blockIdx.x * TILE_N;
    unsigned short* out = a.out + static_cast<long long>(blockIdx.y) * COLUMNS * a.num_outputs + n0;
    if (a.num_outputs % 8 == 0) {
        for (int i = threadIdx.x; i < rows * (TILE_N / 8); i += THREADS) {
            const int m = i / (TILE_N / 8), n = i % (TILE_N / 8) * 8;
            if (n0 + n < a.num_outputs)
                *reinterpret_cast<uint4*>(out + static_cast<long long>(m) * a.num_outputs + n) = *reinterpret_cast<const uint4*>(tile + m * STRIDE + n);
        }
    } else {
        for (int i = threadIdx.x; i < rows * TILE_N; i += THREADS) {
            const int m = i / TILE_N, n = i % TILE_N;
            if (n0 + n < a.num_outputs) out[static_cast<long long>(m) * a.num_outputs + n] = tile[m * STRIDE + n];
        }
    }
}

#define KERNEL(COLUMNS) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) linear4_wide_bf16_##COLUMNS(const __grid_constant__ Arguments a) { run<false, COLUMNS>(a); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) linear4_wide_f16_##COLUMNS(const __grid_constant__ Arguments a) { run<true, COLUMNS>(a); }

KERNEL(64)
KERNEL(128)
