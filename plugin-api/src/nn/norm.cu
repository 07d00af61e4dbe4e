// Batch norm over rows (N, C) of channels, with the ReLU and the sum that follow it, in as few passes over memory as there are:
// two forward, two backward.
//
// A thread has 16 bytes of channels, and goes through rows. Blocks are (lanes of channels, rows); parts of the rows go to blocks
// along y. Sums are added up in a fixed order, so the same numbers give the same result.

constexpr int kThreads = 256;

// Adds up `sums` of all threads of a block that have the same channels: the block's part is (K, C) in `parts`.
template <int K, int V>
__device__ __forceinline__ void add_rows(const float (&sums)[K][V], int channels, float* parts) {
    __shared__ float all[K * V * kThreads];
    const int wide = blockDim.x, high = blockDim.y;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) all[((k * V + v) * high + threadIdx.y) * wide + threadIdx.x] = sums[k][v];
    __syncthreads();
    for (int i = threadIdx.y * wide + threadIdx.x; i < K * V * wide; i += wide * high) {
        const int lane = i % wide, number = i / wide;
        float sum = 0;
        for (int row = 0; row < high; ++row) sum += all[(number * high + row) * wide + lane];
        const int channel = (blockIdx.x * wide + lane) * V + number % V;
        if (channel < channels) parts[(static_cast<i64>(blockIdx.y) * K + number / V) * channels + channel] = sum;
    }
}

// Threads along y where parts are added up, and all of them.
constexpr int kHigh = 32, kEnd = 32 * kHigh;

// The sums of all parts for one channel, by threads (32 channels, kHigh): in `sums`, for the threads whose y is 0.
template <int K>
__device__ __forceinline__ void add_parts(const float* parts, int count, int channels, double (&sums)[K]) {
    __shared__ double all[K][kHigh][32];
    const int channel = blockIdx.x * 32 + threadIdx.x;
    double own[K] = {};
    if (channel < channels)
        for (int part = threadIdx.y; part < count; part += kHigh)
#pragma unroll
            for (int k = 0; k < K; ++k) own[k] += parts[(static_cast<i64>(part) * K + k) * channels + channel];
#pragma unroll
    for (int k = 0; k < K; ++k) all[k][threadIdx.y][threadIdx.x] = own[k];
    for (int half = kHigh / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
#pragma unroll
            for (int k = 0; k < K; ++k) all[k][threadIdx.y][threadIdx.x] += all[k][threadIdx.y + half][threadIdx.x];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] = all[k][0][threadIdx.x];
}

// Sums of the differences from the first row, and of their squares: they lose little where the mean is far from zero.
template <class T>
__device__ void sum_moments(const T* x, int rows, int channels, float* parts) {
    constexpr int V = Pack<T>::count;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    float sums[2][V] = {};
    if (first < channels) {
        float origin[V];
        read(x + first, origin);
#pragma unroll 4
        for (i64 row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
            float value[V];
            read(x + row * channels + first, value);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float difference = value[v] - origin[v];
                sums[0][v] += difference;
                sums[1][v] += difference * difference;
            }
        }
    }
    add_rows<2, V>(sums, channels, parts);
}

// From these sums: mean and 1 / sqrt(var + eps) into `moments` (2, C), and what follows of them.
template <class T>
__device__ void end_moments(const T* x, const float* parts, int count, int rows, int channels, float momentum, float eps,
                            float* moments, float* running_mean, float* running_var, i64* batches) {
    double sums[2];
    add_parts<2>(parts, count, channels, sums);
    const int channel = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.y != 0 || channel >= channels) return;
    const double n = rows, difference = sums[0] / n;
    const double square = sums[1] / n - difference * difference;
    // What rounding has made less than zero is zero; NaN stays so.
    const double variance = square < 0 ? 0 : square;
    const float mean = static_cast<float>(widen(x[channel]) + difference);
    moments[channel] = mean;
    moments[channels + channel] = static_cast<float>(1 / sqrt(variance + eps));
    running_mean[channel] = momentum * mean + (1 - momentum) * running_mean[channel];
    running_var[channel] = momentum * static_cast<float>(variance * (n / (n - 1))) + (1 - momentum) * running_var[channel];
    if (channel == 0) *batches += 1;
}

// What a thread's channels are multiplied by and so on.
template <int V>
struct Channels {
    float mean[V], scale[V], bias[V];

    __device__ Channels(const float* moments, const float* weight, const float* shift, int channels, int first) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            mean[v] = moments[first + v];
            scale[v] = moments[channels + first + v] * weight[first + v];
            bias[v] = shift[first + v];
        }
    }

    __device__ __forceinline__ float norm(float x, int v) const { return (x - mean[v]) * scale[v] + bias[v]; }
};

