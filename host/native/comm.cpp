// Ranks, over libtorch's c10d: its TCP store, and its process group over gloo.

#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "guarded.h"

namespace {

struct Comm {
    c10::intrusive_ptr<c10d::Store> store;
    std::chrono::milliseconds timeout;
    c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
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
    static std::mutex mutex;
    static int depth, before;
};
std::mutex Quiet::mutex;
int Quiet::depth = 0, Quiet::before = 0;

Comm& opened(jepa_comm comm) { return *static_cast<Comm*>(comm); }

c10d::ProcessGroupGloo& joined(jepa_comm comm) {
    TORCH_CHECK(opened(comm).group, "the ranks have not been joined");
    return *opened(comm).group;
}

}  // namespace

bool jepa_comm_open(const char* host, uint16_t port, bool serve, const char* prefix, int64_t timeout_ms,
                    jepa_comm* comm, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        c10d::TCPStoreOptions options;
        options.port = port;
        options.isServer = serve;
        // Who is there, and who is missing, is asked for by name later.
        options.waitWorkers = false;
        options.timeout = std::chrono::milliseconds(timeout_ms);
        auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
        auto with_prefix = c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store));
        *comm = new Comm{std::move(with_prefix), options.timeout, nullptr};
    });
}

void jepa_comm_close(jepa_comm comm) { delete static_cast<Comm*>(comm); }

bool jepa_comm_set(jepa_comm comm, const char* key, const char* value, char** error) {
    return guarded(error, [&] {
        const std::string text(value);
        opened(comm).store->set(key, std::vector<uint8_t>(text.begin(), text.end()));
    });
}

bool jepa_comm_get(jepa_comm comm, const char* key, int64_t timeout_ms, char** value, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        auto& store = *opened(comm).store;
        *value = nullptr;
        if (!store.check({key})) {
            try {
                store.wait({key}, std::chrono::milliseconds(timeout_ms));
            } catch (const c10::DistStoreError&) {
                // The time is over, unless the store is not there any more: then this throws.
                if (!store.check({key})) return;
            }
        }
        const auto bytes = store.get(key);
        *value = strdup(std::string(bytes.begin(), bytes.end()).c_str());
    });
}

bool jepa_comm_join(jepa_comm comm, const char* name, int32_t rank, int32_t size, const char* address,
                    char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        using Group = c10d::ProcessGroupGloo;
        auto options = address == nullptr ? Group::Options::create_default(opened(comm).timeout)
                                          : Group::Options::create(opened(comm).timeout);
        if (address != nullptr) options->devices.push_back(Group::createDeviceForHostname(address));
        auto store = c10::make_intrusive<c10d::PrefixStore>(name, opened(comm).store);
        opened(comm).group = c10::make_intrusive<Group>(std::move(store), rank, size, std::move(options));
    });
}

bool jepa_comm_all_reduce(jepa_comm comm, jepa_tensor handle, int32_t operation, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        std::vector<at::Tensor> tensors{tensor(handle)};
        c10d::AllreduceOptions options;
        options.reduceOp = operation == JEPA_MAX ? c10d::ReduceOp::MAX : c10d::ReduceOp::SUM;
        joined(comm).allreduce(tensors, options)->wait();
    });
}

bool jepa_comm_broadcast(jepa_comm comm, jepa_tensor handle, int32_t from, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        std::vector<at::Tensor> tensors{tensor(handle)};
        c10d::BroadcastOptions options;
        options.rootRank = from;
        joined(comm).broadcast(tensors, options)->wait();
    });
}
