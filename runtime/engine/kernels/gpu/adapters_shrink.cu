// h = A · x of LoRA adapters for few rows of x. Launched by adapters_cuda.py, which says why it is not written in Triton.
//
// A warp has one module of one chunk of rows (kernels/adapters.py) over a part of K. The last warp to finish its part adds the
// parts in their order. Everything stays in registers, so that blocks run beside those of the base's product of the same x,
// whose rings fill shared memory.

#include "instructions.cuh"

#ifndef HALF  // a default for a build without the launcher's definition
#define HALF false
#endif

constexpr int WARPS = 2, RANKS = 16, STEPS = 4, UNIT = STEPS * 32;  // UNIT: columns that a warp has on the way at once

struct Arguments {
    const unsigned short* x;
    float* parts;                  // [parts of all groups, max_rank / 16, 16 tokens, 16 ranks]
    float* hidden;                 // h [max_rank / 16, rows in the order of the chunks, num_modules, 16]
    int* counters;                 // finished parts of each group, zeros
    const int* upload;             // kernels/inputs.py
    const long long* places;       // [slots, table_modules, 3]: where A and B begin in `memory`, and the rank
    const unsigned short* memory;
    int x_stride, in_features, num_rows, most_parts;
    int word;                      // the header word of the upload with the number of chunks
    int table_modules, first_module, num_modules, max_rank;
};

__device__ __forceinline__ float4 from_lane(float4 v, int lane) {
    return make_float4(__shfl_sync(0xffffffffu, v.x, lane), __shfl_sync(0xffffffffu, v.y, lane), __shfl_sync(0xffffffffu, v.z, lane), __shfl_sync(0xffffffffu, v.w, lane));
}

__device__ __forceinline__ void wait_for_kernels_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void add(float4& to, float4 v) {
    to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
}

// Adds 16 ranks by up to 16 tokens over `units` units of columns to `acc`. A lane reads the same columns of A and of x, so that both are in
// the order of the matrix unit. A token that is absent has a null pointer.
template <bool F16>
__device__ __forceinline__ void multiply(float4 (&acc)[2], const unsigned short* a_low, const unsigned short* a_high, const unsigned short* const (&x)[2], int units) {
    uint4 low[STEPS], high[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        low[i] = __ldg(reinterpret_cast<const uint4*>(a_low + i * 32));
        high[i] = __ldg(reinterpret_cast<const uint4*>(a_high + i * 32));
    }
    wait_for_kernels_before();  // They write x. From the second time on this returns at once.
    const bool is_long = __any_sync(0xffffffffu, x[1] != nullptr);
    for (int unit = 0; unit < units; ++unit) {
        uint4 piece[2][STEPS];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < STEPS; ++i)
                piece[n][i] = x[n] ? __ldcg(reinterpret_cast<const uint4*>(x[n] + unit * UNIT + i * 32)) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const unsigned first[4] = {low[i].x, high[i].x, low[i].y, high[i].y}, second[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
            if (unit + 1 < units) {
                low[i] = __ldg(reinterpret_cast<const uint4*>(a_low + (unit + 1) * UNIT + i * 32));
                high[i] = __ldg(reinterpret_cast<const uint4*>(a_high + (unit + 1) * UNIT + i * 32));
            }
#pragma unroll
            for (int n = 0; n < 2; ++n)
                if (n == 0 || is_long) {
                    multiply_add<F16>(acc[n], first, piece[n][i].x, piece[n][i].y);
                    multiply_add<F16>(acc[n], second, piece[n][i].z, piece[n][i].w);
                }
        }
    }
}