// y, with `other` added if there is any, and zero where it would be less if `relu`. As in PyTorch, NaN stays.
template <class T>
__device__ void apply(const T* x, const T* other, const float* moments, const float* weight, const float* bias, int relu,
                      int rows, int channels, T* y) {
    constexpr int V = Pack<T>::count;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (first >= channels) return;
    const Channels<V> of(moments, weight, bias, channels, first);
#pragma unroll 4
    for (i64 row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
        float value[V], add[V] = {};
        read(x + row * channels + first, value);
        if (other != nullptr) read(other + row * channels + first, add);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float sum = of.norm(value[v], v) + add[v];
            value[v] = relu && sum <= 0 ? 0 : sum;
        }
        write(y + row * channels + first, value);
    }
}

// Sums of the gradient g of y, and of g (x - mean). A ReLU holds back what belongs to y <= 0: which that is, is computed again
// from x, unless a sum stood between; then it is seen in y, and what passes goes into `passed`.
template <class T>
__device__ void sum_gradients(const T* g, const T* x, const T* y, const float* moments, const float* weight,
                              const float* bias, int relu, int rows, int channels, T* passed, float* parts) {
    constexpr int V = Pack<T>::count;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    float sums[2][V] = {};
    if (first < channels) {
        const Channels<V> of(moments, weight, bias, channels, first);
#pragma unroll 2
        for (i64 row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
            const i64 at = row * channels + first;
            float grad[V], value[V], result[V];
            read(g + at, grad);
            read(x + at, value);
            if (passed != nullptr) read(y + at, result);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float seen = passed != nullptr ? result[v] : of.norm(value[v], v);
                if (relu && seen <= 0) grad[v] = 0;
                sums[0][v] += grad[v];
                sums[1][v] += grad[v] * (value[v] - of.mean[v]);
            }
            if (passed != nullptr) write(passed + at, grad);
        }
    }
    add_rows<2, V>(sums, channels, parts);
}

// From these: the gradients of weight and bias, and the slope and offset (2, C) with which the gradient of x is
// scale * g + slope * (x - mean) + offset.
extern "C" __global__ void __launch_bounds__(kEnd)
    end_gradients(const float* parts, int count, int rows, int channels, const float* moments, const float* weight,
                  float* of_weight, float* of_bias, float* line) {
    double sums[2];
    add_parts<2>(parts, count, channels, sums);
    const int channel = blockIdx.x * 32 + threadIdx.x;
    if (threadIdx.y != 0 || channel >= channels) return;
    const double deviation = moments[channels + channel], scale = deviation * weight[channel];
    of_weight[channel] = static_cast<float>(sums[1] * deviation);
    of_bias[channel] = static_cast<float>(sums[0]);
    line[channel] = static_cast<float>(-scale * deviation * deviation * sums[1] / rows);
    line[channels + channel] = static_cast<float>(-scale * sums[0] / rows);
}

template <class T>
__device__ void gradient(const T* g, const T* x, const float* moments, const float* weight, const float* bias,
                         const float* line, int relu, int rows, int channels, T* of_x) {
    constexpr int V = Pack<T>::count;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (first >= channels) return;
    const Channels<V> of(moments, weight, bias, channels, first);
    float slope[V], offset[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        slope[v] = line[first + v];
        offset[v] = line[channels + first + v];
    }
#pragma unroll 2
    for (i64 row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += gridDim.y * blockDim.y) {
        const i64 at = row * channels + first;
        float grad[V], value[V];
        read(g + at, grad);
        read(x + at, value);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (relu && of.norm(value[v], v) <= 0) grad[v] = 0;
            grad[v] = of.scale[v] * grad[v] + slope[v] * (value[v] - of.mean[v]) + offset[v];
        }
        write(of_x + at, grad);
    }
}

#define KERNELS(T, kind)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads) sum_moments_##kind(const T* x, int rows, int channels,           \
                                                                              float* parts) {                              \
        sum_moments(x, rows, channels, parts);                                                                              \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kEnd)                                                                      \
        end_moments_##kind(const T* x, const float* parts, int count, int rows, int channels, float momentum, float eps,    \
                           float* moments, float* running_mean, float* running_var, i64* batches) {                         \
        end_moments(x, parts, count, rows, channels, momentum, eps, moments, running_mean, running_var, batches);           \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                                  \
        apply_##kind(const T* x, const T* other, const float* moments, const float* weight, const float* bias, int relu,    \
                     int rows, int channels, T* y) {                                                                        \
        apply(x, other, moments, weight, bias, relu, rows, channels, y);                                                    \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                                  \
        sum_gradients_##kind(const T* g, const T* x, const T* y, const float* moments, const float* weight,                 \
                             const float* bias, int relu, int rows, int channels, T* passed, float* parts) {                \
        sum_gradients(g, x, y, moments, weight, bias, relu, rows, channels, passed, parts);                                 \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                                  \
        gradient_##kind(const T* g, const T* x, const float* moments, const float* weight, const float* bias,               \
                        const float* line, int relu, int rows, int channels, T* of_x) {                                     \
        gradient(g, x, moments, weight, bias, line, relu, rows, channels, of_x);                                            \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)
