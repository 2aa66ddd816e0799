// Describes the rows of a batch, the division of their tiles into blocks, and how a warp's tiles reach its ring.

__device__ __forceinline__ int first_tile(const Arguments& a, int length) {
    return a.window ? max(length - a.window, 0) / TOKENS : 0;
}

// One row, in shared memory.
struct Row {
    int tiles_before, length, token, slot;
};

// The sequence of the rows' tiles and where it is divided. A short row is never divided, and a long one not near its ends,
// because one more part costs more time than a somewhat longer range.
struct Line {
    const Row* rows;
    int num_rows, num_tiles, num_blocks, whole;

    __device__ __forceinline__ int row_of(int tile) const {
        int low = 0, high = num_rows;
        while (low < high) {
            const int middle = (low + high) >> 1;
            if (rows[middle].tiles_before <= tile)
                low = middle + 1;
            else
                high = middle;
        }
        return low - 1;
    }

    __device__ __forceinline__ int margin(int tiles) const {
        return (min(tiles, num_tiles / num_blocks) - 1) / 2;
    }

    // Returns where block `index` begins.
    __device__ __forceinline__ int cut(int index) const {
        if (index >= num_blocks) return num_tiles;
        const int at = static_cast<int>(static_cast<long long>(index) * num_tiles / num_blocks), row = row_of(at);
        const int before = at - rows[row].tiles_before, after = rows[row + 1].tiles_before - at, tiles = before + after;
        if (tiles <= whole) return before < after ? at - before : at + after;
        return before <= margin(tiles) ? at - before : after <= margin(tiles) ? at + after : at;
    }

    // Returns the first block with a part of a row, and the number of such blocks.
    __device__ __forceinline__ void parts_of(int row, int& first_block, int& parts) const {
        const int begin = rows[row].tiles_before, end = rows[row + 1].tiles_before;
        first_block = 0, parts = 1;
        if (end - begin <= whole) return;
        const long long low = begin + margin(end - begin) + 1, high = end - margin(end - begin);  // divisions from low to high - 1 are in the row
        const int first = static_cast<int>((low * num_blocks + num_tiles - 1) / num_tiles), past = static_cast<int>((high * num_blocks + num_tiles - 1) / num_tiles);
        first_block = first - 1, parts = past - first + 1;
    }
};

// Reads the rows and the sequence of their tiles. Every thread must call it.
__device__ __forceinline__ Line read_rows(const Arguments& a, Row* rows, int* sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, each = (a.num_rows + THREADS - 1) / THREADS;
    int tiles[ROWS_EACH], own = 0;
#pragma unroll
    for (int j = 0; j < ROWS_EACH; ++j) {
        const int row = threadIdx.x * each + j;
        tiles[j] = 0;
        if (j < each && row < a.num_rows) {
            const int length = a.lens[row], token = a.starts[row], next = a.starts[row + 1], slot = a.row_slots[row];
            if (next > token) tiles[j] = (length + TOKENS - 1) / TOKENS - first_tile(a, length);
            rows[row].length = length, rows[row].token = token, rows[row].slot = slot;
        }
        own += tiles[j];
    }
    int before = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(FULL, before, d);
        if (lane >= d) before += other;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    before -= own;
    int total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
    }
#pragma unroll
    for (int j = 0; j < ROWS_EACH; ++j) {
        const int row = threadIdx.x * each + j;
        if (j < each && row < a.num_rows) rows[row].tiles_before = before;
        before += tiles[j];
    }
    if (threadIdx.x == 0) rows[a.num_rows].tiles_before = total;
    const int busy = __syncthreads_count(own > 0);  // number of rows with tiles, of up to THREADS rows
    const int blocks = min(static_cast<int>(gridDim.x), max(busy, total / LEAST));
    return {rows, a.num_rows, total, max(blocks, 1), a.whole};
}

// A warp's tiles, `stride` apart, and their copies into its ring. The pages of 32 tiles are looked up at a time, one per
// lane.
struct Feed {
    const char *k, *v;  // of this warp's head
    long long token_stride, offset;  // in bytes
    int begin, end, stride, newest;  // newest: index of the row's last token, relative to the tile's first
    unsigned ring;

    __device__ __forceinline__ void look_up(const Arguments& a, const Line& line, int index) {
        const int at = begin + (index + static_cast<int>(threadIdx.x & 31)) * stride;
        if (at >= end) return;
        const Row& row = line.rows[line.row_of(at)];
        const int first = (first_tile(a, row.length) + at - row.tiles_before) * TOKENS;
        const long long page = a.table[static_cast<long long>(row.slot) * a.table_stride + (first >> a.block_shift)];
        offset = page * a.page_unit * BYTES + (first & ((1 << a.block_shift) - 1)) * token_stride;
        newest = row.length - 1 - first;
    }

    // Starts copying the tokens of a tile: those of earlier steps, that of this step, or all.
    template <bool EARLIER, bool NEWEST>
    __device__ __forceinline__ bool send(int index, int slot) {
        const long long from = __shfl_sync(FULL, offset, index & 31);
        const int last = __shfl_sync(FULL, newest, index & 31);
        if (begin + index * stride >= end || (!EARLIER && last >= TOKENS)) return false;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int piece = i * 32 + (threadIdx.x & 31), token = piece / PIECES, column = piece % PIECES;
            const unsigned to = ring + slot * SLOT_BYTES + token * PITCH + column * 16;
            const long long at = from + token * token_stride + column * 16;
            if ((EARLIER && token < last) || (NEWEST && token == last)) {
                copy_piece(to, k + at);
                copy_piece(to + TOKENS * PITCH, v + at);
            }
        }
        return last < TOKENS;
    }
};
