// W · xᵀ with W in 4 bits on Hopper's matrix unit. Launched by linear4_wgmma.py, which says when it is used and how its
// work is divided.
//
// A block has two warps that fetch, one x and one W, and several warpgroups that compute, 64 rows of W each. Tensor copies
// bring weights and x into two rings in shared memory. Scales are loaded into registers one unit ahead. Codes are looked up
// in pairs in a table of 256 pairs with one copy per bank, and scaled in registers, which are the first operand of wgmma. x
// is the second. While the matrix unit works on 64 elements of K, the next 64 are unpacked.
//
// A unit is 256 elements of K of one tile of the result. Each block takes an equal range of the sequence of units. If a
// range ends inside a tile, the blocks of the tile combine their sums in global memory: of two blocks the second to finish
// adds the first's sums; of more, each adds its share of columns. A block waits for others only after it has stored all its
// own sums, and for at most PATIENCE polls. Then it exits, and the last block to finish adds its share. The result does not
// depend on the order in which blocks run.

#include "instructions.cuh"
#include "linear4_instructions.cuh"

#ifndef SMALL_BLOCKS
#define SMALL_BLOCKS false  // blocks of 32 elements with float16 scales, instead of 64 with float32
#endif

constexpr int PATIENCE = 1 << 13, STAGE_COLUMNS = 32, STAGE_STRIDE = 64 + 8;

struct Arguments {
    TensorMap words, x;
    const float* absmax;  // 8 bytes a group: two scales, or four in float16
    const unsigned short* bias;  // or null
    unsigned short* out;
    float4* partials;
    unsigned* counters;
    int num_rows, num_outputs;  // size of the result
    int num_groups;             // groups of 128 elements of K
    int gate;                   // 0: none. Else W holds rows of gate, then of up, and the result is act(gate) · up: 1 SiLU, 2 tanh GELU, 3 GELU
    int num_units;              // units of all tiles
    int tile_units;             // units of one tile
    int tiles_m;
    int x_stages, w_stages;
    unsigned short codes[16];
};

