// Attention of rows with one query each over paged keys and values. Launched by attention_cuda.py, which says why it is
// not written in Triton.
//
// A tile is 16 tokens of one KV head. The tiles of all rows form one sequence, which is divided by the real lengths into
// about equal ranges, one per block. A warp processes one KV head and every n-th tile of the range, and keeps its own ring
// of tiles in shared memory full. Scores are keys × query heads, so that a group of up to 8 heads fills the matrix unit.
// The warps of a head add their sums in shared memory. Blocks that share a row use device memory, where the last block to
// finish adds the parts in their order.
//
// Keys and values of 8 bits (e4m3) are multiplied in float16, which holds each of their values. A register of the matrix
// unit then takes channels that lie beside each other in memory, so that a 32-bit read brings what two registers need:
// keys and queries take their channels in the same other order, and the sums have two neighbouring channels of values.
//
// Compile-time constants: HEAD_DIM, HALF (float16 instead of bfloat16), FP8 (keys and values of 8 bits), TILES (of 8 query
// heads of one KV head), WARPS, STAGES (tiles in a ring).

constexpr bool F16 = HALF || FP8;  // what is multiplied
constexpr int TOKENS = 16, THREADS = WARPS * 32, DIM = HEAD_DIM, STEPS = DIM / 16, MERGE_ROW = DIM + 4, MAX_ROWS = 1024, LEAST = 12;  // LEAST: fewest tiles of a block, if each row has one
constexpr int BYTES = FP8 ? 1 : 2, PIECES = DIM * BYTES / 16, COPIES = TOKENS * PIECES / 32;  // COPIES: of a lane for a tile's keys
constexpr int ROWS_EACH = MAX_ROWS / THREADS, PITCH = DIM * BYTES + 16, SLOT_BYTES = 2 * TOKENS * PITCH;
constexpr unsigned FULL = 0xffffffffu;

struct Arguments {
    unsigned short* out;
    const unsigned short* q;
    const char *k, *v;
    const unsigned short* sinks;  // or null
    const int *table, *row_slots, *starts, *lens;
    float* partials;
    int* counters;
    long long page_unit;
    int table_stride, num_rows, num_kv_heads, group;
    int heads_each;    // KV heads of a block: a power of two, at most WARPS
    int whole;         // a row of up to this many tiles is not divided
    int block_shift;   // log2 of the tokens in a page
    int window;        // or 0
    int early;         // fill the ring before the preceding kernels have ended
    float scale, softcap;
};

#include "instructions.cuh"
#include "attention_instructions.cuh"
#include "attention_rows.cuh"

struct Sum {
    float4 value;
    float most, total;
};

// Adds a part, which has its own largest score, to a sum.
__device__ __forceinline__ void add(Sum& to, float4 value, float most, float total) {
    const float larger = fmaxf(to.most, most), level = larger == -infinity() ? 0.f : larger;
    const float old = power(to.most - level), fresh = power(most - level);
    to.value.x = to.value.x * old + value.x * fresh, to.value.y = to.value.y * old + value.y * fresh;
    to.value.z = to.value.z * old + value.z * fresh, to.value.w = to.value.w * old + value.w * fresh;
    to.total = to.total * old + total * fresh;
    to.most = larger;
}

