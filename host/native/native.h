/* What the host needs of libtorch and tch does not bind: autocast, list operations, gradients of a list.
 *
 * Built once into libjepa_native.so by build.sh; everything else of the host reaches libtorch through this file
 * and the bridge alone.
 *
 * Conventions
 *   jepa_tensor     an at::Tensor*, as in tch: a handle from tch is valid here, and one that is returned here is
 *                   freed as tch frees its own (at_free, or by becoming a tch::Tensor).
 *   OWNERSHIP       handles that come in stay the caller's; a handle that goes out is the caller's to free.
 *   lists           `count` handles, one after the other. Lists that belong together have the same count.
 *   result, error   true: done, and *error is untouched. false: nothing is returned, and *error holds a message
 *                   that the caller frees with jepa_native_free_string. `error` may be NULL. No C++ exception
 *                   leaves this library.
 *   gradients       nothing here records a graph, and tensors are changed in place where a name says so.
 */
#ifndef JEPA_NATIVE_H
#define JEPA_NATIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void* jepa_tensor;

/* Frees a message of this library; NULL is allowed. */
void jepa_native_free_string(char* text);

/* --- about the library; these strings are static --------------------------------------------------------- */

/* The version of this interface. It grows at the end; a change of what is there is a new number. */
int32_t jepa_native_api(void);

/* The vector instructions that libtorch's kernels use here, such as "AVX2" or "AVX512". */
const char* jepa_native_cpu_capability(void);

/* Whether libtorch_cuda is in the process. Safe at any time. */
bool jepa_native_cuda_loaded(void);

/* Whether libtorch can use a CUDA device. libtorch settles whether it has CUDA when it is first asked (seeding
 * asks too) and never looks again: open libtorch_cuda before this or anything else that might ask. */
bool jepa_native_has_cuda(void);

/* --- autocast: state of the calling thread --------------------------------------------------------------- */

enum { JEPA_CPU = 0, JEPA_CUDA = 1 };

/* Sets autocast for one device type. `dtype` is a c10::ScalarType (tch's Kind as an integer); only 5, fp16, and
 * 15, bf16, mean anything to autocast. The state before is stored in the two out parameters unless they are NULL,
 * for a later call that restores it. */
bool jepa_autocast_set(int32_t device_type, bool enabled, int32_t dtype, bool* previous_enabled,
                       int32_t* previous_dtype, char** error);

/* Drops the casts that were kept. To be called on leaving the outermost autocast region: the parameters are
 * about to change. */
bool jepa_autocast_cache_clear(char** error);

/* --- lists of parameters and gradients ------------------------------------------------------------------- */

/* One AdamW step, equal to torch.optim.AdamW(fused=True).
 * All tensors of a call are on one device and have one dtype; params, exp_avgs and exp_avg_sqs have equal shapes
 * and strides; state_steps are float32 scalars on that device. This function adds 1 to them before the update. */
bool jepa_fused_adamw(size_t count, const jepa_tensor* params, const jepa_tensor* grads,
                      const jepa_tensor* exp_avgs, const jepa_tensor* exp_avg_sqs,
                      const jepa_tensor* state_steps, double lr, double beta1, double beta2,
                      double weight_decay, double eps, char** error);

/* targets = momentum * targets + (1 - momentum) * onlines, in the order of
 * target.mul_(momentum).add_(online, alpha=1 - momentum). Floating point only. */
bool jepa_ema(size_t count, const jepa_tensor* targets, const jepa_tensor* onlines, double momentum,
              char** error);

/* The L2 norm of all tensors together: the norm of their norms, as torch.nn.utils.clip_grad_norm_ computes it.
 * NULL handles and undefined tensors are skipped; of an empty list it is 0. *norm is a scalar tensor on the first
 * tensor's device, so that nothing waits for a GPU here. */
bool jepa_total_norm(size_t count, const jepa_tensor* tensors, jepa_tensor* norm, char** error);

