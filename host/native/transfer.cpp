// Where tensors lie: in memory of the caller's; between the CPU's memory and a GPU's, beside what the GPU computes; and
// lists of them that are copied together.

#include "native.h"

#include "guarded.h"

#include <memory>
#include <optional>
#include <vector>

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace {

c10::Device gpu(int32_t number) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(number)}; }

// One for all copies of this thread to a device: none waits for what is computed there.
c10::Stream copy_stream(const c10::impl::VirtualGuardImpl& cuda, c10::Device device) {
    thread_local std::vector<std::optional<c10::Stream>> streams;
    const auto number = static_cast<size_t>(device.index());
    if (streams.size() <= number) {
        streams.resize(number + 1);
    }
    if (!streams[number]) {
        streams[number] = cuda.getStreamFromGlobalPool(device);
    }
    return *streams[number];
}

}  // namespace

bool jepa_tensor_over(size_t dimensions, const int64_t* sizes, int32_t dtype, void* start, void* owner,
                      void (*release)(void*), jepa_tensor* out, char** error) {
    return guarded(error, [&] {
        const std::shared_ptr<void> owned(owner, release);
        const auto options = at::TensorOptions().dtype(static_cast<c10::ScalarType>(dtype));
        const auto let_go = [owned](void*) {};
        *out = new at::Tensor(at::from_blob(start, {sizes, dimensions}, let_go, options));
    });
}

bool jepa_pinned(size_t dimensions, const int64_t* sizes, int32_t dtype, jepa_tensor* out, char** error) {
    return guarded(error, [&] {
        const auto options = at::TensorOptions().dtype(static_cast<c10::ScalarType>(dtype)).pinned_memory(true);
        *out = new at::Tensor(at::empty({sizes, dimensions}, options));
    });
}

bool jepa_to_gpu(size_t count, const jepa_tensor* tensors, int32_t device_number, jepa_tensor* out, char** error) {
    return guarded(error, [&] {
        const auto device = gpu(device_number);
        const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
        const auto here = cuda.getStream(device), beside = copy_stream(cuda, device);
        std::vector<at::Tensor> there;
        there.reserve(count);
        {
            const c10::StreamGuard guard(beside);
            for (size_t i = 0; i < count; ++i) {
                there.push_back(tensor(tensors[i]).to(device, /*non_blocking=*/true));
            }
        }
        c10::Event done(c10::DeviceType::CUDA);
        done.record(beside);
        done.block(here);
        for (size_t i = 0; i < count; ++i) {
            // Its memory is not the copying stream's to use again before this one is done with it.
            there[i].record_stream(here);
            out[i] = new at::Tensor(std::move(there[i]));
        }
    });
}

bool jepa_copy(size_t count, const jepa_tensor* targets, const jepa_tensor* sources, char** error) {
    return guarded(error, [&] {
        std::vector<at::Tensor> to, from;
        for (size_t i = 0; i < count; ++i) {
            to.push_back(tensor(targets[i]));
            from.push_back(tensor(sources[i]));
        }
        if (count > 0) {
            at::_foreach_copy_(to, from, /*non_blocking=*/true);
        }
    });
}

bool jepa_own_stream(int32_t device_number, char** error) {
    return guarded(error, [&] {
        const auto device = gpu(device_number);
        const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
        const auto own = cuda.getStreamFromGlobalPool(device);
        c10::Event queued(c10::DeviceType::CUDA);
        queued.record(cuda.getStream(device));
        queued.block(own);
        cuda.exchangeStream(own);
    });
}

bool jepa_gpu_peak_bytes(int32_t device_number, uint64_t* bytes, char** error) {
    return guarded(error, [&] {
        const auto device = gpu(device_number);
        const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
        constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
        *bytes = static_cast<uint64_t>(stats.allocated_bytes[kAll].peak);
    });
}
