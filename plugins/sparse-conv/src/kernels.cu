// Rows of visible positions on a GPU, and the maps that they are of.
//
// Rows come cell after cell, and within a cell line by line. So where a row is follows from the list of visible `cells`, and which
// row a position has from the `numbers` of the cells in that list (-1 where hidden): both serve every resolution, and no position
// has an entry in a table. Where both are null, everything is visible, in the order (B, H, W).
//
// Blocks are (lanes of channels, rows).

// Height and width of a map, in positions and in cells.
struct Map {
    const int* cells;
    const int* numbers;
    int height, width, rows, columns;
};

struct Position {
    int image, y, x;
};

__device__ __forceinline__ Position position_of(int row, const Map& map) {
    if (map.cells == nullptr) {
        const int line = row / map.width;
        return {line / map.height, line % map.height, row % map.width};
    }
    const int high = map.height / map.rows, wide = map.width / map.columns;
    const int number = row / (high * wide), within = row % (high * wide);
    const int cell = map.cells[number], line = cell / map.columns;
    return {line / map.rows, line % map.rows * high + within / wide, cell % map.columns * wide + within % wide};
}

__device__ __forceinline__ int row_of(const Position& at, const Map& map) {
    if (map.numbers == nullptr) return (at.image * map.height + at.y) * map.width + at.x;
    const int high = map.height / map.rows, wide = map.width / map.columns;
    const int number = map.numbers[(at.image * map.rows + at.y / high) * map.columns + at.x / wide];
    return number < 0 ? -1 : (number * high + at.y % high) * wide + at.x % wide;
}

__device__ __forceinline__ int own_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

// The rows of a map (B, H, W, C); `units` are those that C numbers take.
template <class U>
__device__ void pick(const U* from, const Map& map, int count, int units, U* rows) {
    const int row = own_row();
    if (row >= count) return;
    const Position at = position_of(row, map);
    const i64 place = (static_cast<i64>(at.image) * map.height + at.y) * map.width + at.x;
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x)
        rows[static_cast<i64>(row) * units + unit] = from[place * units + unit];
}

// The map (B, H, W, C) of all `count` positions, with these rows and zeros.
template <class U>
__device__ void paint(const U* rows, const Map& map, int count, int units, U* to) {
    const int place = own_row();
    if (place >= count) return;
    const int line = place / map.width;
    const int row = row_of({line / map.height, line % map.height, place % map.width}, map);
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x)
        to[static_cast<i64>(place) * units + unit] = row < 0 ? U{} : rows[static_cast<i64>(row) * units + unit];
}

// Four neighbours as one position of 4 * `channels` channels, and zeros up to 16: tensor cores want channels by eights, and images
// have three. With `border` positions of zeros above and on the left; `count` positions of `new_height` x `new_width` in all.
template <class T>
__device__ void deepen(const float* rows, const Map& map, int channels, int border, int new_height, int new_width, int count,
                       T* to) {
    constexpr int V = Pack<T>::count;
    const int place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= count) return;
    const int line = place / new_width;
    const int top = 2 * (line % new_height - border), left = 2 * (place % new_width - border);
    float deep[16] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int y = top + i / 2, x = left + i % 2;
        if (y < 0 || y >= map.height || x < 0 || x >= map.width) continue;
        const int row = row_of({line / new_height, y, x}, map);
        if (row < 0) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (c < channels) deep[i * channels + c] = rows[static_cast<i64>(row) * channels + c];
    }
#pragma unroll
    for (int first = 0; first < 16; first += V) {
        float part[V];
#pragma unroll
        for (int v = 0; v < V; ++v) part[v] = deep[first + v];
        write(to + static_cast<i64>(place) * 16 + first, part);
    }
}

// Which place of its window each output of a thread is from.
template <int V>
struct alignas(V) Taps {
    u8 at[V];
};

// Max-pool of rows: a window sees zeros at hidden positions, and nothing beyond the map's edge. Of equals the first counts, and
// NaN more than any number.
template <class T>
__device__ void max_pool(const T* x, const Map& from, const Map& to, int kernel, int stride, int padding, int count,
                         int channels, T* y, u8* taps) {
    constexpr int V = Pack<T>::count;
    const int row = own_row();
    if (row >= count) return;
    const Position at = position_of(row, to);
    for (int first = threadIdx.x * V; first < channels; first += blockDim.x * V) {
        float greatest[V];
        Taps<V> tap;
        bool begun = false;
        for (int ky = 0; ky < kernel; ++ky) {
            const int line = at.y * stride - padding + ky;
            if (line < 0 || line >= from.height) continue;
            for (int kx = 0; kx < kernel; ++kx) {
                const int column = at.x * stride - padding + kx;
                if (column < 0 || column >= from.width) continue;
                const int seen = row_of({at.image, line, column}, from);
                float value[V] = {};
                if (seen >= 0) read(x + static_cast<i64>(seen) * channels + first, value);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    if (!begun || value[v] > greatest[v] || isnan(value[v])) {
                        greatest[v] = value[v];
                        tap.at[v] = static_cast<u8>(ky * kernel + kx);
                    }
                }
                begun = true;
            }
        }
        const i64 place = static_cast<i64>(row) * channels + first;
        write(y + place, greatest);
        *reinterpret_cast<Taps<V>*>(taps + place) = tap;
    }
}