__device__ __forceinline__ void finish(const Arguments& a, Sum sum, int token, int head, int dim) {
    if (a.sinks) add(sum, make_float4(0.f, 0.f, 0.f, 0.f), widen<HALF>(a.sinks[head]) * 1.4426950408889634f, 1.f);
    const float scale = sum.total == 0.f ? 0.f : 1.f / sum.total;
    const uint2 packed = make_uint2(pack<HALF>(sum.value.x * scale, sum.value.y * scale), pack<HALF>(sum.value.z * scale, sum.value.w * scale));
    *reinterpret_cast<uint2*>(a.out + (static_cast<long long>(token) * a.num_kv_heads * a.group + head) * DIM + dim) = packed;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Row* rows = reinterpret_cast<Row*>(memory);
    int* sums = reinterpret_cast<int*>(rows + a.num_rows + 1);
    volatile int* arrivals = sums + WARPS;                      // two per head
    float* stats = reinterpret_cast<float*>(sums + 4 * WARPS);  // per warp: largest scores and totals of 16 heads
    float* merge = stats + WARPS * 32;                          // per warp: its sums, [group][MERGE_ROW]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const unsigned ring = static_cast<unsigned>(__cvta_generic_to_shared(merge + WARPS * a.group * MERGE_ROW)) + warp * STAGES * SLOT_BYTES;

    release_followers();
    if (!a.early) wait_for_predecessors();
    const Line line = read_rows(a, rows, sums);
    const int begin = line.cut(blockIdx.x), end = line.cut(blockIdx.x + 1);
    if (begin >= end) {  // The launch ends when its other blocks do, so that this one need not wait unless there are none.
        if (line.num_tiles == 0) wait_for_predecessors();
        return;
    }
    const int turns = WARPS / a.heads_each, head = warp % a.heads_each, turn = warp / a.heads_each;
    const int kv_head = blockIdx.y * a.heads_each + head, threads = turns * 32, thread = turn * 32 + lane;
    const int head_bytes = DIM * BYTES;
    Feed feed = {a.k + kv_head * head_bytes, a.v + kv_head * head_bytes, static_cast<long long>(a.num_kv_heads) * head_bytes, 0, begin + turn, end, turns, 0, ring};
    feed.look_up(a, line, 0);
    bool waits[STAGES];  // whether the stage waits for the newest token
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        waits[s] = feed.send<true, false>(s, s);
        commit_copies();
    }
    unsigned query[TILES][STEPS][2], upcoming[TILES][STEPS][2];
    auto load_query = [&](unsigned (&to)[TILES][STEPS][2], int row) {
        const unsigned short* q = a.q + (static_cast<long long>(rows[row].token) * a.num_kv_heads + kv_head) * a.group * DIM + (FP8 ? 4 : 2) * t;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    to[n][s][i] = n * 8 + g < a.group ? as_factors(*reinterpret_cast<const unsigned*>(q + (n * 8 + g) * DIM + s * 16 + i * (FP8 ? 2 : 8))) : 0;
    };
    int row = line.row_of(begin);
    wait_for_predecessors();
    load_query(query, row);
