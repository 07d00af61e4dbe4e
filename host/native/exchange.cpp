// The gradients of all ranks become their mean, while the backward pass that makes them goes on.
//
// Gradients travel in buckets: flat tensors, filled from the end of the parameters to their beginning, as a backward pass
// reaches them. One that is full goes off when those before it have, so that all ranks send the same at the same time; what
// a pass has not reached is sent as zeros at its end, so that nobody waits for it. Which parameter is where depends on
// nothing but the parameters: sums are made in the same order in every step and after every restart.

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "comm.h"
#include "guarded.h"

namespace {

// The first bucket is small, so that it goes off early.
constexpr std::int64_t first_bytes = 1 << 20;

struct Slot {
    at::Tensor param;
    std::shared_ptr<torch::autograd::Node> accumulator;
    // Part of the bucket, as the parameter lies in memory.
    at::Tensor part;
    std::size_t bucket, place;
    bool filled;
};

struct Bucket {
    // The gradients, and behind them for each whether there is one: 1 or 0. It is `marks` that are written, on the CPU.
    at::Tensor flat, present, marks;
    std::size_t slots, filled;
    c10::intrusive_ptr<c10d::Work> work;
};

class Exchange : public std::enable_shared_from_this<Exchange> {
  public:
    Exchange(const Comm& comm, bool on_gpu)
        : group_(on_gpu && comm.of_gradients_of_gpus ? comm.of_gradients_of_gpus : comm.of_gradients),
          traffic_(comm.of_gradient_traffic),
          lost_(comm.lost) {}

    void adopt(const std::vector<at::Tensor>& params, std::int64_t bucket_bytes) {
        std::size_t begin = params.size();
        while (begin > 0) {
            const std::size_t end = begin;
            const std::int64_t limit = buckets_.empty() ? std::min(first_bytes, bucket_bytes) : bucket_bytes;
            std::int64_t bytes = 0, numbers = 0;
            do {
                const auto& param = params[--begin];
                bytes += static_cast<std::int64_t>(param.nbytes());
                numbers += param.numel();
            } while (begin > 0 && bytes < limit && params[begin - 1].scalar_type() == params[end - 1].scalar_type());
            add_bucket(params, begin, end, numbers);
        }
        for (auto& slot : slots_) {
            slot.accumulator = torch::autograd::impl::grad_accumulator(slot.param);
            // What wants no gradient has none, on any rank.
            if (!slot.accumulator) continue;
            auto hook = [weak = weak_from_this(), at = &slot](const auto& outputs, const auto&) {
                if (const auto exchange = weak.lock()) exchange->ready(*at);
                return outputs;
            };
            slot.accumulator->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(std::move(hook)));
        }
    }

    // The backward pass that follows is the step's last; `figures` become their mean meanwhile.
    void begin(const at::Tensor& figures) {
        const std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(!under_way_, "an exchange of gradients is under way");
        figures_ = figures;
        of_figures_ = send(figures_);
        for (auto& slot : slots_) slot.filled = false;
        for (auto& bucket : buckets_) bucket.filled = 0;
        next_ = 0;
        under_way_ = true;
    }

    // Waits for the means, which are the parameters' gradients then. A parameter that has none on any rank has none.
    void finish() {
        const std::lock_guard<std::mutex> lock(mutex_);
        TORCH_CHECK(under_way_, "no exchange of gradients is under way");
        under_way_ = false;
        for (auto& slot : slots_) {
            if (!slot.filled) fill(slot);
        }
        const double share = 1.0 / group_->getSize();
        wait_for(*of_figures_);
        // Not a product: the mean of equal numbers is that number, to the bit.
        figures_.div_(group_->getSize());
        for (auto& bucket : buckets_) {
            wait_for(*bucket.work);
            bucket.flat.mul_(share);
        }
        // Reading waits for a GPU: once at most for each bucket, and a parameter without a gradient is rare.
        std::vector<at::Tensor> present(buckets_.size());
        for (auto& slot : slots_) {
            auto& grad = slot.param.mutable_grad();
            if (grad.defined()) continue;
            auto& of_bucket = present[slot.bucket];
            if (!of_bucket.defined()) of_bucket = buckets_[slot.bucket].present.to(at::kCPU, at::kFloat).contiguous();
            if (of_bucket.data_ptr<float>()[slot.place] > 0) grad = slot.part;
        }
    }

