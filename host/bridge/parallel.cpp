// libtorch's own threads, for code that speaks C: plugin_api::parallel is the face of this file. A second pool would
// compete with them for the cores.

#include <cstdint>

#include <ATen/Parallel.h>

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would run on one thread: compile with -fopenmp"
#endif

// Calls body(data, from, to) for parts of begin..end that together are all of it, of `grain` or more unless there is
// less, at once on the threads that libtorch computes with. Throws nothing if `body` does not.
extern "C" void jepa_parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain,
                                  void (*body)(void*, std::int64_t, std::int64_t), void* data) {
    at::parallel_for(begin, end, grain, [&](std::int64_t from, std::int64_t to) { body(data, from, to); });
}
