// What stands before every program of plugin_api::cuda: numbers of tensors, one and several at a time.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// As libtorch has it in memory: the upper half of an f32.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
// To the nearest, halves to the even one.
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
#if __CUDA_ARCH__ >= 800
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};
    return bf16{static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// Numbers that lie side by side, 16 bytes of them, read and written at once.
template <class T>
struct alignas(16) Pack {
    static constexpr int count = 16 / sizeof(T);
    T at[count];
};

template <class T>
__device__ __forceinline__ void read(const T* from, float (&to)[Pack<T>::count]) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int i = 0; i < Pack<T>::count; ++i) to[i] = widen(pack.at[i]);
}

template <class T>
__device__ __forceinline__ void write(T* to, const float (&from)[Pack<T>::count]) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::count; ++i) pack.at[i] = narrow<T>(from[i]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
}
