// y += B · h of LoRA adapters, or act(gate) × up of y with B · h added. Launched by adapters_cuda.py after a shrink.
//
// A warp has 32 outputs (of gate and of up, if GATED) and 16 rows at a time, which it multiplies by the matrix unit. The outputs
// of a tile are dealt out so that each lane has eight neighbours of a row, which it reads and writes at once: y is most of the
// traffic. The upload, the table and B were written before the step began, so they are read before the kernels before this one
// have ended.

#include "instructions.cuh"

#ifndef HALF  // defaults for a build without the launcher's definitions
#define HALF false
#define GATED true
#endif

constexpr int WARPS = 8, MODULES = 3, RANKS = 16, OUTPUTS = 32, TURN = GATED ? 1 : 2;  // TURN: tiles of 16 rows whose y is on the way at once

struct Arguments {
    unsigned short* y;
    unsigned short* out;           // of GATED
    const float* hidden;           // the parts of h [max_rank / 16, num_parts, rows in the order of the chunks, num_modules, 16]
    const int* upload;             // kernels/inputs.py
    const long long* places;       // [slots, table_modules, 3]: where A and B begin in `memory`, and the rank
    const unsigned short* memory;
    int y_stride, num_rows, num_parts, num_outputs;  // outputs of y, or of `out`
    int word;                      // the header word of the upload with the number of chunks
    int table_modules, first_module, num_modules;
    int activation;                // 1 silu, 2 gelu by tanh, 3 gelu
    int widths[MODULES];           // outputs of each module
};

__device__ __forceinline__ float activated(float g, int activation) {
    if (activation == 1) return __fdividef(g, 1.f + __expf(-g));
    if (activation == 2) {
        const float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
        return __fdividef(g, 1.f + __expf(-2.f * inner));
    }
    return 0.5f * g * (1.f + erff(g * 0.7071067811865476f));
}

// One module of a chunk, as the lanes need it: `b` is this lane's first output, at its four ranks.
struct Matrix {
    const unsigned short* b;
    int rank, module;
};

template <bool F16>
__device__ __forceinline__ unsigned packed(float low, float high) {
    return static_cast<unsigned>(narrow<F16>(low)) | static_cast<unsigned>(narrow<F16>(high)) << 16;
}

// Loads 16 ranks of 32 outputs, from rank `r` on.
__device__ __forceinline__ void load_b(uint2 (&b)[4], const Matrix& m, int r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = r < m.rank ? __ldg(reinterpret_cast<const uint2*>(m.b + 2ll * j * m.rank + r)) : make_uint2(0, 0);
}

// Adds 32 outputs of 16 rows, whose places in the order are `first` (of this lane's lower row) and `first + 8`. `b`: the first 16 ranks.
template <bool F16>
__device__ __forceinline__ void multiply(float4 (&sums)[4], const Arguments& a, const Matrix& m, const uint2 (&b)[4], int first, bool low, bool high, int t) {
    const long long row = a.num_modules * RANKS, part = row * a.num_rows;
    const float* from = a.hidden + first * row + m.module * RANKS + t * 4;
    uint2 now[4] = {b[0], b[1], b[2], b[3]};
#pragma unroll 1
    for (int r = 0; r < m.rank; r += RANKS) {
        if (r) load_b(now, m, r);
        float4 h[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
        const float* at = from + r / RANKS * (part * a.num_parts);
#pragma unroll 2
        for (int p = 0; p < a.num_parts; ++p, at += part) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (i ? high : low) {
                    const float4 v = *reinterpret_cast<const float4*>(at + i * 8 * row);
                    h[i].x += v.x, h[i].y += v.y, h[i].z += v.z, h[i].w += v.w;
                }
        }
        const unsigned rows[4] = {packed<F16>(h[0].x, h[0].y), packed<F16>(h[1].x, h[1].y), packed<F16>(h[0].z, h[0].w), packed<F16>(h[1].z, h[1].w)};
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<F16>(sums[j], rows, now[j].x, now[j].y);
    }
}

// Returns eight outputs of a row with the sums added. `top`: whether they are those of the upper row of `sums`.
template <bool F16>
__device__ __forceinline__ uint4 added(uint4 y, const float4 (&sums)[4], bool top) {
    auto two = [top](unsigned pair, float4 sum) {
        return packed<F16>(widen<F16>(static_cast<unsigned short>(pair)) + (top ? sum.z : sum.x), widen<F16>(static_cast<unsigned short>(pair >> 16)) + (top ? sum.w : sum.y));
    };
    return make_uint4(two(y.x, sums[0]), two(y.y, sums[1]), two(y.z, sums[2]), two(y.w, sums[3]));
}