// Each input adds up, in a fixed order, what the windows that have taken it hand back.
template <class T>
__device__ void max_pool_gradient(const T* grad, const u8* taps, const Map& from, const Map& to, int kernel, int stride,
                                  int padding, int count, int channels, T* of_x) {
    constexpr int V = Pack<T>::count;
    const int row = own_row();
    if (row >= count) return;
    const Position at = position_of(row, from);
    // The outputs whose windows see it.
    const int top = max(0, (at.y + padding - kernel + stride) / stride), left = max(0, (at.x + padding - kernel + stride) / stride);
    const int bottom = min(to.height - 1, (at.y + padding) / stride), right = min(to.width - 1, (at.x + padding) / stride);
    for (int first = threadIdx.x * V; first < channels; first += blockDim.x * V) {
        float sum[V] = {};
        for (int line = top; line <= bottom; ++line) {
            for (int column = left; column <= right; ++column) {
                const int seen_by = row_of({at.image, line, column}, to);
                if (seen_by < 0) continue;
                const u8 own = (at.y + padding - line * stride) * kernel + at.x + padding - column * stride;
                const i64 place = static_cast<i64>(seen_by) * channels + first;
                const Taps<V> tap = *reinterpret_cast<const Taps<V>*>(taps + place);
                float value[V];
                read(grad + place, value);
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (tap.at[v] == own) sum[v] += value[v];
            }
        }
        write(of_x + static_cast<i64>(row) * channels + first, sum);
    }
}

#define COPIES(U, bytes)                                                                                                    \
    extern "C" __global__ void pick_##bytes(const U* from, const int* cells, int height, int width, int rows, int columns,  \
                                            int count, int units, U* to) {                                                  \
        pick(from, {cells, nullptr, height, width, rows, columns}, count, units, to);                                       \
    }                                                                                                                       \
    extern "C" __global__ void paint_##bytes(const U* from, const int* numbers, int height, int width, int rows,            \
                                             int columns, int count, int units, U* to) {                                    \
        paint(from, {nullptr, numbers, height, width, rows, columns}, count, units, to);                                    \
    }

COPIES(uint4, 16)
COPIES(u32, 4)
COPIES(u16, 2)

#define DEEPEN(T, kind)                                                                                                     \
    extern "C" __global__ void deepen_##kind(const float* rows, const int* numbers, int height, int width, int lines,       \
                                             int columns, int channels, int border, int new_height, int new_width,          \
                                             int count, T* to) {                                                            \
        deepen(rows, {nullptr, numbers, height, width, lines, columns}, channels, border, new_height, new_width, count,     \
               to);                                                                                                         \
    }

DEEPEN(float, f32)
DEEPEN(bf16, bf16)

#define POOLS(T, kind)                                                                                                      \
    extern "C" __global__ void max_pool_##kind(const T* x, const int* cells, const int* numbers, int rows, int columns,     \
                                               int height, int width, int new_height, int new_width, int kernel,            \
                                               int stride, int padding, int count, int channels, T* y, u8* taps) {          \
        max_pool(x, {cells, numbers, height, width, rows, columns}, {cells, numbers, new_height, new_width, rows, columns}, \
                 kernel, stride, padding, count, channels, y, taps);                                                        \
    }                                                                                                                       \
    extern "C" __global__ void max_pool_gradient_##kind(                                                                    \
        const T* grad, const u8* taps, const int* cells, const int* numbers, int rows, int columns, int height, int width,  \
        int new_height, int new_width, int kernel, int stride, int padding, int count, int channels, T* of_x) {             \
        max_pool_gradient(grad, taps, {cells, numbers, height, width, rows, columns},                                       \
                          {cells, numbers, new_height, new_width, rows, columns}, kernel, stride, padding, count, channels, \
                          of_x);                                                                                            \
    }

POOLS(float, f32)
POOLS(bf16, bf16)
