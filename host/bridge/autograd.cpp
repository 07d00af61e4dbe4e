// Functions with a backward of their own, for code that speaks C: plugin_api::autograd is the face of this file.
//
// libtorch's graph knows nothing of Rust, and tch binds no way to add a node to it. Here a node holds a callback and
// the data that it needs; the engine calls it like any other node.

#include "guarded.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

extern "C" {

// `grads` has a borrowed at::Tensor* for each output of the function, NULL where none came; the callback stores in
// `out` an owned one for each input, or NULL for no gradient. False: nothing is stored, and *error holds a message from
// malloc.
using jepa_backward = bool (*)(void* data, const at::Tensor* const* grads, at::Tensor** out, char** error);
using jepa_drop = void (*)(void* data);

}  // extern "C"

namespace {

class Callback : public torch::autograd::Node {
public:
    Callback(std::string name, std::size_t inputs, jepa_backward backward, void* data, jepa_drop drop)
        : name_(std::move(name)), inputs_(inputs), backward_(backward), data_(data), drop_(drop) {}

    ~Callback() override { release(); }

    std::string name() const override { return name_; }

    // The engine calls this after a backward pass that does not keep the graph.
    void release_variables() override {
        std::lock_guard<std::mutex> lock(mutex_);
        release();
    }

    torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
        std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(data_ != nullptr, name_, " was asked for its gradients a second time, and has freed what it had kept: ",
                    "keep the graph in the first backward pass");
        TORCH_CHECK(!at::GradMode::is_enabled(), name_, " has no second derivative");
        std::vector<const at::Tensor*> given;
        given.reserve(grads.size());
        for (const auto& grad : grads) {
            given.push_back(grad.defined() ? &grad : nullptr);
        }
        std::vector<at::Tensor*> made(inputs_, nullptr);
        char* error = nullptr;
        if (!backward_(data_, given.data(), made.data(), &error)) {
            const std::string message = error == nullptr ? "unknown error" : error;
            std::free(error);
            TORCH_CHECK(false, "the gradient of ", name_, ": ", message);
        }
        torch::autograd::variable_list out;
        out.reserve(inputs_);
        for (auto* grad : made) {
            out.push_back(grad == nullptr ? at::Tensor() : std::move(*grad));
            delete grad;
        }
        return out;
    }

private:
    void release() {
        if (data_ != nullptr) {
            drop_(std::exchange(data_, nullptr));
        }
    }

    const std::string name_;
    const std::size_t inputs_;
    const jepa_backward backward_;
    void* data_;
    const jepa_drop drop_;
};

}  // namespace

extern "C" {

// Makes `outputs`, which were computed from `inputs` without a graph, results of a function named `name`: in a backward
// pass `backward` turns their gradients into those of the inputs. `data` is handed to it, and to `drop` once, when it is
// not needed any more: at once, if no input needs a gradient. False: *error holds a message from malloc.
bool jepa_autograd_record(const char* name, std::size_t input_count, const at::Tensor* const* inputs,
                          std::size_t output_count, at::Tensor* const* outputs, jepa_backward backward, void* data,
                          jepa_drop drop, char** error) {
    return guarded(error, [&] {
        // Owns the data from here on, also when something throws.
        std::shared_ptr<Callback> node(new Callback(name, input_count, backward, data, drop),
                                       torch::autograd::deleteNode);
        bool needed = false;
        torch::autograd::edge_list edges;
        edges.reserve(input_count);
        for (std::size_t i = 0; i < input_count; ++i) {
            needed |= inputs[i]->requires_grad();
            edges.push_back(torch::autograd::impl::gradient_edge(*inputs[i]));
        }
        if (!needed || !at::GradMode::is_enabled()) {
            return;
        }
        node->set_next_edges(std::move(edges));
        for (std::size_t i = 0; i < output_count; ++i) {
            torch::autograd::set_history(*outputs[i], node);
        }
    });
}

// The c10::ScalarType that autocast gives matrix products on CPU (0) or CUDA (1) on this thread; -1 where it is off.
std::int32_t jepa_autocast_dtype(std::int32_t device_type) {
    const auto device = device_type == 0 ? c10::DeviceType::CPU : c10::DeviceType::CUDA;
    if (!at::autocast::is_autocast_enabled(device)) {
        return -1;
    }
    return static_cast<std::int32_t>(at::autocast::get_autocast_dtype(device));
}

}  // extern "C"
