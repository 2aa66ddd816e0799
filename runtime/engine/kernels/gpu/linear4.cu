// W · xᵀ with W in 4 bits, for few rows of x. Launched by linear4_cuda.py, which says why it is not written in Triton.
//
// A byte of codes is two weights. A table in shared memory holds the 256 pairs of 16-bit values once per bank, so that the
// lanes of a warp never conflict. A warp multiplies 16 rows of W by all of x over its own range of K, and the warps of the
// same rows add their sums. x stays in registers while the block moves down its rows. Sums of 64 products are scaled in
// float32; with SMALL_BLOCKS, sums of 32 products, by float16 scales.
//
// Layout of W: checkpoint/layout_4bit.py. Word i of a group holds elements 16j + i, so that a byte holds elements 32b + i
// and 32b + 16 + i, and x is paired likewise.

constexpr int WARPS = 16, GROUP = 128, TABLE_BYTES = 256 * 32 * 4;

#include "instructions.cuh"

#ifndef SMALL_BLOCKS
#define SMALL_BLOCKS false
#endif

struct Arguments {
    const unsigned char* words;
    const float* absmax;  // 8 bytes a group: two scales, or four in float16
    const unsigned short* x;
    const unsigned short* bias;  // or null
    unsigned short* out;
    float* partials;
    int* counters;
    int num_rows, num_outputs, in_features, x_stride, num_groups;
    int groups_each;  // of K, for each blockIdx.y
    int k_warps;      // warps along K; the rest of the 16 warps lie along the rows of W
    unsigned short codes[16];
};

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

// Stores 32 lanes' four sums of one 16 × 8 tile, which are in the order of the matrix unit.
template <bool HALF>
__device__ __forceinline__ void finish(const Arguments& a, float4 sum, int block, int tile, int lane) {
    const int row = block * 16 + (lane >> 2), m = tile * 8 + (lane & 3) * 2;
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = row + (i >> 1) * 8, at = m + (i & 1);
        if (n < a.num_outputs && at < a.num_rows) {
            const float bias = a.bias ? widen<HALF>(a.bias[n]) : 0.f;
            a.out[static_cast<long long>(at) * a.num_outputs + n] = narrow<HALF>(sums[i] + bias);
        }
    }
}

__device__ __forceinline__ void add(float4& to, float4 v) {
    to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
}

