// The interface of native.h over libtorch's C++. CUDA is reached through the dispatcher only, so that this library
// needs no symbol of libtorch_cuda.

#include "native.h"

#include "guarded.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/version.h>

namespace {

// All tensors of a list; a missing one is an error that says which.
std::vector<at::Tensor> all(const char* what, size_t count, const jepa_tensor* handles) {
    std::vector<at::Tensor> list;
    list.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        TORCH_CHECK(handles[i] != nullptr && tensor(handles[i]).defined(), what, "[", i, "] is undefined");
        list.push_back(tensor(handles[i]));
    }
    return list;
}

// The tensors of a list that are there.
std::vector<at::Tensor> present(size_t count, const jepa_tensor* handles) {
    std::vector<at::Tensor> list;
    list.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        if (handles[i] != nullptr && tensor(handles[i]).defined()) {
            list.push_back(tensor(handles[i]));
        }
    }
    return list;
}

c10::DeviceType device_type_of(int32_t device_type) {
    TORCH_CHECK(device_type == JEPA_CPU || device_type == JEPA_CUDA, "unknown device type ", device_type);
    return device_type == JEPA_CPU ? c10::DeviceType::CPU : c10::DeviceType::CUDA;
}

// The fused kernels walk the memory of a parameter, its gradient and its state side by side.
void check_layout(const char* what, size_t i, const at::Tensor& param, const at::Tensor& other) {
    TORCH_CHECK(other.sizes() == param.sizes() && other.strides() == param.strides(), what, "[", i,
                "] has sizes ", other.sizes(), " and strides ", other.strides(), " where the parameter has ",
                param.sizes(), " and ", param.strides());
}

// The gradients, each laid out as its parameter is.
std::vector<at::Tensor> grads_like(const std::vector<at::Tensor>& params, const jepa_tensor* handles) {
    auto grads = all("grads", params.size(), handles);
    for (size_t i = 0; i < params.size(); ++i) {
        const auto& param = params[i];
        auto& grad = grads[i];
        TORCH_CHECK(grad.sizes() == param.sizes(), "grads[", i, "] has sizes ", grad.sizes(),
                    " where the parameter has ", param.sizes());
        if (grad.strides() != param.strides()) {
            auto copy = at::empty_strided(param.sizes(), param.strides(), grad.options());
            copy.copy_(grad);
            grad = std::move(copy);
        }
    }
    return grads;
}

// The L2 norm of each tensor: (count).
at::Tensor norms(const std::vector<at::Tensor>& list) { return at::stack(at::_foreach_norm(list, 2)); }

}  // namespace

void jepa_native_free_string(char* text) { std::free(text); }

int32_t jepa_native_api(void) { return 2; }

const char* jepa_native_cpu_capability(void) {
    try {
        static const std::string name = at::get_cpu_capability();
        return name.c_str();
    } catch (...) {
        return "unknown";
    }
}

bool jepa_native_cuda_loaded(void) {
    try {
        return at::CUDAHooksRegistry()->Has("CUDAHooks");
    } catch (...) {
        return false;
    }
}

bool jepa_native_has_cuda(void) {
    try {
        return at::hasCUDA();
    } catch (...) {
        return false;
    }
}

bool jepa_autocast_set(int32_t device_type, bool enabled, int32_t dtype, bool* previous_enabled,
                       int32_t* previous_dtype, char** error) {
    return guarded(error, [&] {
        const auto device = device_type_of(device_type);
        TORCH_CHECK(dtype >= 0 && dtype < static_cast<int32_t>(c10::ScalarType::NumOptions), "unknown dtype ",
                    dtype);
        if (previous_enabled != nullptr) {
            *previous_enabled = at::autocast::is_autocast_enabled(device);
        }
        if (previous_dtype != nullptr) {
            *previous_dtype = static_cast<int32_t>(at::autocast::get_autocast_dtype(device));
        }
        at::autocast::set_autocast_dtype(device, static_cast<c10::ScalarType>(dtype));
        at::autocast::set_autocast_enabled(device, enabled);
    });
}

bool jepa_autocast_cache_clear(char** error) {
    return guarded(error, [] { at::autocast::clear_cache(); });
}

