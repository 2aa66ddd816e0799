// W · xᵀ with W in 16 bits, for up to 16 rows of x. Launched by linear16_cuda.py, which says why it is not written in
// Triton.
//
// A block owns a range of outputs (and a part of K, if there are few outputs). It loops over K in chunks, and over its rows
// in slabs per chunk. Each warp has the same columns of every slab, so that its piece of x stays in registers for the
// chunk, and keeps its sums of all slabs until the end of K. Four more warps copy slabs into a deep ring in shared memory
// and one copies x. No kernel writes weights, so the ring fills while the preceding kernels end.
//
// In the rings, the place of 16 bytes of a row depends on the row's parity and on the range of 64 elements. The eight lanes
// that read together then have no bank conflicts.

#ifndef HALF  // defaults for a build without the launcher's definitions
#define HALF false
#define GATED false
#define TILES 1
#define HEIGHT 4
#define SLABS 2
#endif

constexpr int WARPS = 8, BRINGERS = 4;           // warps that multiply; warps that copy W (one more copies x)
constexpr int COLUMNS = 256, PITCH = COLUMNS * 2;  // columns of a chunk of K; bytes of one of its rows

#include "instructions.cuh"

struct Arguments {
    const unsigned short* x;
    const unsigned short* weight;
    const unsigned short* bias;  // or null
    unsigned short* out;
    float* partials;
    int* counters;
    int num_rows, num_outputs, in_features, x_stride;
    int outputs_each;  // for each blockIdx.x
    int chunks_each;   // of K, for each blockIdx.y
    int stages;        // slabs of W in shared memory
    int x_stages;      // chunks of x there
    int activation;    // 1 silu, 2 gelu by tanh, 3 gelu
};

__device__ __forceinline__ void wait_for(unsigned barrier, int phase) {
    for (int polls = 0;; ++polls) {
        unsigned done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
        if (done) return;
        if (polls == 1 << 22) asm volatile("trap;");  // Report an error instead of blocking the GPU.
    }
}