// Per warp: TILES of 8 rows of x, GROUPS of 128 elements of K, and BLOCKS of 16 rows of W per iteration.
template <bool HALF, int TILES, int GROUPS, int BLOCKS>
__device__ __forceinline__ void run(const Arguments& a) {
    extern __shared__ __align__(128) char memory[];
    unsigned* table = reinterpret_cast<unsigned*>(memory);
    constexpr int SUMS = WARPS * BLOCKS * TILES * 32;
    float4* sums = reinterpret_cast<float4*>(memory + TABLE_BYTES);  // two buffers of SUMS
    float4* totals = sums + 2 * SUMS;                                // over chunks of K, if there are several

    asm volatile("griddepcontrol.launch_dependents;");
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int k_warp = warp % a.k_warps, n_warp = warp / a.k_warps, n_warps = WARPS / a.k_warps;
    const int num_blocks = (a.num_outputs + 15) / 16;
    const int first = static_cast<long long>(num_blocks) * blockIdx.x / gridDim.x;
    const int last = static_cast<long long>(num_blocks) * (blockIdx.x + 1) / gridDim.x;
    const int group0 = blockIdx.y * a.groups_each, group1 = min(group0 + a.groups_each, a.num_groups);
    const int chunk = a.k_warps * GROUPS;
    const int chunks = (group1 - group0 + chunk - 1) / chunk;
    const int step = n_warps * BLOCKS, units = (last - first + step - 1) / step;

    uint4 low[BLOCKS][GROUPS], high[BLOCKS][GROUPS];  // rows g and g + 8
    float2 low_scale[BLOCKS][GROUPS], high_scale[BLOCKS][GROUPS];
    const unsigned char* own_words = a.words + t * 16;
    auto group_of = [&](int c, int i) { return group0 + c * chunk + k_warp * GROUPS + i; };
    auto block_of = [&](int u, int b) { return first + (u * n_warps + n_warp) * BLOCKS + b; };
    auto busy = [&](int c, int u, int b, int i) {
        return group_of(c, i) < group1 && n_warp < n_warps && block_of(u, b) < last;
    };
    auto load = [&](int c, int u, int b, int i) {
        const int row = block_of(u, b) * 16 + g;
        const unsigned at_low = min(row, a.num_outputs - 1) * a.num_groups + group_of(c, i);
        const unsigned at_high = min(row + 8, a.num_outputs - 1) * a.num_groups + group_of(c, i);
        low[b][i] = load_words(own_words + at_low * 64ull);
        high[b][i] = load_words(own_words + at_high * 64ull);
        low_scale[b][i] = load_scales(a.absmax + at_low * 2ull);
        high_scale[b][i] = load_scales(a.absmax + at_high * 2ull);
    };

#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
            if (busy(0, 0, b, i)) load(0, 0, b, i);
#pragma unroll
    for (int i = 0; i < 256 / WARPS; ++i) {
        const int entry = warp * (256 / WARPS) + i;
        table[entry * 32 + lane] = static_cast<unsigned>(a.codes[entry >> 4]) << 16 | a.codes[i & 15];
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();
    const char* own = memory + lane * 4;
    auto values = [&](unsigned word, int byte) {
        return *reinterpret_cast<const unsigned*>(own + (__byte_perm(word, 0, 0x4440 | byte) << 7));
    };

    unsigned x[GROUPS][2][4][TILES][2];
    int turn = 0;
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const int m = n * 8 + g, k = group_of(c, i) * GROUP + t * 4;
                const bool valid = m < a.num_rows && group_of(c, i) < group1;
                const unsigned short* from = a.x + static_cast<long long>(m) * a.x_stride + k;
                uint2 v[8];
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    v[j] = valid && k + 16 * j < a.in_features ? *reinterpret_cast<const uint2*>(from + 16 * j) : make_uint2(0, 0);
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int p = 0; p < 2; ++p) {
                        const uint2 even = v[4 * h + 2 * p], odd = v[4 * h + 2 * p + 1];
                        x[i][h][0][n][p] = __byte_perm(even.x, odd.x, 0x5410);
                        x[i][h][1][n][p] = __byte_perm(even.x, odd.x, 0x7632);
                        x[i][h][2][n][p] = __byte_perm(even.y, odd.y, 0x5410);
                        x[i][h][3][n][p] = __byte_perm(even.y, odd.y, 0x7632);
                    }
            }
        for (int u = 0; u < units; ++u, ++turn) {
            const int next_c = u + 1 < units ? c : c + 1, next_u = u + 1 < units ? u + 1 : 0;
            float4* mine = sums + (turn & 1) * SUMS + warp * (BLOCKS * TILES * 32) + lane;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) {
                float4 acc[TILES];
#pragma unroll
                for (int n = 0; n < TILES; ++n) acc[n] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    if (busy(c, u, b, i)) {
                        const unsigned top[4] = {low[b][i].x, low[b][i].y, low[b][i].z, low[b][i].w};
                        const unsigned bottom[4] = {high[b][i].x, high[b][i].y, high[b][i].z, high[b][i].w};
                        // Bytes 2h and 2h + 1 of the words are a block of 64 elements, and each byte is a block of 32.
#pragma unroll
                        for (int j = 0; j < (SMALL_BLOCKS ? 4 : 2); ++j) {
                            float4 part[TILES];
#pragma unroll
                            for (int n = 0; n < TILES; ++n) part[n] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                            for (int s = 0; s < 4; s += SMALL_BLOCKS ? 2 : 1) {
                                const int h = SMALL_BLOCKS ? j >> 1 : j, first = SMALL_BLOCKS ? j : 2 * j, second = SMALL_BLOCKS ? j : 2 * j + 1;
                                const int s2 = SMALL_BLOCKS ? s + 1 : s;
                                const unsigned w[4] = {values(top[s], first), values(bottom[s], first), values(top[s2], second), values(bottom[s2], second)};
#pragma unroll
                                for (int n = 0; n < TILES; ++n) multiply_add<HALF>(part[n], w, x[i][h][s][n][first & 1], x[i][h][s2][n][second & 1]);
                            }
                            const float upper = scale_of<SMALL_BLOCKS>(low_scale[b][i], j), lower = scale_of<SMALL_BLOCKS>(high_scale[b][i], j);
#pragma unroll
                            for (int n = 0; n < TILES; ++n) {
                                acc[n].x += upper * part[n].x, acc[n].y += upper * part[n].y;
                                acc[n].z += lower * part[n].z, acc[n].w += lower * part[n].w;
                            }
                        }
                    }
                    if (next_c < chunks && busy(next_c, next_u, b, i)) load(next_c, next_u, b, i);
                }
