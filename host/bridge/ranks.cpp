// The other ranks of a run, for code that speaks C: plugin_api::ranks is the face of this file. How ranks talk is the host's
// business; here lies only what it has installed, for all libraries of the process.

#include <cstdint>
#include <cstring>

#include <ATen/core/Tensor.h>

extern "C" {

// Of what the host installs. `data` is handed to the functions. They return when it is done; false: *error holds a message
// from malloc. Used by one thread at a time.
struct jepa_ranks {
    std::int32_t rank;
    std::int32_t size;
    void* data;
    // Replaces a tensor, in place, by the sum over all ranks.
    bool (*all_reduce)(void* data, at::Tensor* tensor, char** error);
    // Stores the equally large tensors of all ranks in `all`, one after the other.
    bool (*all_gather)(void* data, const at::Tensor* tensor, at::Tensor* all, char** error);
};

}  // extern "C"

namespace {

constexpr jepa_ranks alone{0, 1, nullptr, nullptr, nullptr};
jepa_ranks installed = alone;

bool nobody(char** error) {
    *error = strdup("there are no other ranks");
    return false;
}

}  // namespace

extern "C" {

// For the host: who computes together from here on; NULL: this process alone. Not while a plugin computes.
void jepa_ranks_install(const jepa_ranks* ranks) { installed = ranks == nullptr ? alone : *ranks; }

std::int32_t jepa_ranks_rank() { return installed.rank; }

std::int32_t jepa_ranks_size() { return installed.size; }

bool jepa_ranks_all_reduce(at::Tensor* tensor, char** error) {
    return installed.all_reduce == nullptr ? nobody(error) : installed.all_reduce(installed.data, tensor, error);
}

bool jepa_ranks_all_gather(const at::Tensor* tensor, at::Tensor* all, char** error) {
    return installed.all_gather == nullptr ? nobody(error)
                                           : installed.all_gather(installed.data, tensor, all, error);
}

}  // extern "C"