#pragma unroll
    for (int s = 0; s < STAGES; ++s) feed.send<false, true>(s, s);
    commit_copies();

    const unsigned k_own = ring + (lane & 15) * PITCH + (lane >> 4) * 16;
    const unsigned v_own = FP8 ? k_own + TOKENS * PITCH : ring + (TOKENS + (lane & 7) + (lane >> 4) * 8) * PITCH + ((lane >> 3) & 1) * 16;
    int index = 0, slot = 0, at = begin + turn;
    const int pieces = a.group * (DIM / 4);
    auto part_at = [&](int block, bool began) {  // A block has at most one part that began in another block and one that began in itself.
        return a.partials + ((static_cast<long long>(kv_head) * gridDim.x + block) * 2 + began) * a.group * MERGE_ROW;
    };
    int split[2] = {-1, -1};  // divided rows of this block: one that began in another block, one that began here
    while (true) {
        const int before = rows[row].tiles_before, after = rows[row + 1].tiles_before, length = rows[row].length;
        int next_row = row + 1;
        while (next_row < a.num_rows && rows[next_row].tiles_before == rows[next_row + 1].tiles_before) ++next_row;
        const bool more = after < end;
        if (more) load_query(upcoming, next_row);
        float4 sum[TILES][STEPS];
        float most[TILES][2], total[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) sum[n][s] = make_float4(0.f, 0.f, 0.f, 0.f);
            most[n][0] = most[n][1] = -infinity();
            total[n][0] = total[n][1] = 0.f;
        }
        const int seen_from = a.window ? length - a.window : 0, tile0 = first_tile(a, length) - before;
        for (const int own_end = min(after, end); at < own_end; at += turns) {
            const int first = (tile0 + at) * TOKENS;
            bool late = false;
#pragma unroll
            for (int s = 0; s < STAGES; ++s) late |= index == s && waits[s];
            if (late)
                await_copies<0>();
            else if (index < STAGES)
                await_copies<STAGES>();
            else
                await_copies<STAGES - 1>();
            __syncwarp();
            const unsigned k_from = k_own + slot * SLOT_BYTES, v_from = v_own + slot * SLOT_BYTES;
            float4 score[TILES], odd[TILES];  // two independent chains of products
#pragma unroll
            for (int n = 0; n < TILES; ++n) score[n] = odd[n] = make_float4(0.f, 0.f, 0.f, 0.f);
            auto add_keys = [&](int s, const unsigned (&keys)[4]) {
#pragma unroll
                for (int n = 0; n < TILES; ++n) multiply_add<F16>(s & 1 ? odd[n] : score[n], keys, query[n][s][0], query[n][s][1]);
            };
#pragma unroll
            for (int s = 0; s < STEPS; s += 2 / BYTES) {
                unsigned read[4];
                load_matrices(read, k_from + s * 16 * BYTES);
                if constexpr (FP8) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const unsigned keys[4] = {widen_low(read[2 * j]), widen_low(read[2 * j + 1]), widen_high(read[2 * j]), widen_high(read[2 * j + 1])};
                        add_keys(s + j, keys);
                    }
                } else {
                    add_keys(s, read);
                }
            }
            const int low = first + g, high = low + 8;
            const bool low_seen = low < length && low >= seen_from, high_seen = high < length && high >= seen_from;
            unsigned weights[TILES][2];
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                float p[4] = {score[n].x + odd[n].x, score[n].y + odd[n].y, score[n].z + odd[n].z, score[n].w + odd[n].w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    p[i] *= a.scale;
                    if (a.softcap > 0.f) p[i] = a.softcap * 1.4426950408889634f * (1.f - 2.f / (power(2.8853900817779268f * p[i] / a.softcap) + 1.f));
                    if (!(i < 2 ? low_seen : high_seen)) p[i] = -infinity();
                }
                bool grew = false;
                float level[2], fade[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float larger = fmaxf(p[i], p[i + 2]);
                    larger = fmaxf(larger, __shfl_xor_sync(FULL, larger, 4));
                    larger = fmaxf(larger, __shfl_xor_sync(FULL, larger, 8));
                    larger = fmaxf(larger, __shfl_xor_sync(FULL, larger, 16));
                    larger = fmaxf(larger, most[n][i]);
                    level[i] = larger == -infinity() ? 0.f : larger;
                    fade[i] = power(most[n][i] - level[i]);
                    grew |= larger > most[n][i];
                    most[n][i] = larger;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) p[i] = power(p[i] - level[i & 1]);
#pragma unroll
                for (int i = 0; i < 2; ++i) total[n][i] = total[n][i] * fade[i] + p[i] + p[i + 2];
                if (__any_sync(FULL, grew)) {
#pragma unroll
                    for (int s = 0; s < STEPS; ++s) sum[n][s].x *= fade[0], sum[n][s].y *= fade[1], sum[n][s].z *= fade[0], sum[n][s].w *= fade[1];
                }
                weights[n][0] = transpose(pack<F16>(p[0], p[1]));
                weights[n][1] = transpose(pack<F16>(p[2], p[3]));
            }
            // For tokens that do not exist the ring holds stale data. A stale NaN times a weight of zero would be NaN.
            const int left = length - first - 2 * t;
            const unsigned keep_low = (left > 0 ? 0xffffu : 0u) | (left > 1 ? 0xffff0000u : 0u), keep_high = (left > 8 ? 0xffffu : 0u) | (left > 9 ? 0xffff0000u : 0u);
            auto add_values = [&](int s, const unsigned (&values)[4]) {
#pragma unroll
                for (int n = 0; n < TILES; ++n) multiply_add<F16>(sum[n][s], values, weights[n][0], weights[n][1]);
            };