// COLUMNS: rows of x in a tile. GROUPS: warpgroups, 64 rows of W each.
template <bool HALF, int COLUMNS, int GROUPS>
__device__ __forceinline__ void run(const Arguments& a) {
    extern __shared__ __align__(1024) char memory[];
    constexpr int TILE_N = GROUPS * 64, WARPS = GROUPS * 4, THREADS = WARPS * 32, SUMS = COLUMNS / 2;
    constexpr int X_TURNS = COLUMNS <= 32 ? 4 : COLUMNS == 64 ? 2 : 1, X_TILE = COLUMNS * 128, X_BYTES = X_TILE * X_TURNS, W_BYTES = TILE_N * 128;
    constexpr int ENTRY = COLUMNS <= 32 ? 256 : 128;  // bytes between entries of the table; with 256, if there is room, one permute makes an address
    constexpr int PIECE = COLUMNS < STAGE_COLUMNS ? COLUMNS : STAGE_COLUMNS;
    const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(memory));
    const unsigned x_ring = (base + 256 * ENTRY + 1023) & ~1023u, w_ring = x_ring + a.x_stages * X_BYTES;
    const unsigned pieces = w_ring + a.w_stages * W_BYTES, x_full = pieces + GROUPS * PIECE * STAGE_STRIDE * 2, x_empty = x_full + 16 * 8;
    const unsigned w_full = x_empty + 16 * 8, w_empty = w_full + 8 * 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int unit0 = static_cast<int>(static_cast<long long>(a.num_units) * blockIdx.x / gridDim.x);
    const int unit1 = static_cast<int>(static_cast<long long>(a.num_units) * (blockIdx.x + 1) / gridDim.x);
    asm volatile("griddepcontrol.launch_dependents;");

    // Loops over units count step by step, because divisions would limit the fetching warps.
    const int tile0 = unit0 / a.tile_units, k0 = unit0 - tile0 * a.tile_units, m0 = tile0 % a.tiles_m, tile_rows = a.gate ? TILE_N / 2 : TILE_N;
    int w_k = k0, w_m = m0, w_row = tile0 / a.tiles_m * tile_rows;
    auto step = [&]() {
        if (++w_k < a.tile_units) return;
        w_k = 0;
        if (++w_m == a.tiles_m) w_m = 0, w_row += tile_rows;
    };
    auto bring_weights = [&](int stage) {
        const unsigned barrier = w_full + stage * 8, to = w_ring + stage * W_BYTES;
        expect(barrier, W_BYTES);
        copy_tile(to, a.words, w_k * 128, w_row, barrier);
        if (a.gate) copy_tile(to + W_BYTES / 2, a.words, w_k * 128, w_row + a.num_outputs, barrier);  // half a tile for gate and for up
        step();
    };
    if (warp == WARPS + 1) {
        if (lane == 0) {
            for (int i = 0; i < a.x_stages; ++i) {
                initialize(x_full + i * 8, 1);
                initialize(x_empty + i * 8, WARPS);
            }
            for (int i = 0; i < a.w_stages; ++i) {
                initialize(w_full + i * 8, 1);
                initialize(w_empty + i * 8, WARPS);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            prefetch(a.words), prefetch(a.x);
            for (int i = 0; i < min(a.w_stages, unit1 - unit0); ++i) bring_weights(i);  // No kernel writes weights: no need to wait.
        }
    } else if (warp < WARPS) {
#pragma unroll 4
        for (int entry = warp; entry < 256; entry += WARPS)
            *reinterpret_cast<unsigned*>(memory + entry * ENTRY + lane * 4) = static_cast<unsigned>(a.codes[entry >> 4]) << 16 | a.codes[entry & 15];
    }
    const int t = lane & 3, group = warp >> 2;
    const int place = (lane >> 2 & 3) << 1 | lane >> 4;  // of eight rows, in an order in which the words of 16 lanes have no bank conflicts
    const int row = warp * 16 + place;
    const int scale_row = row + (a.gate && row >= TILE_N / 2 ? a.num_outputs - TILE_N / 2 : 0), last_row = (a.gate ? 2 * a.num_outputs : a.num_outputs) - 1;
    float2 scales_ahead[2][2];  // of the next unit: [row][group]
    auto bring_scales = [&]() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float* from = a.absmax + static_cast<long long>(min(w_row + scale_row + r * 8, last_row)) * (2 * a.num_groups) + w_k * 4;
            scales_ahead[r][0] = load_scales(from);
            scales_ahead[r][1] = 2 * w_k + 1 < a.num_groups ? load_scales(from + 2) : make_float2(0.f, 0.f);
        }
        step();
    };
    if (warp < WARPS && unit0 < unit1) bring_scales();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();
    if (warp >= WARPS) {
        fewer_registers<COLUMNS, GROUPS>();
        if (lane != 0) return;
        if (warp == WARPS + 1) {
            int stage = 0, phase = 0;
            for (int unit = unit0 + a.w_stages; unit < unit1; ++unit) {
                wait_for(w_empty + stage * 8, phase);
                bring_weights(stage);
                if (++stage == a.w_stages) stage = 0, phase ^= 1;
            }
        } else if (warp == WARPS) {
            int stage = 0, phase = 1, fresh = a.x_stages, k = k0, m = m0;
            for (int unit = unit0; unit < unit1; ++unit) {
                for (int turn = 0; turn < 4; turn += X_TURNS) {
                    if (fresh)
                        --fresh;
                    else
                        wait_for(x_empty + stage * 8, phase);
                    expect(x_full + stage * 8, X_BYTES);
                    copy_tile(x_ring + stage * X_BYTES, a.x, 0, m * COLUMNS, k * 4 + turn, x_full + stage * 8);
                    if (++stage == a.x_stages) stage = 0, phase ^= 1;
                }
                if (++k == a.tile_units) {
                    k = 0;
                    if (++m == a.tiles_m) m = 0;
                }
            }
        }
        return;
    }
    more_registers<COLUMNS, GROUPS>();

    const char* own = memory + lane * 4;
    auto values = [&](unsigned word, int byte) {
        if constexpr (ENTRY == 256) return *reinterpret_cast<const unsigned*>(memory + __byte_perm(word, lane * 4, 0x5504 | byte << 4));
        return *reinterpret_cast<const unsigned*>(own + (__byte_perm(word, 0, 0x4440 | byte) << 7));
    };
    const char* words_at = memory + (w_ring - base) + row * 128;
    const int word_at = (t >> 1 ^ place) << 4 | (t & 1) << 3;
    int x_stage = 0, x_phase = 0, x_done = 0, w_at = 0, w_phase = 0;
    float sums[SUMS];
    int deferred = -1;  // a tile shared with other blocks, completed after all other work
    unsigned deferred_last = 0;
    unsigned* note = reinterpret_cast<unsigned*>(memory + (w_empty - base) + 8 * 8);
    for (int unit = unit0; unit < unit1 || deferred >= 0;) {
        int tile = deferred, stop = unit;
        bool own_sums = false;
#pragma unroll
        for (int j = 0; j < SUMS; ++j) sums[j] = 0.f;
        if (unit < unit1) {
            tile = unit / a.tile_units, stop = min(unit1, (tile + 1) * a.tile_units), own_sums = true;
            unsigned w[2][4][4];
            for (int u = unit; u < stop; ++u) {
                float2 scales[2][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) scales[i >> 1][i & 1] = scales_ahead[i >> 1][i & 1];
                if (u + 1 < unit1) bring_scales();
                wait_for(w_full + w_at * 8, w_phase);
                const char* words = words_at + w_at * W_BYTES;
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    unsigned codes[2][2][2];  // [row][half of 16 elements][even or odd code]: each byte holds two adjacent codes
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
#pragma unroll
                        for (int p = 0; p < 2; ++p) {
                            const uint2 pair = *reinterpret_cast<const uint2*>(words + r * 1024 + (word_at ^ (4 * q + 2 * p) << 4));
                            codes[r][p][0] = pair.x & 0x0f0f0f0f | pair.y << 4 & 0xf0f0f0f0;
                            codes[r][p][1] = pair.x >> 4 & 0x0f0f0f0f | pair.y & 0xf0f0f0f0;
                        }
                    }
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
#pragma unroll
                        for (int s = 0; s < 4; ++s) {
                            const int byte = 2 * h + (s >> 1), block = SMALL_BLOCKS ? byte : h;
                            const unsigned upper = twice<HALF>(scale_of<SMALL_BLOCKS>(scales[0][q], block));
                            const unsigned lower = twice<HALF>(scale_of<SMALL_BLOCKS>(scales[1][q], block));
                            w[h][s][0] = scaled<HALF>(values(codes[0][0][s & 1], byte), upper);
                            w[h][s][1] = scaled<HALF>(values(codes[1][0][s & 1], byte), lower);
                            w[h][s][2] = scaled<HALF>(values(codes[0][1][s & 1], byte), upper);
                            w[h][s][3] = scaled<HALF>(values(codes[1][1][s & 1], byte), lower);
                        }
                        const int turn = (2 * q + h) % X_TURNS;  // index among the stages that are fetched together
                        wait_for(x_full + x_stage * 8, x_phase);
                        // 128-byte rows, eight of them 1024 bytes apart, swizzled over 128 bytes
                        const unsigned long long at = 1ull << 62 | 64ull << 32 | 1ull << 16 | ((x_ring + x_stage * X_BYTES + turn * X_TILE) >> 4 & 0x3FFF);
#pragma unroll
                        for (int s = 0; s < 4; ++s)  // The compiler must not move the unpacking behind the start of the products.
                            asm volatile("" : "+r"(w[h][s][0]), "+r"(w[h][s][1]), "+r"(w[h][s][2]), "+r"(w[h][s][3])::"memory");
                        if (q == 1 && h == 0) {  // All words have been read, not only requested.
                            __syncwarp();
                            if (lane == 0) arrive(w_empty + w_at * 8);
                        }
                        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                        for (int s = 0; s < 4; ++s) multiply_add<HALF>(sums, w[h][s], at + 2 * s);
                        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // The previous products have ended: their registers and part of x are free.
                        if (turn == 0 && (h == 1 || q == 1 || u > unit)) {
                            if (lane == 0) arrive(x_empty + x_done * 8);
                            if (++x_done == a.x_stages) x_done = 0;
                        }
                        if (turn == X_TURNS - 1 && ++x_stage == a.x_stages) x_stage = 0, x_phase ^= 1;
                    }
                }
                if (++w_at == a.w_stages) w_at = 0, w_phase ^= 1;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int j = 0; j < SUMS; ++j) asm volatile("" : "+f"(sums[j])::"memory");
            if (lane == 0) arrive(x_empty + x_done * 8);
            if (++x_done == a.x_stages) x_done = 0;
        }

        // Find the tile's blocks: block b owns unit u if b is the last with num_units · b / blocks <= u.
        auto owner = [&](int u) { return static_cast<int>((static_cast<long long>(u + 1) * gridDim.x - 1) / a.num_units); };
        const int head = owner(tile * a.tile_units), parts = owner(tile * a.tile_units + a.tile_units - 1) - head + 1, part = blockIdx.x - head;
        auto slot = [&](int b) {  // A block's first range uses the first of its two slots.
            const bool first = static_cast<long long>(a.num_units) * b / gridDim.x >= tile * a.tile_units;
            return a.partials + static_cast<long long>(2 * b + (first ? 0 : 1)) * (SUMS / 4) * THREADS + threadIdx.x;
        };
        unsigned mask = ~0u;  // groups of 8 columns that this block stores
        if (parts > 1) {
            unsigned* counter = a.counters + tile;
            auto agreed = [&](unsigned v) {  // broadcasts thread 0's value
                if (threadIdx.x == 0) *note = v;
                meet(8, THREADS);
                v = *note;
                meet(8, THREADS);
                return v;
            };
            auto publish = [&]() {
                float4* mine = slot(blockIdx.x);
#pragma unroll
                for (int j = 0; j < SUMS / 4; ++j) __stcg(mine + j * THREADS, make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]));
                __threadfence();
                meet(8, THREADS);
            };
            unsigned parts_to_add;
            if (parts == 2) {  // The second block to finish adds the first's sums to its own.
                if (!agreed(threadIdx.x == 0 ? acquired(counter) : 0)) {
                    publish();
                    if (!agreed(threadIdx.x == 0 ? atomicAdd(counter, 1u) : 0)) mask = 0;
                }
                if (threadIdx.x == 0 && mask) *counter = 0;
                parts_to_add = mask ? 1u << (1 - part) : 0;
            } else {
                // Each block adds its share when all parts are stored. The counter holds the number of parts, from bit 8 on which
                // blocks exited early, and from bit 24 on how many saw all parts.
                unsigned state = 0;
                if (own_sums) {
                    publish();
                    state = agreed(threadIdx.x == 0 ? atomicAdd(counter, 1u) + 1 : 0);
                }
                if (own_sums && stop < unit1) {
                    mask = 0, deferred = tile, deferred_last = (state & 0xFF) == parts ? state : 0;
                } else {
                    unsigned last = own_sums ? ((state & 0xFF) == parts ? state : 0) : deferred_last;  // The last block to finish takes the shares of those that exited.
                    bool left = false;
                    if (threadIdx.x == 0 && !last) {
                        int polls = 0;
                        for (unsigned seen = acquired(counter); (seen & 0xFF) < parts;) {
                            if (++polls < PATIENCE) {
                                seen = acquired(counter);
                            } else {
                                const unsigned now = atomicCAS(counter, seen, seen | 0x100u << part);
                                if (now == seen) {
                                    left = true;
                                    break;
                                }
                                seen = now;
                            }
                        }
                    }
                    left = agreed(left);
                    mask = 0;
                    if (!left) {
                        for (int p = 0; p < parts; ++p)
                            if (p == part || last >> (8 + p) & 1)
                                for (int j = p; j < SUMS / 4; j += parts) mask |= 1u << j;
                        if (threadIdx.x == 0) {
                            const unsigned seen = atomicAdd(counter, 1u << 24);
                            if ((seen >> 24) + 1 + __popc(seen & 0xFFFF00) == parts) *counter = 0;
                        }
                    }
                    if (!own_sums) deferred = -1;
                }
                parts_to_add = mask ? (1u << parts) - 1 & ~(own_sums ? 1u << part : 0) : 0;
            }
            for (int p = 0; p < parts; ++p) {
                if (!(parts_to_add >> p & 1)) continue;
                const float4* from = slot(head + p);
#pragma unroll
                for (int j = 0; j < SUMS / 4; ++j)
                    if (mask >> j & 1) {
                        const float4 v = __ldcg(from + j * THREADS);
                        sums[4 * j] += v.x, sums[4 * j + 1] += v.y, sums[4 * j + 2] += v.z, sums[4 * j + 3] += v.w;
                    }
            }
        }
        unit = stop;
        if (!mask) continue;

        // Results pass through shared memory, which combines gate and up and makes writes of a row contiguous.
        constexpr int HALF_GROUPS = GROUPS / 2;
        const int pair = a.gate ? group % HALF_GROUPS : group, team = a.gate ? 256 : 128, member = a.gate ? threadIdx.x & 127 | group / HALF_GROUPS << 7 : threadIdx.x & 127;
        unsigned short* pieces_of = reinterpret_cast<unsigned short*>(memory + (pieces - base));
        unsigned short* piece = pieces_of + group * PIECE * STAGE_STRIDE;
        const unsigned short* first = pieces_of + pair * PIECE * STAGE_STRIDE;
        const unsigned short* second = first + HALF_GROUPS * PIECE * STAGE_STRIDE;
        const int n0 = tile / a.tiles_m * (a.gate ? TILE_N / 2 : TILE_N) + pair * 64, m0 = tile % a.tiles_m * COLUMNS, local = (warp & 3) * 16 + place;
        const unsigned short* own_bias = a.bias + (group == pair ? 0 : a.num_outputs);
        const float bias[2] = {a.bias && n0 + local < a.num_outputs ? widen<HALF>(own_bias[n0 + local]) : 0.f,
                               a.bias && n0 + local + 8 < a.num_outputs ? widen<HALF>(own_bias[n0 + local + 8]) : 0.f};
