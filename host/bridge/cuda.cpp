// Kernels in CUDA C++, compiled when they are first needed: plugin_api::cuda is the face of this file.
//
// The compiler is NVRTC, which comes with the CUDA libtorch, and the launcher is the driver. Both are opened when somebody asks,
// so that this library builds and loads without CUDA. What is declared here are the few of their functions that are used.

#include "guarded.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

namespace {

// From nvrtc.h and cuda.h: results are 0 for success, and what is opaque is a pointer.
struct Nvrtc {
    int (*create)(void** program, const char* source, const char* name, int headers, const char* const* texts,
                  const char* const* names);
    int (*compile)(void* program, int count, const char* const* options);
    int (*log_size)(void* program, std::size_t* size);
    int (*log)(void* program, char* log);
    int (*size)(void* program, std::size_t* size);
    int (*image)(void* program, char* image);
    int (*destroy)(void** program);
};

struct Driver {
    int (*attribute)(int* value, int attribute, int device);
    int (*load)(void** module, const void* image);
    int (*function)(void** function, void* module, const char* name);
    int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                  unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra);
    int (*error)(int result, const char** text);
};

// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
constexpr int kMajor = 75, kMinor = 76;

template <class F>
void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    TORCH_CHECK(function != nullptr, name, " is missing: ", dlerror());
}

// Of the library that a function is in, with a slash at its end.
std::string folder_of(void* function) {
    Dl_info info{};
    if (dladdr(function, &info) == 0 || info.dli_fname == nullptr) {
        return "";
    }
    const std::string path = info.dli_fname;
    return path.substr(0, path.find_last_of('/') + 1);
}

// NVRTC of libtorch's major version of CUDA: where the process has it, where the linker looks, or beside libtorch.
void* open_nvrtc() {
    const auto folder = folder_of(reinterpret_cast<void*>(static_cast<at::Context& (*)()>(&at::globalContext)));
    std::string tried;
    for (const char* version : {"13", "12"}) {
        const std::string name = std::string("libnvrtc.so.") + version;
        for (const auto& path : {name, folder + "../../nvidia/cu" + version + "/lib/" + name,
                                 folder + "../../nvidia/cuda_nvrtc/lib/" + name, folder + name}) {
            if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
                return library;
            }
            tried += "\n  " + path;
        }
    }
    TORCH_CHECK(false, "NVRTC is not found:", tried);
}

const Nvrtc& nvrtc() {
    static const Nvrtc table = [] {
        void* library = open_nvrtc();
        Nvrtc table{};
        find(library, "nvrtcCreateProgram", table.create);
        find(library, "nvrtcCompileProgram", table.compile);
        find(library, "nvrtcGetProgramLogSize", table.log_size);
        find(library, "nvrtcGetProgramLog", table.log);
        find(library, "nvrtcGetCUBINSize", table.size);
        find(library, "nvrtcGetCUBIN", table.image);
        find(library, "nvrtcDestroyProgram", table.destroy);
        // It asks the linker for a second library by name, which lies beside it and may not be where the linker looks.
        std::error_code none;
        for (const auto& file : std::filesystem::directory_iterator(folder_of(reinterpret_cast<void*>(table.create)), none)) {
            if (file.path().filename().string().rfind("libnvrtc-builtins.so", 0) == 0) {
                dlopen(file.path().c_str(), RTLD_NOW | RTLD_LOCAL);
            }
        }
        return table;
    }();
    return table;
}

const Driver& driver() {
    static const Driver table = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        TORCH_CHECK(library != nullptr, "the driver: ", dlerror());
        Driver table{};
        find(library, "cuDeviceGetAttribute", table.attribute);
        find(library, "cuModuleLoadData", table.load);
        find(library, "cuModuleGetFunction", table.function);
        find(library, "cuLaunchKernel", table.launch);
        find(library, "cuGetErrorString", table.error);
        return table;
    }();
    return table;
}

void check(int result, const char* what) {
    if (result != 0) {
        const char* words = nullptr;
        driver().error(result, &words);
        TORCH_CHECK(false, what, ": ", words == nullptr ? "unknown error" : words);
    }
}

std::vector<char> compiled(const char* source, const std::string& architecture) {
    void* program = nullptr;
    TORCH_CHECK(nvrtc().create(&program, source, "kernels.cu", 0, nullptr, nullptr) == 0, "NVRTC takes no source");
    const std::string target = "--gpu-architecture=" + architecture;
    const std::vector<const char*> options = {target.c_str(), "--std=c++17", "--restrict"};
    const int result = nvrtc().compile(program, static_cast<int>(options.size()), options.data());
    std::string log;
    std::size_t size = 0;
    if (nvrtc().log_size(program, &size) == 0 && size > 1) {
        log.resize(size);
        nvrtc().log(program, log.data());
    }
    std::vector<char> image;
    if (result == 0 && nvrtc().size(program, &size) == 0) {
        image.resize(size);
        nvrtc().image(program, image.data());
    }
    nvrtc().destroy(&program);
    TORCH_CHECK(!image.empty(), "a kernel does not compile for ", architecture, ": ", log);
    return image;
}

// Of each source and device, and of each kernel in it: compiled once, whichever plugin asks.
std::mutex mutex;
std::map<std::pair<std::string, int>, void*> modules;

}  // namespace

extern "C" {

// The machine code of `source` for an architecture such as "sm_90": whether it compiles, without a GPU. False, here and below:
// *error holds a message from malloc.
bool jepa_cuda_compiles(const char* source, const char* architecture, char** error) {
    return guarded(error, [&] { compiled(source, architecture); });
}

// The kernel `name` of `source`, for a device. It stays for as long as the process.
bool jepa_cuda_kernel(const char* source, const char* name, std::int32_t device, void** kernel, char** error) {
    return guarded(error, [&] {
        const c10::DeviceGuard guard(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
        std::lock_guard<std::mutex> lock(mutex);
        auto& module = modules[{source, device}];
        if (module == nullptr) {
            int major = 0, minor = 0;
            check(driver().attribute(&major, kMajor, device), "the device's architecture");
            check(driver().attribute(&minor, kMinor, device), "the device's architecture");
            const auto image = compiled(source, "sm_" + std::to_string(major) + std::to_string(minor));
            check(driver().load(&module, image.data()), "a compiled kernel does not load");
        }
        check(driver().function(kernel, module, name), name);
    });
}

// Queues a kernel on the stream that libtorch computes on.
bool jepa_cuda_launch(void* kernel, std::int32_t device, const std::uint32_t grid[2], const std::uint32_t block[2],
                      void** arguments, char** error) {
    return guarded(error, [&] {
        const c10::Device on(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
        const c10::DeviceGuard guard(on);
        const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
        check(driver().launch(kernel, grid[0], grid[1], 1, block[0], block[1], 1, 0, cuda.getStream(on).native_handle(),
                              arguments, nullptr),
              "a kernel cannot be queued");
    });
}

}  // extern "C"
