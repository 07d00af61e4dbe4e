// Ranks with a GPU each, over NCCL. It is in the library that needs CUDA's headers and libtorch_cuda, which ../comm.cpp opens
// where it is there.

#include "../guarded.h"

#include <chrono>
#include <cstdint>
#include <cstdlib>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

// `store` is a c10::intrusive_ptr<c10d::Store>*, and stays the caller's; `group`, a c10::intrusive_ptr<c10d::Backend>*, gets the
// process group of this name. False: *error holds a message from malloc.
extern "C" bool jepa_nccl_join(void* store, const char* name, std::int32_t rank, std::int32_t size,
                               std::int64_t timeout_ms, void* group, char** error) {
    return guarded(error, [&] {
        // 2: a group that has failed is given up, and the process goes on, to say who is missing; libtorch would end it.
        setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2", /*overwrite=*/0);
        auto options = c10d::ProcessGroupNCCL::Options::create();
        options->timeout = std::chrono::milliseconds(timeout_ms);
        const auto& root = *static_cast<c10::intrusive_ptr<c10d::Store>*>(store);
        auto with_prefix = c10::make_intrusive<c10d::PrefixStore>(name, root);
        *static_cast<c10::intrusive_ptr<c10d::Backend>*>(group) =
            c10::make_intrusive<c10d::ProcessGroupNCCL>(std::move(with_prefix), rank, size, std::move(options));
    });
}
