// The C ABI: the choice of kernels for this CPU, and exceptions turned into NULL.
#include "edge_cpu.h"

#include <exception>
#include <memory>

#include "executor.h"
#include "kernels.h"

struct edge_executor {
    edge_executor(const edge_program& program, const edge::Kernels& kernels) : run(program, kernels) {}
    edge::Executor run;
};

namespace edge {
namespace {

bool runs(int simd) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (simd == EDGE_SIMD_AVX2) return avx2;
    if (simd == EDGE_SIMD_AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return simd == EDGE_SIMD_SCALAR;
}

const Kernels* table(int simd) {
    switch (simd) {
        case EDGE_SIMD_SCALAR:
            return scalar_kernels();
        case EDGE_SIMD_AVX2:
            return runs(simd) ? avx2_kernels() : nullptr;
        case EDGE_SIMD_AVX512:
            return runs(simd) ? avx512_kernels() : nullptr;
        case EDGE_SIMD_NEON:
            return neon_kernels();  // only built where every processor has dot products
        default:
            break;
    }
    for (int best : {EDGE_SIMD_NEON, EDGE_SIMD_AVX512, EDGE_SIMD_AVX2})
        if (const Kernels* kernels = table(best)) return kernels;
    return scalar_kernels();
}

}  // namespace

int64_t attention_floats(int heads_per_kv, int head_dim) {
    const int64_t stride = (static_cast<int64_t>(head_dim) + 15) / 16 * 16;
    const int64_t queries = static_cast<int64_t>(heads_per_kv) * kAttentionTokens;
    // two tiles of 16 rows; query, sum, shares, softmax lanes and maximum of each query
    return (32 * stride + queries * (2 * stride + 33) + 15) / 16 * 16;
}

}  // namespace edge

extern "C" {

uint64_t edge_cpu_abi(void) { return EDGE_FORMAT_ABI; }

uint64_t edge_cpu_records(void) {
    return static_cast<uint64_t>(EDGE_CPU_VERSION) << 32 | sizeof(edge_op) << 16 | sizeof(edge_program);
}

uint32_t edge_cpu_features(void) {
    uint32_t bits = 0;
    for (int simd = EDGE_SIMD_SCALAR; simd <= EDGE_SIMD_NEON; ++simd)
        if (edge::table(simd) != nullptr) bits |= 1u << simd;
    return bits;
}

int64_t edge_cpu_attention_floats(int32_t heads_per_kv, int32_t head_dim) {
    return edge::attention_floats(heads_per_kv, head_dim);
}

edge_executor* edge_cpu_create(const edge_program* program) {
    const edge::Kernels* kernels = edge::table(program->simd);
    if (kernels == nullptr || program->threads < 1) return nullptr;
    try {
        return std::make_unique<edge_executor>(*program, *kernels).release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

int32_t edge_cpu_forward(edge_executor* executor, edge_batch* batch) { return executor->run.forward(batch); }

int32_t edge_cpu_chain(edge_executor* executor, edge_batch* batch, int32_t count, int32_t* out) {
    return executor->run.chain(batch, count, out);
}

void edge_cpu_move(edge_executor* executor, const int32_t* pages, const int32_t* sources,
                   const int32_t* targets, int32_t count) {
    executor->run.move(pages, sources, targets, count);
}

int32_t edge_cpu_set_adapter(edge_executor* executor, int32_t number, const edge_adapter* adapter) {
    try {
        executor->run.set_adapter(number, adapter);
        return 1;
    } catch (const std::exception&) {
        return 0;
    }
}

void edge_cpu_destroy(edge_executor* executor) { delete executor; }

int32_t edge_cpu_trellis_search(int32_t bits, int64_t rows, int64_t chains, const float* targets,
                                const float* weights, uint8_t* codes, float* levels, int32_t simd) {
    const edge::Kernels* kernels = edge::table(simd);
    if (kernels == nullptr || bits < 2 || bits > 4) return 0;
    kernels->trellis_search({bits, rows, chains, targets, weights, codes, levels});
    return 1;
}
}
