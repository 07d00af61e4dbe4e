// The connection behind a jepa_comm.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>

#include <ATen/core/Tensor.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "native.h"

// What has been handed over to the others: how often, and how many bytes.
struct Traffic {
    std::atomic<std::uint64_t> times{0}, bytes{0};
    void count(const at::Tensor& tensor) {
        times += 1;
        bytes += tensor.nbytes();
    }
};

struct Comm {
    c10::intrusive_ptr<c10d::Store> store;
    std::chrono::milliseconds timeout;
    // What ranks do one after the other, and gradients, which are on their way meanwhile: two groups, as the order of what a
    // group does has to be the same on all ranks.
    c10::intrusive_ptr<c10d::Backend> group, of_gradients;
    // The same for tensors on GPUs, over NCCL, where it is there; otherwise gloo takes these too, by way of the CPU's memory.
    c10::intrusive_ptr<c10d::Backend> group_of_gpus, of_gradients_of_gpus;
    std::int32_t rank = 0, size = 1;
    // Whether something that all do together has failed, an exchange of gradients for one.
    std::shared_ptr<std::atomic<bool>> lost = std::make_shared<std::atomic<bool>>(false);
    Traffic traffic;
    std::shared_ptr<Traffic> of_gradient_traffic = std::make_shared<Traffic>();
};

// What goes wrong is in our errors. Meanwhile c10d does not say it too, at greater length, unless it is asked to.
class Quiet {
  public:
    Quiet() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (depth++ > 0) return;
        before = FLAGS_caffe2_log_level;
        if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    }
    ~Quiet() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (--depth == 0) FLAGS_caffe2_log_level = before;
    }
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;

  private:
    static inline std::mutex mutex;
    static inline int depth = 0, before = 0;
};
