// Ranks, over libtorch's c10d: its TCP store, and its process group over gloo.

#include <cstdlib>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <dlfcn.h>

#include "comm.h"
#include "guarded.h"

namespace {

Comm& opened(jepa_comm comm) { return *static_cast<Comm*>(comm); }

c10d::Backend& joined(jepa_comm comm, const at::Tensor& tensor) {
    const auto& [group, of_gpus] = std::tie(opened(comm).group, opened(comm).group_of_gpus);
    TORCH_CHECK(group, "the ranks have not been joined");
    return tensor.is_cuda() && of_gpus ? *of_gpus : *group;
}

// A store whose machine is cut off never answers, and its client waits without an end: here, not longer than this beyond the
// time that the question itself has. The thread that waits on is left to itself.
constexpr auto slack = std::chrono::seconds(5);

template <typename Ask>
auto within(std::chrono::milliseconds time, Ask ask) {
    using Answer = decltype(ask());
    auto task = std::make_shared<std::packaged_task<Answer()>>(std::move(ask));
    auto answer = task->get_future();
    std::thread([task] { (*task)(); }).detach();
    TORCH_CHECK(answer.wait_for(time) == std::future_status::ready, "the store does not answer");
    return answer.get();
}

// Runs what all ranks do together.
template <typename Body>
bool together(jepa_comm comm, char** error, Body body) {
    const Quiet quiet;
    const bool done = guarded(error, body);
    if (!done) *opened(comm).lost = true;
    return done;
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
        // It tries longer than it is told to.
        auto store = within(options.timeout + slack, [host = std::string(host), options] {
            return c10::make_intrusive<c10d::TCPStore>(host, options);
        });
        auto with_prefix = c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store));
        auto opened = std::make_unique<Comm>();
        opened->store = std::move(with_prefix);
        opened->timeout = options.timeout;
        *comm = opened.release();
    });
}

void jepa_comm_close(jepa_comm comm) {
    guarded(nullptr, [&] {
        for (const auto& group : {opened(comm).group_of_gpus, opened(comm).of_gradients_of_gpus}) {
            if (group) group->shutdown();
        }
    });
    delete static_cast<Comm*>(comm);
}

bool jepa_comm_set(jepa_comm comm, const char* key, const char* value, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        const std::string text(value);
        within(slack, [store = opened(comm).store, key = std::string(key), text] {
            store->set(key, std::vector<uint8_t>(text.begin(), text.end()));
        });
    });
}

bool jepa_comm_get(jepa_comm comm, const char* key, int64_t timeout_ms, char** value, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        *value = nullptr;
        const std::chrono::milliseconds time(timeout_ms);
        const auto ask = [store = opened(comm).store, key = std::string(key), time]() -> std::optional<std::string> {
            if (!store->check({key})) {
                try {
                    store->wait({key}, time);
                } catch (const c10::DistStoreError&) {
                    // The time is over, unless the store is not there any more: then this throws.
                    if (!store->check({key})) return std::nullopt;
                }
            }
            const auto bytes = store->get(key);
            return std::string(bytes.begin(), bytes.end());
        };
        const auto answer = within(time + slack, ask);
        if (answer) *value = strdup(answer->c_str());
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
        const auto join = [&](const std::string& name) -> c10::intrusive_ptr<c10d::Backend> {
            auto store = c10::make_intrusive<c10d::PrefixStore>(name, opened(comm).store);
            return c10::make_intrusive<Group>(std::move(store), rank, size, options);
        };
        opened(comm).rank = rank;
        opened(comm).size = size;
        opened(comm).group = join(name);
        opened(comm).of_gradients = join(std::string(name) + "/gradients");
    });
}

bool jepa_comm_join_nccl(jepa_comm comm, const char* name, const char* library, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        // Of cuda/nccl.cpp. It stays open: its process groups have threads.
        using Join = bool (*)(void*, const char*, int32_t, int32_t, int64_t, void*, char**);
        void* opened_library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        TORCH_CHECK(opened_library != nullptr, dlerror());
        const auto function = reinterpret_cast<Join>(dlsym(opened_library, "jepa_nccl_join"));
        TORCH_CHECK(function != nullptr, library, " is not what it should be");
        auto& joining = opened(comm);
        const auto join = [&](const std::string& name, c10::intrusive_ptr<c10d::Backend>& group) {
            // What hangs shows on the CPUs first, where it is an error; NCCL's own watch ends the process.
            const auto timeout = 2 * static_cast<int64_t>(joining.timeout.count());
            char* words = nullptr;
            if (function(&joining.store, name.c_str(), joining.rank, joining.size, timeout, &group, &words)) return;
            const std::string text(words);
            std::free(words);
            TORCH_CHECK(false, text);
        };
        join(std::string(name) + "/nccl", joining.group_of_gpus);
        join(std::string(name) + "/nccl/gradients", joining.of_gradients_of_gpus);
    });
}

void jepa_comm_leave(jepa_comm comm) {
    guarded(nullptr, [&] {
        auto& left = opened(comm);
        for (const auto& group : {left.group_of_gpus, left.of_gradients_of_gpus}) {
            if (group) group->abort();
        }
        // A group ends when nothing of it is under way any more: nobody waits for that.
        std::thread([groups = std::vector{std::move(left.group), std::move(left.of_gradients),
                                          std::move(left.group_of_gpus), std::move(left.of_gradients_of_gpus)}]() mutable {
            groups.clear();
        }).detach();
    });
}

bool jepa_comm_all_reduce(jepa_comm comm, jepa_tensor handle, int32_t operation, char** error) {
    return together(comm, error, [&] {
        std::vector<at::Tensor> tensors{tensor(handle)};
        opened(comm).traffic.count(tensors[0]);
        c10d::AllreduceOptions options;
        options.reduceOp = operation == JEPA_MAX ? c10d::ReduceOp::MAX : c10d::ReduceOp::SUM;
        joined(comm, tensors[0]).allreduce(tensors, options)->wait();
    });
}

void jepa_comm_traffic(jepa_comm comm, uint64_t counts[4]) {
    const auto& [traffic, gradients] = std::tie(opened(comm).traffic, *opened(comm).of_gradient_traffic);
    counts[0] = traffic.times;
    counts[1] = traffic.bytes;
    counts[2] = gradients.times;
    counts[3] = gradients.bytes;
}

bool jepa_comm_lost(jepa_comm comm) { return *opened(comm).lost; }

bool jepa_comm_sum(jepa_comm comm, jepa_tensor handle, char** error) {
    return jepa_comm_all_reduce(comm, handle, JEPA_SUM, error);
}

bool jepa_comm_all_gather(jepa_comm comm, jepa_tensor handle, jepa_tensor all, char** error) {
    return together(comm, error, [&] {
        auto& to = *static_cast<at::Tensor*>(all);
        auto from = tensor(handle);
        opened(comm).traffic.count(from);
        // Nothing of nobody is there already.
        if (to.numel() > 0) joined(comm, from)._allgather_base(to, from)->wait();
    });
}

bool jepa_comm_broadcast(jepa_comm comm, jepa_tensor handle, int32_t from, char** error) {
    return together(comm, error, [&] {
        std::vector<at::Tensor> tensors{tensor(handle)};
        c10d::BroadcastOptions options;
        options.rootRank = from;
        joined(comm, tensors[0]).broadcast(tensors, options)->wait();
    });
}
