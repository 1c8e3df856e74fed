// The network's inference and training in kernels of our own, for x86 processors with AVX-512. A plan is a table of operations
// (op.h); `coatnet_run` carries it out on all threads with a barrier after each row. Built where a compiler is at hand.
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)

extern "C" int coatnet_supports(void) {  // before the pragma: this must run on any processor
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return 0;
    return 1 | (__builtin_cpu_supports("avx512bf16") ? 2 : 0) | (__builtin_cpu_supports("avx512vnni") ? 4 : 0);
}

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,prfchw")
#include <omp.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "attention_slope.h"
#include "gate.h"
#include "maps.h"
#include "norm_slope.h"
#include "training.h"
#include "weight_slope.h"

namespace {

void carry_out(const Op& op, int64_t thread, int64_t threads, const Ahead& later) {
    switch (op.kind) {
        case UNFOLD:
            return op.out_type == FP32 ? unfold<FP32>(op, thread, threads) : unfold<BF16>(op, thread, threads);
        case PRODUCT:
            if (op.type == FP32) return product<FP32, FP32>(op, thread, threads, later);
            if (op.type == BF16 && op.out_type == FP32) return product<BF16, FP32>(op, thread, threads, later);
            if (op.type == BF16)
                return op.out_type == BF16 ? product<BF16, BF16>(op, thread, threads, later)
                                           : product<BF16, UINT8>(op, thread, threads, later);
            return op.out_type == BF16 ? product<UINT8, BF16>(op, thread, threads, later)
                                       : product<UINT8, UINT8>(op, thread, threads, later);
        case DEPTHWISE:
            if (op.type == FP32) return depthwise<FP32, FP32>(op, thread, threads);
            if (op.type == BF16) return depthwise<BF16, BF16>(op, thread, threads);
            return depthwise<UINT8, UINT8>(op, thread, threads);
        case GATE:
            return gate(op, thread, threads);
        case SCALE:
            if (op.out_type == FP32) return scale<FP32>(op, thread, threads);
            return op.out_type == BF16 ? scale<BF16>(op, thread, threads) : scale<UINT8>(op, thread, threads);
        case GATED:
            return op.type == FP32 ? gated<FP32>(op, thread, threads) : gated<BF16>(op, thread, threads);
        case POOL:
            if (op.type == FP32) return pool<FP32>(op, thread, threads);
            return op.type == BF16 ? pool<BF16>(op, thread, threads) : pool<UINT8>(op, thread, threads);
        case NORM:
            return op.type == FP32 ? norm<FP32>(op, thread, threads) : norm<BF16>(op, thread, threads);
        case ATTENTION:
            return op.type == FP32 ? attention<FP32>(op, thread, threads) : attention<BF16>(op, thread, threads);
        case CONVERT:
            return convert<BF16>(op, thread, threads);
        case MEAN:
            return op.type == FP32 ? mean<FP32>(op, thread, threads) : mean<BF16>(op, thread, threads);
        case TANH:
            return op.type == FP32 ? tanh_map<FP32>(op, thread, threads) : tanh_map<BF16>(op, thread, threads);
        case MOMENTS:
            return moments(op, thread, threads);
        case ACTED_DEPTHWISE:
            return acted_depthwise(op, thread, threads);
        case ACTED:
            return acted(op, thread, threads);
        case GATE_SLOPE:
            return gate_slope(op, thread, threads);
        case ACTED_SLOPE:
            return acted_slope(op, thread, threads);
        case DEPTHWISE_SLOPE:
            return depthwise_slope(op, thread, threads);
        case MIXED:
            return mixed(op, thread, threads);
        case ATTENTION_SLOPE:
            return attention_slope(op, thread, threads);
        case WEIGHT_SLOPE:
            return weight_slope(op, thread, threads);
        case PACK:
            return pack_weights(op, thread, threads);
        case TOTAL:
            return total(op, thread, threads);
        case BATCH_NORM:
            return batch_norm(op, thread, threads);
        case BATCH_NORM_SLOPE:
            return batch_norm_slope(op, thread, threads);
        case NORMED:
            return normed(op, thread, threads);
        case NORMED_SUMS:
            return normed_sums(op, thread, threads);
        case SPREAD:
            return spread(op, thread, threads);
        case POOL_SLOPE:
            return pool_slope(op, thread, threads);
        case LAYER_SLOPE:
            return layer_slope(op, thread, threads);
        case EXCITE_SLOPE:
            return excite_slope(op, thread, threads);
        case BRANCH:
            return branch(op, thread, threads);
        case BORDERED:
            return bordered(op, thread, threads);
    }
}

// What a thread reads first of the next product's weights, unless they are still to be made.
Ahead weights_to_come(const Op* op, const Op* end, int64_t thread, int64_t threads) {
    for (; op < end && op->kind != PACK && op->kind != SCALE; op++)
        if (op->kind == PRODUCT) return first_panel(*op, thread, threads);
    return {nullptr, nullptr};
}

// Where threads wait for each other. OpenMP's own barrier sleeps at once where the process has more threads than cores,
// and waking takes as long as a small operation.
class Meeting {
    std::atomic<int64_t> arrived{0}, number{0};

  public:
    void wait(int64_t threads) {
        const int64_t current = number.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            number.store(current + 1, std::memory_order_release);
            return;
        }
        for (int64_t turn = 0; number.load(std::memory_order_acquire) == current; turn++) {
            if (turn < 2000)  // then give way: with other programs about, the one waited for may need this very core
                _mm_pause();
            else
                std::this_thread::yield();
        }
    }
};

}  // namespace

// Carry out `count` operations on `threads` threads; where `seconds` is given, add the time of each to it.
extern "C" void coatnet_run(const Op* ops, int64_t count, int64_t threads, double* seconds) {
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        const auto start = std::chrono::steady_clock::now();
        const int64_t thread = omp_get_thread_num(), present = omp_get_num_threads();
        carry_out(ops[i], thread, present, weights_to_come(ops + i + 1, ops + count, thread, present));
        meeting.wait(present);
        if (seconds && thread == 0)
            seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
}

// Seconds that a cache line takes from one thread to another and back; 0 where there is no other.
extern "C" double coatnet_round_trip(void) {
    constexpr int64_t TRIPS = 10000;
    alignas(64) std::atomic<int64_t> line{0};
    double seconds = 0;
#pragma omp parallel num_threads(2)
    if (omp_get_num_threads() == 2) {
        const int64_t thread = omp_get_thread_num();
        const auto start = std::chrono::steady_clock::now();
        for (int64_t trip = 0; trip < TRIPS; trip++) {
            if (thread == 0) line.store(2 * trip + 1, std::memory_order_release);
            for (int64_t turn = 0; line.load(std::memory_order_acquire) != 2 * trip + 2 - thread; turn++)
                if (turn > 100000) std::this_thread::yield();  // both may be on one core
            if (thread == 1) line.store(2 * trip + 2, std::memory_order_release);
        }
        if (thread == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return seconds / TRIPS;
}

#else

extern "C" int coatnet_supports(void) { return 0; }
extern "C" void coatnet_run(const void*, int64_t, int64_t, double*) {}
extern "C" double coatnet_round_trip(void) { return 0; }

#endif
