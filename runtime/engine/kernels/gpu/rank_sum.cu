// Sums rows over the ranks of a group, alone or with what follows the sum in a decoder: the addition to the residual and
// RMSNorm. Gathers rows of which each rank has some columns. Each rank writes its numbers into the other ranks' inboxes
// and reads what these have written into its own. Launched by rank_sum.py.
//
// Few numbers travel as packets: a store of 16 bytes carries two words, each beside the number of the call. Words are
// complete as soon as the number beside them is right, so numbers cross the link once and nothing follows them. More
// numbers travel plain, and after them one signal per block, which is the number of the call.
//
// Inboxes have two sets of slots, for odd and even calls. A rank that sends in call n has ended call n - 1, so it has
// received something that every other rank sent in that call. These ranks had ended call n - 2 by then, and nobody
// reads the slots of that call any more. Calls are counted in device memory, because graphs repeat launches.
//
// A block sends all of its rows before it waits, and all blocks of a launch fit the device at once, so no order of the
// blocks makes ranks wait for each other for ever. If a rank is lost, the others wait until their processes are ended.
//
// Compile-time constants: RANKS, HALF (float16, else bfloat16), BLOCKS (the most blocks of a launch), PACKET_UNITS and
// PLAIN_UNITS (how much an inbox holds from one rank). A unit is 8 bytes: 4 numbers.

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

struct Arguments {
    const uint2* in;
    uint2* out;
    uint2* residual;      // null: the result is the sum
    const uint2* weight;  // of the norm
    unsigned char* inboxes[RANKS];
    unsigned* calls;  // [BLOCKS]: calls so far, the same number for each block
    int num_rows;
    int row_units;
    int rank;
    int plus_one;  // whether the norm multiplies by 1 + weight
    float eps;
};

#include "instructions.cuh"

// What an inbox has from one rank for one call: packets, plain numbers, and a signal of each block.
struct Slots {
    uint4* packets;
    uint2* plain;
    unsigned* signals;
};

__device__ __forceinline__ Slots slots(unsigned char* inbox, int sender, unsigned call) {
    constexpr long long BYTES = 16LL * PACKET_UNITS + 8LL * PLAIN_UNITS + 4LL * BLOCKS;
    unsigned char* first = inbox + ((call & 1) * RANKS + sender) * BYTES;
    return {reinterpret_cast<uint4*>(first), reinterpret_cast<uint2*>(first + 16LL * PACKET_UNITS),
            reinterpret_cast<unsigned*>(first + 16LL * PACKET_UNITS + 8LL * PLAIN_UNITS)};
}

__device__ __forceinline__ void send(uint4* to, uint2 numbers, unsigned call) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(numbers.x), "r"(call), "r"(numbers.y), "r"(call) : "memory");
}

__device__ __forceinline__ uint4 peek(const uint4* from) {
    uint4 packet;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(packet.x), "=r"(packet.y), "=r"(packet.z), "=r"(packet.w) : "l"(from) : "memory");
    return packet;
}

__device__ __forceinline__ uint2 receive(const uint4* from, uint4 packet, unsigned call) {
    while (packet.y != call || packet.w != call) packet = peek(from);
    return make_uint2(packet.x, packet.z);
}

// Reads numbers that another rank wrote during this launch, which a cache of this multiprocessor may not know yet.
__device__ __forceinline__ uint2 load_plain(const uint2* from) {
    uint2 numbers;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(numbers.x), "=r"(numbers.y) : "l"(from) : "memory");
    return numbers;
}

// Signals every other rank that this block's plain numbers are written. All threads of the block must call it.
__device__ __forceinline__ void signal(const Arguments& a, unsigned call) {
    __syncthreads();
    if (threadIdx.x < RANKS && threadIdx.x != a.rank) {
        unsigned* to = slots(a.inboxes[threadIdx.x], a.rank, call).signals + blockIdx.x;
        asm volatile("fence.acq_rel.sys;\n\tst.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(call) : "memory");
    }
}

// Waits for the plain numbers of the same block of every other rank. All threads of the block must call it.
__device__ __forceinline__ void await(const Arguments& a, unsigned call) {
    if (threadIdx.x < RANKS && threadIdx.x != a.rank) {
        const unsigned* from = slots(a.inboxes[a.rank], threadIdx.x, call).signals + blockIdx.x;
        unsigned found;
        do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(from) : "memory");
        while (found != call);
    }
    __syncthreads();
}

// Allows the next kernel to start, waits for those before, and returns the number of this call, which is never 0, the
// number in slots that were not written yet.
__device__ __forceinline__ unsigned begin(const Arguments& a) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const unsigned call = a.calls[blockIdx.x] + 1;
    return call ? call : 2;
}

// Counts the call for this block and for those that this launch does not have.
__device__ __forceinline__ void end(const Arguments& a, unsigned call) {
    __syncthreads();
    const int block = blockIdx.x + threadIdx.x * gridDim.x;
    if (block < BLOCKS) a.calls[block] = call;
}

__device__ __forceinline__ void unpack(uint2 unit, float (&numbers)[4]) {
    numbers[0] = widen<HALF>(static_cast<unsigned short>(unit.x));
    numbers[1] = widen<HALF>(static_cast<unsigned short>(unit.x >> 16));
    numbers[2] = widen<HALF>(static_cast<unsigned short>(unit.y));
    numbers[3] = widen<HALF>(static_cast<unsigned short>(unit.y >> 16));
}

__device__ __forceinline__ uint2 pack(const float (&numbers)[4]) {
    const unsigned first = narrow<HALF>(numbers[0]), second = narrow<HALF>(numbers[1]);
    const unsigned third = narrow<HALF>(numbers[2]), fourth = narrow<HALF>(numbers[3]);
    return make_uint2(first | second << 16, third | fourth << 16);
}