/* Multiplies by min(1, max_norm / (norm + 1e-6)), in place, without waiting for a GPU: the second half of
 * clip_grad_norm_. `norm` is the first half's. Skips as jepa_total_norm does. */
bool jepa_clip(size_t count, const jepa_tensor* tensors, jepa_tensor norm, double max_norm, char** error);

/* Stores in out[i] a handle of params[i].grad, or NULL where there is no gradient. */
bool jepa_grads(size_t count, const jepa_tensor* params, jepa_tensor* out, char** error);

/* params[i].grad becomes grads[i], of the same size, dtype and device, or undefined where that is NULL. */
bool jepa_set_grads(size_t count, const jepa_tensor* params, const jepa_tensor* grads, char** error);

/* Drops the gradients: .grad becomes undefined. */
bool jepa_zero_grads(size_t count, const jepa_tensor* params, char** error);

/* One SGD step, equal to torch.optim.SGD(fused=True): weight decay is added to the gradient.
 * All tensors of a call are on one device and have one dtype; params and momentum_buffers have equal shapes and
 * strides. Buffers of zeros are those of a first step. With momentum 0 they are left alone. */
bool jepa_fused_sgd(size_t count, const jepa_tensor* params, const jepa_tensor* grads,
                    const jepa_tensor* momentum_buffers, double lr, double momentum, double weight_decay,
                    bool nesterov, char** error);

/* What LARS makes of gradients before the SGD step (which must not decay again), in place and tensor by tensor:
 * grad = trust_coefficient * |param| / (|grad| + weight_decay * |param| + eps) * (grad + weight_decay * param).
 * A gradient of zeros stays as it is, and for a parameter of zeros the factor is 1. Nothing waits for a GPU. */
bool jepa_lars_scale(size_t count, const jepa_tensor* params, const jepa_tensor* grads, double weight_decay,
                     double trust_coefficient, double eps, char** error);

/* targets = sources, tensor by tensor, in one go where they have one dtype and device. Nothing waits for a GPU. */
bool jepa_copy(size_t count, const jepa_tensor* targets, const jepa_tensor* sources, char** error);

/* A contiguous tensor of these sizes in memory of the caller's on the CPU, which begins at `start`. `release(owner)` is called once,
 * by whatever thread: when nothing refers to that memory any more, or when this fails. */
bool jepa_tensor_over(size_t dimensions, const int64_t* sizes, int32_t dtype, void* start, void* owner,
                      void (*release)(void* owner), jepa_tensor* out, char** error);

/* --- between the CPU's memory and a GPU's, once libtorch_cuda is in the process -------------------------- */

/* A contiguous tensor of these sizes, of any values, in memory of the CPU that a GPU reads by itself. What is freed serves the
 * next tensor, once no copy reads it any more. */
bool jepa_pinned(size_t dimensions, const int64_t* sizes, int32_t dtype, jepa_tensor* out, char** error);

/* Copies the tensors to a GPU, beside what is computed there and without waiting; what is queued there after this call sees
 * the copies. Those of tensors that are not pinned wait for the copying. */
bool jepa_to_gpu(size_t count, const jepa_tensor* tensors, int32_t device, jepa_tensor* out, char** error);

/* From now on this thread computes on a stream of its own on a GPU, behind what it has queued there, and not on the default one,
 * which cannot be captured (cuda/graph.cpp). */
bool jepa_own_stream(int32_t device, char** error);

/* The most bytes of a GPU that tensors have had at any moment so far. */
bool jepa_gpu_peak_bytes(int32_t device, uint64_t* bytes, char** error);

/* --- ranks: processes that train together, over libtorch's c10d ------------------------------------------- */

/* A connection to the others. Used by one thread at a time, but for its store, which any thread may set and ask. */
typedef void* jepa_comm;

/* Connects to the key-value store at host:port, within the time that every later call has too; with `serve`, this process
 * is where it is. Keys get `prefix`. The connection is closed by jepa_comm_close. */
