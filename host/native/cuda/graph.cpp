// What a GPU is given to do, captured once and then queued as a whole: CUDA graphs, by way of libtorch, whose allocator keeps
// the memory of a capture for it. device/graph.rs opens this library where it is there.

#include "../guarded.h"

#include <cstdint>
#include <memory>

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>

namespace {

at::cuda::CUDAGraph& graph_of(void* graph) { return *static_cast<at::cuda::CUDAGraph*>(graph); }

c10::Device gpu(std::int32_t number) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(number)}; }

}  // namespace

extern "C" {

// From now on until jepa_graph_end, what this thread queues on its stream of the device, which is not the default one, is
// captured into *graph and not done. What else the thread asks of CUDA, to wait for one, fails; other threads may go on. Free
// memory is given back before, for what is captured gets memory of its own. False, here and below: *error holds a message from
// malloc.
bool jepa_graph_begin(std::int32_t device, void** graph, char** error) {
    return guarded(error, [&] {
        const c10::DeviceGuard guard(gpu(device));
        auto begun = std::make_unique<at::cuda::CUDAGraph>();
        c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache();
        begun->capture_begin(/*pool=*/{0, 0}, cudaStreamCaptureModeThreadLocal);
        *graph = begun.release();
    });
}

bool jepa_graph_end(std::int32_t device, void* graph, char** error) {
    return guarded(error, [&] {
        const c10::DeviceGuard guard(gpu(device));
        graph_of(graph).capture_end();
    });
}

// Queues all that was captured, on the stream of this thread. libtorch's generator stands where it would after doing it.
bool jepa_graph_replay(void* graph, char** error) {
    return guarded(error, [&] { graph_of(graph).replay(); });
}

// Its memory is free again once no tensor lies there.
void jepa_graph_free(void* graph) { delete static_cast<at::cuda::CUDAGraph*>(graph); }

}  // extern "C"