#pragma unroll
        for (int c = 0; c < COLUMNS; c += PIECE) {
            if (m0 + c >= a.num_rows) break;
#pragma unroll
            for (int j = 0; j < PIECE / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    piece[(8 * j + 2 * t + (i & 1)) * STAGE_STRIDE + local + (i >> 1) * 8] = narrow<HALF>(sums[(c / 8 + j) * 4 + i] + bias[i >> 1]);
            meet(1 + pair, team);
            for (int i = member; i < PIECE * 8; i += team) {
                const int column = i >> 3, n = (i & 7) * 8, m = m0 + c + column;
                if (m >= a.num_rows || !(mask >> (c + column) / 8 & 1) || n0 + n >= a.num_outputs) continue;
                unsigned short* to = a.out + static_cast<long long>(m) * a.num_outputs + n0 + n;
                uint4 eight = *reinterpret_cast<const uint4*>(first + column * STAGE_STRIDE + n);
                if (a.gate) {
                    const uint4 up = *reinterpret_cast<const uint4*>(second + column * STAGE_STRIDE + n);
                    eight = make_uint4(gated<HALF>(eight.x, up.x, a.gate), gated<HALF>(eight.y, up.y, a.gate), gated<HALF>(eight.z, up.z, a.gate), gated<HALF>(eight.w, up.w, a.gate));
                }
                if (a.num_outputs % 8 == 0) {
                    *reinterpret_cast<uint4*>(to) = eight;
                } else {
                    const unsigned twos[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        if (n0 + n + e < a.num_outputs) to[e] = static_cast<unsigned short>(twos[e >> 1] >> (e & 1) * 16);
                }
            }
            meet(1 + pair, team);
        }
    }
}

// IS_HALF: whether x is fp16 instead of bf16. Each type is compiled separately, because a compilation takes seconds.
#define KERNEL(COLUMNS, GROUPS)                                                                                                                              \
    extern "C" __global__ void __launch_bounds__(GROUPS * 128 + 128, 1) linear4_wgmma_##COLUMNS##_##GROUPS(const __grid_constant__ Arguments a) {              \
        run<IS_HALF, COLUMNS, GROUPS>(a);                                                                                                                    \
    }

KERNEL(16, 4)
KERNEL(32, 4)
KERNEL(64, 4)
KERNEL(128, 3)
KERNEL(256, 2)