template <bool F16>
__device__ __forceinline__ void run(const Arguments& a) {
    asm volatile("griddepcontrol.launch_dependents;");
    const int lane = threadIdx.x & 31, task = (threadIdx.x >> 5) * gridDim.x + blockIdx.x, tasks = gridDim.x * WARPS;
    const int num_chunks = a.upload[a.word];
    const int *chunks = a.upload + a.upload[a.word + 1], *order = a.upload + a.upload[a.word + 2];
    int live = 0;  // chunks that have an adapter; the others come last
    for (int c = 0; c < num_chunks; c += 32) live += __popc(__ballot_sync(0xffffffffu, c + lane < num_chunks && chunks[3 * (c + lane)] >= 0));
    const int groups = live * a.num_modules, units = a.in_features / UNIT;
    const int most = max(1, min(a.most_parts, tasks / max(groups, 1))), units_each = (units + most - 1) / most, parts = (units + units_each - 1) / units_each;
    if (task >= groups * parts) {
        wait_for_kernels_before();
        return;
    }
    const int group = task / parts, part = task % parts, chunk = group / a.num_modules, module = group % a.num_modules;
    const int begin = chunks[3 * chunk + 1], count = chunks[3 * chunk + 2], g = lane >> 2, t = lane & 3;
    const long long* place = a.places + (static_cast<long long>(chunks[3 * chunk]) * a.table_modules + a.first_module + module) * 3;
    const int rank = static_cast<int>(place[2]), rank_blocks = a.max_rank / RANKS, column = part * units_each * UNIT + t * 8;
    const unsigned short* x[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
        x[n] = n * 8 + g < count ? a.x + static_cast<long long>(order[begin + n * 8 + g]) * a.x_stride + column : nullptr;
    float* sums = a.parts + static_cast<long long>(task) * rank_blocks * (16 * RANKS);
    for (int r = 0; r < rank; r += RANKS) {
        float4 acc[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
        const unsigned short* a_low = a.memory + place[0] + static_cast<long long>(r + g) * a.in_features + column;
        multiply<F16>(acc, a_low, a_low + 8ll * a.in_features, x, min(units_each, units - part * units_each));
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // 16 ranks × 8 tokens
            float* tile = sums + r * 16 + (n * 8 + t * 2) * RANKS + g;
            __stcg(tile, acc[n].x);
            __stcg(tile + RANKS, acc[n].y);
            __stcg(tile + 8, acc[n].z);
            __stcg(tile + RANKS + 8, acc[n].w);
        }
    }
    wait_for_kernels_before();  // also if the rank is 0
    __threadfence();
    __syncwarp();
    int arrived = 0;
    if (lane == 0) arrived = atomicAdd(a.counters + group, 1);
    if (__shfl_sync(0xffffffffu, arrived, 0) != parts - 1) return;
    __threadfence();
    if (lane == 0) a.counters[group] = 0;
    sums -= static_cast<long long>(part) * rank_blocks * (16 * RANKS);
    // Four ranks of a token are an item. With few items, several lanes share one.
    int sharing = 1;
    while (count * (RANKS / 4) * sharing <= 16) sharing *= 2;
    for (int r = 0; r < rank; r += RANKS)
        for (int item0 = 0; item0 < count * (RANKS / 4); item0 += 32 / sharing) {
            const int item = item0 + lane / sharing;
            const bool valid = item < count * (RANKS / 4);
            const float4* from = reinterpret_cast<const float4*>(sums + r * 16) + item;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
            for (int p = lane % sharing; p < (valid ? parts : 0); p += sharing) add(sum, __ldcg(from + static_cast<long long>(p) * rank_blocks * (4 * RANKS)));
            for (int other = 1; other < sharing; other *= 2) add(sum, from_lane(sum, lane ^ other));
            if (!valid || lane % sharing) continue;
            float* to = a.hidden + ((static_cast<long long>(r / RANKS) * a.num_rows + begin + item / 4) * a.num_modules + module) * RANKS + item % 4 * 4;
            *reinterpret_cast<float4*>(to) = sum;
        }}

extern "C" __global__ void __launch_bounds__(WARPS * 32) adapters_shrink(const __grid_constant__ Arguments a) {
    run<HALF>(a);
}
