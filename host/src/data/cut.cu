// Boxes of many images, each resized to size × size: first the rows of the views, then their columns, with 8 bits in between.
//
// A slot of `pixels` has the pixels of one image, red, green and blue side by side. `places` says where in its slot each box
// begins, how many pixels lie in a row there, how many columns the box has, and how many bits of its weights are behind the point,
// for rows and for columns. `starts` and `weights` are those of each row, or column, of each view. Weights of nothing
// stand for pixels that may not exist.

#define PLACE 5

__device__ __forceinline__ u8 rounded(int sum, int precision) {
    const int value = sum >> precision;
    return static_cast<u8>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Adds up pixels that lie `step` bytes apart, each times its weight.
__device__ __forceinline__ void weigh(const u8* first, i64 step, const short* weights, int taps, int precision, u8 (&out)[3]) {
    int red = 1 << (precision - 1), green = red, blue = red;
    for (int tap = 0; tap < taps; ++tap) {
        const int weight = weights[tap];
        if (weight != 0) {
            const u8* pixel = first + tap * step;
            red += weight * pixel[0];
            green += weight * pixel[1];
            blue += weight * pixel[2];
        }
    }
    out[0] = rounded(red, precision);
    out[1] = rounded(green, precision);
    out[2] = rounded(blue, precision);
}

// To `out`, (images, size, widest, 3). A block's y is an image, and its threads go over the pixels.
extern "C" __global__ void cut_rows(const u8* pixels, const int* places, const int* starts, const short* weights, int slot,
                                    int size, int widest, int taps, u8* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, image = blockIdx.y;
    const int y = i / widest, x = i % widest;
    const int* place = places + image * PLACE;
    if (y >= size || x >= place[2]) return;
    const i64 row = static_cast<i64>(image) * size + y, step = 3 * static_cast<i64>(place[1]);
    const u8* first = pixels + static_cast<i64>(image) * slot + place[0] + starts[row] * step + 3 * x;
    u8 made[3];
    weigh(first, step, weights + row * taps, taps, place[3], made);
    u8* to = out + (row * widest + x) * 3;
    for (int channel = 0; channel < 3; ++channel) to[channel] = made[channel];
}

// From there to `out`, (images, 3, size, size).
extern "C" __global__ void cut_columns(const u8* rows, const int* places, const int* starts, const short* weights, int size,
                                       int widest, int taps, u8* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, image = blockIdx.y;
    const int y = i / size, x = i % size;
    if (y >= size) return;
    const i64 column = static_cast<i64>(image) * size + x;
    const u8* first = rows + ((static_cast<i64>(image) * size + y) * widest + starts[column]) * 3;
    u8 made[3];
    weigh(first, 3, weights + column * taps, taps, places[image * PLACE + 4], made);
    for (int channel = 0; channel < 3; ++channel) {
        out[((static_cast<i64>(image) * 3 + channel) * size + y) * size + x] = made[channel];
    }
}