// Copies 16 bytes that are read once.
__device__ __forceinline__ void copy_once(unsigned to, const void* from, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Makes the barrier count this thread's copies when they have arrived.
__device__ __forceinline__ void arrive_with_copies(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ unsigned long long read_once() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void let_next_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_kernels_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void meet_multipliers() {
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

__device__ __forceinline__ float activated(float g, int activation) {
    if (activation == 1) return g / (1.f + __expf(-g));
    if (activation == 2) {
        const float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
        return g / (1.f + __expf(-2.f * inner));
    }
    return 0.5f * g * (1.f + erff(g * 0.7071067811865476f));
}

__device__ __forceinline__ void add(float4& to, float4 v) {
    to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w;
}

// Stores 32 lanes' four sums of a 16 × 8 tile, which are in the order of the matrix unit. `up` is read if the layer is
// gated.
template <bool F16, bool GATE>
__device__ __forceinline__ void finish(const Arguments& a, float4 sum, float4 up, int first, int end, int tile, int lane) {
    const int row = first + (lane >> 2), m = tile * 8 + (lane & 3) * 2;
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w}, ups[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = row + (i >> 1) * 8, at = m + (i & 1);
        if (n < end && at < a.num_rows) {
            float result = sums[i] + (a.bias ? widen<F16>(a.bias[n]) : 0.f);
            if constexpr (GATE) {  // Round where separate kernels would round.
                const float factor = ups[i] + (a.bias ? widen<F16>(a.bias[a.num_outputs + n]) : 0.f);
                result = widen<F16>(narrow<F16>(activated(widen<F16>(narrow<F16>(result)), a.activation))) * widen<F16>(narrow<F16>(factor));
            }
            a.out[static_cast<long long>(at) * a.num_outputs + n] = narrow<F16>(result);
        }
    }
}

// TILE_ROWS: tiles of 8 rows of x. UP: warps along the rows of a slab of W, 16 rows each; the other warps lie along K. If
// the layer is gated, a slab has rows of gate, then of up. MOST: slabs that a block sums at once.
template <bool F16, bool GATE, int TILE_ROWS, int UP, int MOST>
__device__ __forceinline__ void run(const Arguments& a) {
    extern __shared__ __align__(1024) char memory[];
    constexpr int ROWS = UP * 16, OUTPUTS = GATE ? ROWS / 2 : ROWS;  // of a slab
    constexpr int SLICES = WARPS / UP, STEPS = COLUMNS / SLICES / 32;
    constexpr int STAGE = ROWS * PITCH, X_STAGE = TILE_ROWS * 8 * PITCH, ITEMS = UP * TILE_ROWS * 32, SUMS = SLICES * ITEMS;
    static_assert((!GATE || UP % 2 == 0) && OUTPUTS % BRINGERS == 0);
    char* x_ring = memory + a.stages * STAGE;
    float4* sums = reinterpret_cast<float4*>(x_ring + a.x_stages * X_STAGE);  // of two slabs
    int* arrived = reinterpret_cast<int*>(sums + 2 * SUMS);
    const unsigned ring_at = static_cast<unsigned>(__cvta_generic_to_shared(memory)), x_ring_at = static_cast<unsigned>(__cvta_generic_to_shared(x_ring));
    const unsigned full = static_cast<unsigned>(__cvta_generic_to_shared(arrived)) + 16, empty = full + a.stages * 8;
    const unsigned x_full = empty + a.stages * 8, x_empty = x_full + a.x_stages * 8;

    let_next_start();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int output0 = blockIdx.x * a.outputs_each, output1 = min(output0 + a.outputs_each, a.num_outputs);
    const int chunk0 = blockIdx.y * a.chunks_each, chunks = min(a.chunks_each, a.in_features / COLUMNS - chunk0);
    const int all_slabs = (output1 - output0 + OUTPUTS - 1) / OUTPUTS, passes = (all_slabs + MOST - 1) / MOST, slabs_each = (all_slabs + passes - 1) / passes;
    const int most_slabs = (a.outputs_each + OUTPUTS - 1) / OUTPUTS;  // of any block

    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; ++i) {
            initialize(full + i * 8, BRINGERS * 32);
            initialize(empty + i * 8, WARPS);
        }
        for (int i = 0; i < a.x_stages; ++i) {
            initialize(x_full + i * 8, 32);
            initialize(x_empty + i * 8, WARPS);
        }
    }
    __syncthreads();

    if (warp >= WARPS) {
        // The lanes copy a row of a chunk together.
        const int stretch = lane >> 3;
        const unsigned even = stretch * 128 + ((lane & 7) ^ stretch) * 16, odd = stretch * 128 + ((lane & 7) ^ (stretch + 4)) * 16;
        int stage = 0, phase = 1;
        if (warp == WARPS + BRINGERS) {  // copies x
            wait_for_kernels_before();
            for (int pass = 0; pass < passes; ++pass)
                for (int c = 0; c < chunks; ++c) {
                    wait_for(x_empty + stage * 8, phase);  // returns at once in the first round
                    const unsigned short* from = a.x + (chunk0 + c) * COLUMNS + lane * 8;
#pragma unroll 8
                    for (int m = 0; m < a.num_rows; ++m)
                        copy(x_ring_at + stage * X_STAGE + m * PITCH + (m & 1 ? odd : even), from + static_cast<long long>(m) * a.x_stride);
                    arrive_with_copies(x_full + stage * 8);
                    if (++stage == a.x_stages) stage = 0, phase ^= 1;
                }
            return;
        }
        const int own = warp - WARPS;  // its row of every four
        const unsigned place = own * PITCH + (own & 1 ? odd : even);
        const unsigned long long policy = read_once();
        for (int pass = 0; pass < passes; ++pass)
            for (int c = 0; c < chunks; ++c)
                for (int slab = pass * slabs_each; slab < min((pass + 1) * slabs_each, all_slabs); ++slab) {
                    wait_for(empty + stage * 8, phase);
                    const int first = output0 + slab * OUTPUTS + own, valid = output1 - first;
                    const unsigned short* from = a.weight + static_cast<long long>(first) * a.in_features + (chunk0 + c) * COLUMNS + lane * 8;
                    const unsigned to = ring_at + stage * STAGE + place;
#pragma unroll
                    for (int row = 0; row < ROWS; row += BRINGERS) {
                        const int output = row % OUTPUTS;
                        if (output < valid)
                            copy_once(to + row * PITCH, from + static_cast<long long>(row < OUTPUTS ? output : a.num_outputs + output) * a.in_features, policy);
                    }
                    arrive_with_copies(full + stage * 8);
                    if (++stage == a.stages) stage = 0, phase ^= 1;
                }
        return;
    }
    wait_for_kernels_before();

    const int tile = warp % UP, slice = warp / UP, g = lane >> 2, t = lane & 3;
    const char* w_here = memory + (tile * 16 + g) * PITCH;
    const char* x_here = x_ring + g * PITCH;
    int place[STEPS];  // place of this lane's 16 bytes of every step in a row of a chunk
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int stretch = (slice * STEPS + i) / 2, half = (slice * STEPS + i) % 2;
        place[i] = stretch * 128 + ((half * 4 + t) ^ ((g & 1) * 4 + stretch)) * 16;
    }
    constexpr bool HOLD = TILE_ROWS * STEPS <= 4;  // whether x of a chunk fits in registers
    int stage = 0, phase = 0, x_stage = 0, x_phase = 0, turn = 0;
    for (int pass = 0; pass < passes; ++pass) {
        const int slab0 = pass * slabs_each, slabs = min(slabs_each, all_slabs - slab0);
        float4 acc[MOST][TILE_ROWS];
#pragma unroll
        for (int s = 0; s < MOST; ++s)
#pragma unroll
            for (int n = 0; n < TILE_ROWS; ++n) acc[s][n] = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int c = 0; c < chunks; ++c) {
            const char* from = x_here + x_stage * X_STAGE;
            uint4 x[STEPS][TILE_ROWS];
            wait_for(x_full + x_stage * 8, x_phase);
            if constexpr (HOLD) {
#pragma unroll
                for (int i = 0; i < STEPS; ++i)
#pragma unroll
                    for (int n = 0; n < TILE_ROWS; ++n) x[i][n] = *reinterpret_cast<const uint4*>(from + n * (8 * PITCH) + place[i]);
                __syncwarp();
                if (lane == 0) arrive(x_empty + x_stage * 8);
            }
#pragma unroll
            for (int s = 0; s < MOST; ++s) {
                if (s < slabs) {
                    const char* words = w_here + stage * STAGE;
                    uint4 low[STEPS], high[STEPS];
                    wait_for(full + stage * 8, phase);
#pragma unroll
                    for (int i = 0; i < STEPS; ++i) {
                        low[i] = *reinterpret_cast<const uint4*>(words + place[i]);
                        high[i] = *reinterpret_cast<const uint4*>(words + 8 * PITCH + place[i]);
                    }
                    __syncwarp();
                    if (lane == 0) arrive(empty + stage * 8);
                    if (++stage == a.stages) stage = 0, phase ^= 1;
#pragma unroll
                    for (int i = 0; i < STEPS; ++i) {
                        const uint4 l = low[i], h = high[i];
                        const unsigned first[4] = {l.x, h.x, l.y, h.y}, second[4] = {l.z, h.z, l.w, h.w};
#pragma unroll
                        for (int n = 0; n < TILE_ROWS; ++n) {
                            const uint4 piece = HOLD ? x[i][n] : *reinterpret_cast<const uint4*>(from + n * (8 * PITCH) + place[i]);
                            multiply_add<F16>(acc[s][n], first, piece.x, piece.y);
                            multiply_add<F16>(acc[s][n], second, piece.z, piece.w);
                        }
                    }
                }
            }
            if constexpr (!HOLD) {
                __syncwarp();
                if (lane == 0) arrive(x_empty + x_stage * 8);
            }
            if (++x_stage == a.x_stages) x_stage = 0, x_phase ^= 1;
        }