#pragma unroll
                for (int n = 0; n < TILES; ++n) mine[(b * TILES + n) * 32] = acc[n];
            }
            __syncthreads();
            // Two buffers: readers of this one pass the next iteration's barrier before the iteration after that writes to it.
            const int tasks = n_warps * BLOCKS * TILES;
            for (int task = (warp - turn * tasks) & (WARPS - 1); task < tasks; task += WARPS) {
                const int n = task % TILES, b = task / TILES % BLOCKS, from = task / (TILES * BLOCKS);
                const int block = first + (u * n_warps + from) * BLOCKS + b;
                if (block >= last) continue;
                const float4* part = sums + (turn & 1) * SUMS + (from * a.k_warps * BLOCKS * TILES + b * TILES + n) * 32 + lane;
                float4 sum = part[0];
#pragma unroll 4
                for (int k = 1; k < a.k_warps; ++k) add(sum, part[k * (BLOCKS * TILES * 32)]);
                if (chunks > 1) {
                    float4* total = totals + ((block - first) * TILES + n) * 32 + lane;
                    if (c) add(sum, *total);
                    if (c + 1 < chunks) {
                        *total = sum;
                        continue;
                    }
                }
                if (gridDim.y == 1)
                    finish<HALF>(a, sum, block, n, lane);
                else
                    __stcg(reinterpret_cast<float4*>(a.partials) + ((static_cast<long long>(blockIdx.y) * num_blocks + block) * TILES + n) * 32 + lane, sum);
            }
        }
    }
    if (gridDim.y == 1) return;
    // The last block of these rows to finish adds the parts in their order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *reinterpret_cast<volatile int*>(sums) = atomicAdd(a.counters + blockIdx.x, 1);
    __syncthreads();
    if (*reinterpret_cast<volatile int*>(sums) != static_cast<int>(gridDim.y) - 1) return;
    __threadfence();
    for (int task = warp; task < (last - first) * TILES; task += WARPS) {
        const int block = first + task / TILES, tile = task % TILES;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int y = 0; y < gridDim.y; ++y)
            add(sum, __ldcg(reinterpret_cast<const float4*>(a.partials) + ((static_cast<long long>(y) * num_blocks + block) * TILES + tile) * 32 + lane));
        finish<HALF>(a, sum, block, tile, lane);
    }
    if (threadIdx.x == 0) a.counters[blockIdx.x] = 0;
}

#define KERNEL(TILES, GROUPS, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) linear4_bf16_##TILES(const __grid_constant__ Arguments a) { run<false, TILES, GROUPS, BLOCKS>(a); } \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) linear4_f16_##TILES(const __grid_constant__ Arguments a) { run<true, TILES, GROUPS, BLOCKS>(a); }

KERNEL(1, 2, 1)
KERNEL(2, 1, 2)