  private:
    void add_bucket(const std::vector<at::Tensor>& params, std::size_t begin, std::size_t end, std::int64_t numbers) {
        const auto count = static_cast<std::int64_t>(end - begin);
        Bucket bucket;
        bucket.flat = at::zeros({numbers + count}, params[begin].options().requires_grad(false));
        bucket.present = bucket.flat.narrow(0, numbers, count);
        bucket.marks = at::zeros({count}, at::kFloat);
        bucket.slots = end - begin;
        std::int64_t offset = 0;
        for (std::size_t i = end; i-- > begin;) {
            const auto& param = params[i];
            const auto strides = param.is_non_overlapping_and_dense()
                                     ? param.strides().vec()
                                     : at::empty_like(param, at::MemoryFormat::Contiguous).strides().vec();
            auto part = bucket.flat.as_strided(param.sizes(), strides, offset);
            slots_.push_back({param, nullptr, part, buckets_.size(), end - 1 - i, false});
            offset += param.numel();
        }
        buckets_.push_back(std::move(bucket));
    }

    void ready(Slot& slot) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!under_way_ || slot.filled) return;
        at::NoGradGuard no_grad;
        fill(slot);
    }

    void fill(Slot& slot) {
        auto& bucket = buckets_[slot.bucket];
        auto& grad = slot.param.mutable_grad();
        slot.filled = true;
        bucket.marks.data_ptr<float>()[slot.place] = grad.defined() ? 1 : 0;
        if (grad.defined()) {
            slot.part.copy_(grad);
            // Its own memory is free for the next.
            grad = slot.part;
        } else {
            slot.part.zero_();
        }
        ++bucket.filled;
        for (; next_ < buckets_.size() && buckets_[next_].filled == buckets_[next_].slots; ++next_) {
            auto& full = buckets_[next_];
            full.present.copy_(full.marks, /*non_blocking=*/true);
            full.work = send(full.flat);
        }
    }

    // An error, in the midst of a backward pass too, is that of all ranks.
    template <typename Body>
    auto together(Body body) {
        try {
            return body();
        } catch (...) {
            *lost_ = true;
            throw;
        }
    }

    c10::intrusive_ptr<c10d::Work> send(const at::Tensor& flat) {
        const Quiet quiet;
        std::vector<at::Tensor> tensors{flat};
        traffic_->count(flat);
        return together([&] { return group_->allreduce(tensors, c10d::AllreduceOptions()); });
    }

    void wait_for(c10d::Work& work) {
        together([&] { return work.wait(); });
    }

    const c10::intrusive_ptr<c10d::Backend> group_;
    const std::shared_ptr<Traffic> traffic_;
    const std::shared_ptr<std::atomic<bool>> lost_;
    // A GPU's part of a backward pass is on a thread of its own.
    std::mutex mutex_;
    std::vector<Slot> slots_;
    std::vector<Bucket> buckets_;
    at::Tensor figures_;
    c10::intrusive_ptr<c10d::Work> of_figures_;
    std::size_t next_ = 0;
    bool under_way_ = false;
};

std::shared_ptr<Exchange>& opened(jepa_exchange exchange) {
    return *static_cast<std::shared_ptr<Exchange>*>(exchange);
}

}  // namespace

bool jepa_exchange_open(jepa_comm comm, size_t count, const jepa_tensor* params, int64_t bucket_bytes,
                        jepa_exchange* out, char** error) {
    return guarded(error, [&] {
        const auto& joined = *static_cast<Comm*>(comm);
        TORCH_CHECK(joined.of_gradients, "the ranks have not been joined");
        std::vector<at::Tensor> tensors;
        for (size_t i = 0; i < count; ++i) tensors.push_back(tensor(params[i]));
        auto exchange = std::make_shared<Exchange>(joined, count > 0 && tensors[0].is_cuda());
        exchange->adopt(tensors, bucket_bytes);
        *out = new std::shared_ptr<Exchange>(std::move(exchange));
    });
}

void jepa_exchange_close(jepa_exchange exchange) { delete static_cast<std::shared_ptr<Exchange>*>(exchange); }

bool jepa_exchange_begin(jepa_exchange exchange, jepa_tensor figures, char** error) {
    return guarded(error, [&] { opened(exchange)->begin(tensor(figures)); });
}

bool jepa_exchange_finish(jepa_exchange exchange, char** error) {
    return guarded(error, [&] {
        const Quiet quiet;
        opened(exchange)->finish();
    });
}