bool jepa_comm_open(const char* host, uint16_t port, bool serve, const char* prefix, int64_t timeout_ms,
                    jepa_comm* comm, char** error);
void jepa_comm_close(jepa_comm comm);

/* Sets a key of the store for all to see. */
bool jepa_comm_set(jepa_comm comm, const char* key, const char* value, char** error);

/* The value of a key, to be freed by jepa_native_free_string, or NULL when nobody has set it in that time. */
bool jepa_comm_get(jepa_comm comm, const char* key, int64_t timeout_ms, char** value, char** error);

/* Makes the process group, which is what the functions below need; all ranks have to call it, with the same name, which no
 * other group of the store has. On CPUs it is gloo's, over the interface that has `address`; where that is NULL, that of
 * GLOO_SOCKET_IFNAME, or of the machine's name. */
bool jepa_comm_join(jepa_comm comm, const char* name, int32_t rank, int32_t size, const char* address, char** error);

/* After that: ranks with GPUs talk over NCCL about tensors there. `library` is that of cuda/build.sh, and libtorch_cuda has to be
 * in the process. */
bool jepa_comm_join_nccl(jepa_comm comm, const char* name, const char* library, char** error);

/* Leaves the process group, for good, so that whoever waits for this rank there sees that it does not come; the store stays.
 * What waits for others on a GPU ends. */
void jepa_comm_leave(jepa_comm comm);

/* All ranks call these with tensors of equal shape and dtype, in the same order; they return when it is done. A rank that has
 * ended is an error, and one that does not come is, when the time is over. */

enum { JEPA_SUM = 0, JEPA_MAX = 1 };

/* Replaces `tensor`, in place, by the sum or the maximum over all ranks. */
bool jepa_comm_all_reduce(jepa_comm comm, jepa_tensor tensor, int32_t operation, char** error);

/* The same, of sums only: what jepa_ranks_install of the bridge takes. */
bool jepa_comm_sum(jepa_comm comm, jepa_tensor tensor, char** error);

/* Stores the contiguous tensors of all ranks in `all`, which has room for them one after the other. */
bool jepa_comm_all_gather(jepa_comm comm, jepa_tensor tensor, jepa_tensor all, char** error);

/* Replaces `tensor`, in place, by that of rank `from`. */
bool jepa_comm_broadcast(jepa_comm comm, jepa_tensor tensor, int32_t from, char** error);

/* How often this rank has handed over a tensor to be added up or gathered since it joined, and how many bytes; then the same of
 * gradients, in the exchange below. */
void jepa_comm_traffic(jepa_comm comm, uint64_t counts[4]);

/* Whether any of these has failed, whoever has called it. */
bool jepa_comm_lost(jepa_comm comm);

/* --- gradients of all ranks ------------------------------------------------------------------------------- */

/* What makes the mean of gradients over all ranks, during the backward pass. Freed by jepa_exchange_close, before its comm. */
typedef void* jepa_exchange;

/* For these parameters, of one device, whose gradients travel together in parts of so many bytes. All ranks call this and the
 * functions below with equal parameters, in the same order. */
bool jepa_exchange_open(jepa_comm comm, size_t count, const jepa_tensor* params, int64_t bucket_bytes,
                        jepa_exchange* exchange, char** error);
void jepa_exchange_close(jepa_exchange exchange);

/* Before the last backward pass of a step. `figures`, floating-point numbers, become their mean over all ranks too; nobody
 * reads or changes them until the end. */
bool jepa_exchange_begin(jepa_exchange exchange, jepa_tensor figures, char** error);

/* After it: waits, and gives every parameter the mean of its gradients, those of earlier backward passes included. Where a
 * rank has none, it counts as zero; where no rank has one, there is none. */
bool jepa_exchange_finish(jepa_exchange exchange, char** error);

#ifdef __cplusplus
}
#endif

#endif