#pragma unroll
            for (int s = 0; s < STEPS; s += 2 / BYTES) {
                unsigned read[4];
                load_transposed(read, v_from + s * 16 * BYTES);
                if constexpr (FP8) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        // Bytes of a register: channels 2g and 2g + 1 of one token, then of the next.
                        const unsigned low = __byte_perm(read[2 * j] & keep_low, 0, 0x3120), high = __byte_perm(read[2 * j + 1] & keep_high, 0, 0x3120);
                        const unsigned values[4] = {widen_low(low), widen_high(low), widen_low(high), widen_high(high)};
                        add_values(s + j, values);
                    }
                } else {
                    read[0] &= keep_low, read[1] &= keep_low, read[2] &= keep_high, read[3] &= keep_high;
                    add_values(s, read);
                }
            }
            __syncwarp();
            const int next = index + STAGES;
            if ((next & 31) == 0) feed.look_up(a, line, next);
            feed.send<true, true>(next, slot);
            commit_copies();
            ++index;
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }

        // The warps of this head add their sums.
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                total[n][i] += __shfl_xor_sync(FULL, total[n][i], 4);
                total[n][i] += __shfl_xor_sync(FULL, total[n][i], 8);
                total[n][i] += __shfl_xor_sync(FULL, total[n][i], 16);
                const int h = n * 8 + 2 * t + i;
                if (h >= a.group) continue;
                if (g == 0) stats[warp * 32 + h] = most[n][i], stats[warp * 32 + 16 + h] = total[n][i];
                float* to = merge + (warp * a.group + h) * MERGE_ROW + (FP8 ? 2 : 1) * g;
#pragma unroll
                for (int s = 0; s < STEPS; ++s) {
                    to[s * 16] = i ? sum[n][s].y : sum[n][s].x;
                    to[s * 16 + (FP8 ? 1 : 8)] = i ? sum[n][s].w : sum[n][s].z;
                }
            }
        meet(1 + head, threads);
        int first_block, parts;
        line.parts_of(row, first_block, parts);
        for (int e = thread; e < pieces; e += threads) {
            const int h = e / (DIM / 4), dim = e % (DIM / 4) * 4;
            Sum all = {make_float4(0.f, 0.f, 0.f, 0.f), -infinity(), 0.f};
            for (int w = 0; w < turns; ++w) {
                const int from = head + w * a.heads_each;
                add(all, *reinterpret_cast<const float4*>(merge + (from * a.group + h) * MERGE_ROW + dim), stats[from * 32 + h], stats[from * 32 + 16 + h]);
            }
            if (parts == 1) {
                finish(a, all, rows[row].token, kv_head * a.group + h, dim);
            } else {
                float* part = part_at(blockIdx.x, begin < before);
                __stcg(reinterpret_cast<float4*>(part + h * DIM + dim), all.value);
                if (dim == 0) __stcg(part + a.group * DIM + h, all.most), __stcg(part + a.group * (DIM + 1) + h, all.total);
            }
        }
        if (parts > 1) (before < begin ? split[0] : split[1]) = row;
        if (!more) break;
        meet(1 + head, threads);  // Wait before the next row overwrites the merged sums.
        row = next_row;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int s = 0; s < STEPS; ++s) query[n][s][0] = upcoming[n][s][0], query[n][s][1] = upcoming[n][s][1];
    }
    if (split[0] < 0 && split[1] < 0) return;

    // Announce the parts of divided rows once, at the end, so that nothing waits for it.
    meet(1 + head, threads);
    if (thread == 0) {
        __threadfence();
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (split[i] >= 0) arrivals[2 * head + i] = atomicAdd(a.counters + split[i] * a.num_kv_heads + kv_head, 1);
        __threadfence();
    }
    meet(1 + head, threads);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (split[i] < 0) continue;
        int first_block, parts;
        line.parts_of(split[i], first_block, parts);
        if (arrivals[2 * head + i] != parts - 1) continue;
        const int token = rows[split[i]].token;
        const bool began = line.cut(first_block) < rows[split[i]].tiles_before;
        for (int e = thread; e < pieces; e += threads) {
            const int h = e / (DIM / 4), dim = e % (DIM / 4) * 4;
            Sum all = {make_float4(0.f, 0.f, 0.f, 0.f), -infinity(), 0.f};
            for (int p = 0; p < parts; p += 8) {
                float4 value[8];
                float part_most[8], part_total[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float* part = part_at(first_block + min(p + j, parts - 1), p + j == 0 && began);
                    value[j] = __ldcg(reinterpret_cast<const float4*>(part + h * DIM + dim));
                    part_most[j] = __ldcg(part + a.group * DIM + h), part_total[j] = __ldcg(part + a.group * (DIM + 1) + h);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (p + j < parts) add(all, value[j], part_most[j], part_total[j]);
            }
            finish(a, all, token, kv_head * a.group + h, dim);
        }
        if (thread == 0) a.counters[split[i] * a.num_kv_heads + kv_head] = 0;
    }
}