bool jepa_fused_adamw(size_t count, const jepa_tensor* params, const jepa_tensor* grads,
                      const jepa_tensor* exp_avgs, const jepa_tensor* exp_avg_sqs,
                      const jepa_tensor* state_steps, double lr, double beta1, double beta2,
                      double weight_decay, double eps, char** error) {
    return guarded(error, [&] {
        if (count == 0) {
            return;
        }
        auto param_list = all("params", count, params);
        auto grad_list = grads_like(param_list, grads);
        auto avg_list = all("exp_avgs", count, exp_avgs);
        auto sq_list = all("exp_avg_sqs", count, exp_avg_sqs);
        auto step_list = all("state_steps", count, state_steps);
        for (size_t i = 0; i < count; ++i) {
            check_layout("exp_avgs", i, param_list[i], avg_list[i]);
            check_layout("exp_avg_sqs", i, param_list[i], sq_list[i]);
        }
        at::_foreach_add_(step_list, 1);
        at::_fused_adamw_(param_list, grad_list, avg_list, sq_list, {}, step_list, lr, beta1, beta2,
                          weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    });
}

bool jepa_ema(size_t count, const jepa_tensor* targets, const jepa_tensor* onlines, double momentum,
              char** error) {
    return guarded(error, [&] {
        if (count == 0) {
            return;
        }
        auto target_list = all("targets", count, targets);
        auto online_list = all("onlines", count, onlines);
        for (size_t i = 0; i < count; ++i) {
            TORCH_CHECK(target_list[i].is_floating_point(), "targets[", i, "] is ", target_list[i].dtype(),
                        "; an average needs floating point");
            TORCH_CHECK(target_list[i].sizes() == online_list[i].sizes(), "targets[", i, "] has sizes ",
                        target_list[i].sizes(), " and onlines[", i, "] has ", online_list[i].sizes());
        }
        at::_foreach_mul_(target_list, momentum);
        at::_foreach_add_(target_list, online_list, 1.0 - momentum);
    });
}

bool jepa_total_norm(size_t count, const jepa_tensor* tensors, jepa_tensor* norm, char** error) {
    return guarded(error, [&] {
        const auto list = present(count, tensors);
        if (list.empty()) {
            *norm = new at::Tensor(at::zeros({}, at::kFloat));
            return;
        }
        auto norms = at::_foreach_norm(list, 2);
        for (auto& one : norms) {
            one = one.to(list.front().device());
        }
        *norm = new at::Tensor(at::linalg_vector_norm(at::stack(norms), 2));
    });
}

bool jepa_clip(size_t count, const jepa_tensor* tensors, jepa_tensor norm, double max_norm, char** error) {
    return guarded(error, [&] {
        const auto list = present(count, tensors);
        if (list.empty()) {
            return;
        }
        TORCH_CHECK(norm != nullptr && tensor(norm).defined(), "the norm is undefined");
        const auto factor = (max_norm / (tensor(norm) + 1e-6)).clamp_max(1.0);
        at::_foreach_mul_(list, factor);
    });
}

bool jepa_grads(size_t count, const jepa_tensor* params, jepa_tensor* out, char** error) {
    return guarded(error, [&] {
        const auto list = all("params", count, params);
        std::vector<at::Tensor> grads;
        grads.reserve(count);
        for (const auto& param : list) {
            grads.push_back(param.grad());
        }
        for (size_t i = 0; i < count; ++i) {
            out[i] = grads[i].defined() ? new at::Tensor(std::move(grads[i])) : nullptr;
        }
    });
}

bool jepa_set_grads(size_t count, const jepa_tensor* params, const jepa_tensor* grads, char** error) {
    return guarded(error, [&] {
        const auto list = all("params", count, params);
        for (size_t i = 0; i < count; ++i) {
            const auto grad = grads[i] == nullptr ? at::Tensor() : tensor(grads[i]);
            const auto& param = list[i];
            TORCH_CHECK(!grad.defined() || grad.sizes() == param.sizes(), "grads[", i, "] has sizes ", grad.sizes(),
                        " where the parameter has ", param.sizes());
            TORCH_CHECK(!grad.defined() || (grad.dtype() == param.dtype() && grad.device() == param.device()), "grads[", i,
                        "] is ", grad.dtype(), " on ", grad.device(), " and the parameter ", param.dtype(), " on ",
                        param.device());
            param.mutable_grad() = grad;
        }
    });
}

bool jepa_zero_grads(size_t count, const jepa_tensor* params, char** error) {
    return guarded(error, [&] {
        for (auto& param : all("params", count, params)) {
            param.mutable_grad() = at::Tensor();
        }
    });
}

bool jepa_fused_sgd(size_t count, const jepa_tensor* params, const jepa_tensor* grads,
                    const jepa_tensor* momentum_buffers, double lr, double momentum, double weight_decay,
                    bool nesterov, char** error) {
    return guarded(error, [&] {
        if (count == 0) {
            return;
        }
        auto param_list = all("params", count, params);
        auto grad_list = grads_like(param_list, grads);
        std::vector<at::Tensor> buffer_list;
        // The CUDA kernel takes no buffers where there is no momentum.
        if (momentum > 0) {
            buffer_list = all("momentum_buffers", count, momentum_buffers);
            for (size_t i = 0; i < count; ++i) {
                check_layout("momentum_buffers", i, param_list[i], buffer_list[i]);
            }
        }
        at::_fused_sgd_(param_list, grad_list, buffer_list, weight_decay, momentum, lr, /*dampening=*/0.0,
                        nesterov, /*maximize=*/false, /*is_first_step=*/false);
    });
}

bool jepa_lars_scale(size_t count, const jepa_tensor* params, const jepa_tensor* grads, double weight_decay,
                     double trust_coefficient, double eps, char** error) {
    return guarded(error, [&] {
        if (count == 0) {
            return;
        }
        const auto param_list = all("params", count, params);
        const auto grad_list = all("grads", count, grads);
        const auto of_params = norms(param_list);
        const auto of_grads = norms(grad_list);
        const auto trust = trust_coefficient * of_params / (of_grads + weight_decay * of_params + eps);
        // A factor of 0 also takes away the decay that a gradient of zeros gets below.
        const auto factor = at::where(of_grads == 0, 0, at::where(of_params == 0, 1, trust));
        at::_foreach_add_(grad_list, param_list, weight_decay);
        at::_foreach_mul_(grad_list, factor.unbind());
    });
}