#pragma unroll
        for (int s = 0; s < MOST; ++s) {
            if (s < slabs) {
                float4* parts = sums + (turn++ & 1) * SUMS;  // The other buffer may still be read.
#pragma unroll
                for (int n = 0; n < TILE_ROWS; ++n) parts[(warp * TILE_ROWS + n) * 32 + lane] = acc[s][n];
                meet_multipliers();
                auto total = [&](int item) {
                    float4 sum = parts[item];
#pragma unroll
                    for (int k = 1; k < SLICES; ++k) add(sum, parts[k * ITEMS + item]);
                    return sum;
                };
                const int slab = slab0 + s, first = output0 + slab * OUTPUTS;
                if (gridDim.y > 1) {
                    const long long place = static_cast<long long>(blockIdx.y * gridDim.x + blockIdx.x) * most_slabs + slab;
                    for (int item = threadIdx.x; item < ITEMS; item += WARPS * 32) __stcg(reinterpret_cast<float4*>(a.partials) + place * ITEMS + item, total(item));
                } else {
                    constexpr int OWN = GATE ? ITEMS / 2 : ITEMS;
                    for (int item = threadIdx.x; item < OWN; item += WARPS * 32) {
                        const float4 sum = total(item), up = GATE ? total(OWN + item) : sum;
                        finish<F16, GATE>(a, sum, up, first + item / (TILE_ROWS * 32) * 16, output1, item / 32 % TILE_ROWS, lane);
                    }
                }
            }
        }
    }
    if (gridDim.y == 1) return;
    // The last block of these outputs to finish adds the parts in their order.
    __threadfence();
    meet_multipliers();
    if (threadIdx.x == 0) *reinterpret_cast<volatile int*>(arrived) = atomicAdd(a.counters + blockIdx.x, 1);
    meet_multipliers();
    if (*reinterpret_cast<volatile int*>(arrived) != static_cast<int>(gridDim.y) - 1) return;
    __threadfence();
    constexpr int OWN = GATE ? ITEMS / 2 : ITEMS;
    const long long stride = static_cast<long long>(gridDim.x) * most_slabs * ITEMS;
    for (int i = threadIdx.x; i < all_slabs * OWN; i += WARPS * 32) {
        const int slab = i / OWN, item = i % OWN;
        const float4* from = reinterpret_cast<const float4*>(a.partials) + (static_cast<long long>(blockIdx.x) * most_slabs + slab) * ITEMS + item;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f), up = sum;
        for (int y = 0; y < static_cast<int>(gridDim.y); ++y) {
            add(sum, __ldcg(from + y * stride));
            if constexpr (GATE) add(up, __ldcg(from + y * stride + OWN));
        }
        finish<F16, GATE>(a, sum, up, output0 + slab * OUTPUTS + item / (TILE_ROWS * 32) * 16, output1, item / 32 % TILE_ROWS, lane);
    }
    if (threadIdx.x == 0) a.counters[blockIdx.x] = 0;
}

extern "C" __global__ void __launch_bounds__((WARPS + BRINGERS + 1) * 32, 1) linear16(const __grid_constant__ Arguments a) {
    run<HALF, GATED, TILES, HEIGHT, SLABS>(a);
}
