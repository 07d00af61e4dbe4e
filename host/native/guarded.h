// From C++ exceptions to the errors of native.h, and from its handles to tensors.
#pragma once

#include <cstring>
#include <exception>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "native.h"

inline void report(char** error, const char* message) {
    if (error != nullptr) {
        *error = strdup(message);
    }
}

// Runs `body` without a graph and turns an exception into an error.
template <typename Body>
bool guarded(char** error, Body body) {
    try {
        at::NoGradGuard no_grad;
        body();
        return true;
    } catch (const c10::Error& caught) {
        // Without libtorch's backtrace, which says nothing to the reader of a training log.
        report(error, caught.what_without_backtrace());
    } catch (const std::exception& caught) {
        report(error, caught.what());
    } catch (...) {
        report(error, "an unknown C++ exception");
    }
    return false;
}

inline const at::Tensor& tensor(jepa_tensor handle) { return *static_cast<const at::Tensor*>(handle); }