__device__ __forceinline__ void round_all(float (&numbers)[4]) { unpack(pack(numbers), numbers); }

__device__ __forceinline__ float sum_of_block(float value, float* partial) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
    return sum;
}

// Each thread has up to UNITS units of a row.
template <int UNITS, bool PACKETS>
__device__ __forceinline__ void sum_rows(const Arguments& a) {
    extern __shared__ float partials[];  // [2][WARPS]
    uint2 weight[UNITS];
    if (a.residual)
#pragma unroll
        for (int k = 0; k < UNITS; ++k)
            if (const int unit = threadIdx.x + k * THREADS; unit < a.row_units) weight[k] = a.weight[unit];
    const unsigned call = begin(a);

    for (int row = blockIdx.x; row < a.num_rows; row += gridDim.x)
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = threadIdx.x + k * THREADS, at = row * a.row_units + unit;
            if (unit >= a.row_units) continue;
            const uint2 own = a.in[at];
#pragma unroll
            for (int r = 0; r < RANKS; ++r) {
                if (r == a.rank) continue;
                const Slots theirs = slots(a.inboxes[r], a.rank, call);
                if constexpr (PACKETS)
                    send(theirs.packets + at, own, call);
                else
                    theirs.plain[at] = own;
            }
        }
    if constexpr (!PACKETS) signal(a, call);

    int turn = 0;
    for (int row = blockIdx.x; row < a.num_rows; row += gridDim.x, turn ^= 1) {
        uint2 own[UNITS], before[UNITS];  // read while the numbers of the other ranks are under way
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = threadIdx.x + k * THREADS, at = row * a.row_units + unit;
            if (unit >= a.row_units) continue;
            own[k] = a.in[at];
            if (a.residual) before[k] = a.residual[at];
        }
        if (!PACKETS && row == blockIdx.x) await(a, call);
        float sums[UNITS][4];
#pragma unroll
        for (int k = 0; k < UNITS; ++k)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[k][j] = 0.f;
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
            const Slots ours = slots(a.inboxes[a.rank], r, call);
            uint4 packets[UNITS];
            if (PACKETS && r != a.rank)
#pragma unroll
                for (int k = 0; k < UNITS; ++k)
                    if (const int unit = threadIdx.x + k * THREADS; unit < a.row_units) packets[k] = peek(ours.packets + row * a.row_units + unit);
#pragma unroll
            for (int k = 0; k < UNITS; ++k) {
                const int unit = threadIdx.x + k * THREADS, at = row * a.row_units + unit;
                if (unit >= a.row_units) continue;
                uint2 part;
                if (r == a.rank)
                    part = own[k];
                else if constexpr (PACKETS)
                    part = receive(ours.packets + at, packets[k], call);
                else
                    part = load_plain(ours.plain + at);
                float numbers[4];
                unpack(part, numbers);
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[k][j] += numbers[j];
            }
        }
        if (!a.residual) {
#pragma unroll
            for (int k = 0; k < UNITS; ++k)
                if (const int unit = threadIdx.x + k * THREADS; unit < a.row_units) a.out[row * a.row_units + unit] = pack(sums[k]);
            continue;
        }
        float squares = 0.f;
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = threadIdx.x + k * THREADS, at = row * a.row_units + unit;
            if (unit >= a.row_units) continue;
            float added[4];
            unpack(before[k], added);
            round_all(sums[k]);  // where separate launches would round
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[k][j] += added[j];
            const uint2 after = pack(sums[k]);
            a.residual[at] = after;
            unpack(after, sums[k]);
#pragma unroll
            for (int j = 0; j < 4; ++j) squares += sums[k][j] * sums[k][j];
        }
        const float mean = sum_of_block(squares, partials + turn * WARPS) / (4.f * a.row_units);
        const float scale = 1.f / sqrtf(mean + a.eps);
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            const int unit = threadIdx.x + k * THREADS;
            if (unit >= a.row_units) continue;
            float factors[4];
            unpack(weight[k], factors);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[k][j] *= scale;
            if (!a.plus_one) round_all(sums[k]);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[k][j] *= a.plus_one ? 1.f + factors[j] : factors[j];
            a.out[row * a.row_units + unit] = pack(sums[k]);
        }
    }
    end(a, call);
}

#define SUM_ROWS(name, units, packets, blocks_each) \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks_each) name(const __grid_constant__ Arguments a) { sum_rows<units, packets>(a); }

SUM_ROWS(sum_packets_2, 2, true, 1)
SUM_ROWS(sum_packets_4, 4, true, 1)
SUM_ROWS(sum_plain_2, 2, false, 2)
SUM_ROWS(sum_plain_4, 4, false, 2)
SUM_ROWS(sum_plain_8, 8, false, 1)

// Puts together rows of RANKS · row_units units, of which this rank has row_units in `in`.
extern "C" __global__ void __launch_bounds__(THREADS) gather_packets(const __grid_constant__ Arguments a) {
    const unsigned call = begin(a);
    const int num_units = a.num_rows * a.row_units, first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    for (int at = first; at < num_units; at += step)
#pragma unroll
        for (int r = 0; r < RANKS; ++r)
            if (r != a.rank) send(slots(a.inboxes[r], a.rank, call).packets + at, a.in[at], call);
    for (int at = first; at < num_units; at += step) {
        const int row = at / a.row_units, column = at % a.row_units;
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
            const uint4* from = slots(a.inboxes[a.rank], r, call).packets + at;
            a.out[(static_cast<long long>(row) * RANKS + r) * a.row_units + column] = r == a.rank ? a.in[at] : receive(from, peek(from), call);
        }
    }
    end(a, call);
}