// Returns act(gate) × up of two outputs, rounded where separate kernels would round.
template <bool F16>
__device__ __forceinline__ unsigned gated(unsigned gate, unsigned up, int activation) {
    auto one = [activation](unsigned short g, unsigned short u) { return widen<F16>(narrow<F16>(activated(widen<F16>(g), activation))) * widen<F16>(u); };
    return packed<F16>(one(static_cast<unsigned short>(gate), static_cast<unsigned short>(up)), one(static_cast<unsigned short>(gate >> 16), static_cast<unsigned short>(up >> 16)));
}

template <bool F16, bool GATE>
__device__ __forceinline__ void run(const Arguments& a) {
    asm volatile("griddepcontrol.launch_dependents;");
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, n0 = (blockIdx.y * WARPS + (threadIdx.x >> 5)) * OUTPUTS;
    const int num_chunks = n0 < a.num_outputs ? a.upload[a.word] : 0;
    const int *chunks = a.upload + a.upload[a.word + 1], *order = a.upload + a.upload[a.word + 2];
    int module = 0, column = n0;
    if (!GATE)
        while (module + 1 < a.num_modules && column >= a.widths[module]) column -= a.widths[module++];
    const int output = column + (g >> 1) * 8 + (g & 1);  // of this lane's part of B, and two further for each tile
    constexpr int SIDES = GATE ? 2 : 1;
    for (int c = blockIdx.x; c < num_chunks; c += gridDim.x) {
        const int slot = chunks[3 * c], begin = chunks[3 * c + 1], count = chunks[3 * c + 2];
        if (!GATE && slot < 0) break;  // Chunks without an adapter come last.
        Matrix sides[SIDES];
        uint2 b[SIDES][4];
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            const bool is_own = side && a.num_modules == 2;  // Up has an A of its own.
            const long long* place = a.places + (static_cast<long long>(max(slot, 0)) * a.table_modules + a.first_module + module + is_own) * 3;
            const int rank = slot < 0 ? 0 : static_cast<int>(place[2]);
            sides[side] = {a.memory + place[1] + static_cast<long long>(output + (side && !is_own ? a.num_outputs : 0)) * rank + t * 4, rank, module + is_own};
            load_b(b[side], sides[side], 0);
        }
        asm volatile("griddepcontrol.wait;" ::: "memory");  // Returns at once from the second chunk on.
#pragma unroll 1
        for (int base = 0; base < count; base += 16 * TURN) {
            uint4 y[TURN][2][SIDES];
            int token[TURN][2];
#pragma unroll
            for (int n = 0; n < TURN; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = base + n * 16 + i * 8 + g;
                    token[n][i] = at < count ? order[begin + at] : -1;
#pragma unroll
                    for (int side = 0; side < SIDES; ++side)
                        if (at < count) y[n][i][side] = __ldcg(reinterpret_cast<const uint4*>(a.y + static_cast<long long>(token[n][i]) * a.y_stride + side * a.num_outputs + n0 + t * 8));
                }
#pragma unroll
            for (int n = 0; n < TURN; ++n) {
                if (base + n * 16 >= count) break;
#pragma unroll
                for (int side = 0; side < SIDES; ++side) {
                    float4 sums[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[j] = make_float4(0.f, 0.f, 0.f, 0.f);
                    multiply<F16>(sums, a, sides[side], b[side], begin + base + n * 16 + g, token[n][0] >= 0, token[n][1] >= 0, t);
#pragma unroll
                    for (int i = 0; i < 2; ++i) y[n][i][side] = added<F16>(y[n][i][side], sums, i);
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (token[n][i] < 0) continue;
                    const uint4 first = y[n][i][0], second = y[n][i][SIDES - 1];
                    if constexpr (GATE)
                        *reinterpret_cast<uint4*>(a.out + static_cast<long long>(token[n][i]) * a.num_outputs + n0 + t * 8) =
                            make_uint4(gated<F16>(first.x, second.x, a.activation), gated<F16>(first.y, second.y, a.activation), gated<F16>(first.z, second.z, a.activation), gated<F16>(first.w, second.w, a.activation));
                    else
                        *reinterpret_cast<uint4*>(a.y + static_cast<long long>(token[n][i]) * a.y_stride + n0 + t * 8) = first;
                }
            }
        }
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) adapters_expand(const __grid_constant__ Arguments a) {
    run<HALF, GATED>(a);
}
