// The parts of the bridge that are ours: the stream callbacks that tch's C layer expects from Rust, and what the
// bridge says about itself.
//
// torch-sys defines the callbacks in Rust, inside every library that takes tch, so one shared bridge cannot know
// whose to call. Nothing here needs them: the host reads and writes files itself. So each one reports failure,
// and `Tensor::load_from_stream` and its like return an error instead of failing to link.

#include <cstddef>
#include <cstdint>

#include <torch/version.h>

extern "C" {

bool tch_write_stream_destructor(void*) { return false; }
bool tch_write_stream_write(void*, const std::uint8_t*, std::size_t, std::size_t*) { return false; }
bool tch_read_stream_destructor(void*) { return false; }
bool tch_read_stream_stream_position(void*, std::uint64_t*) { return false; }
bool tch_read_stream_seek_start(void*, std::uint64_t, std::uint64_t*) { return false; }
bool tch_read_stream_seek_end(void*, std::int64_t, std::uint64_t*) { return false; }
bool tch_read_stream_read(void*, std::uint8_t*, std::size_t, std::size_t*) { return false; }

// The libtorch that this file was compiled against, such as "2.11.0".
const char* jepa_bridge_libtorch_version() { return TORCH_VERSION; }

}  // extern "C"
