"""Kernels that try the emulator: right ones, racing ones, and those that break CUDA's rules."""

from __future__ import annotations

SOURCE = """
#include "device.cuh"

namespace edge {

struct Args {
    const void* a;
    const void* b;
    void* out;
    int32_t n;
};

// Sum of n values by one block: out[blockIdx.x] of the run of n that is its own.
template <int kWarps, bool kBarrier>
EDGE_DEVICE void block_sum(const Args& args) {
    EDGE_SHARED float part[kWarps];
    const float* x = static_cast<const float*>(args.a) + static_cast<int64_t>(blockIdx.x) * args.n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < args.n; i += blockDim.x) sum += x[i];
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAll, sum, i);
    if (lane() == 0) part[warp()] = sum;
    if constexpr (kBarrier) __syncthreads();
    if (threadIdx.x != 64) return;
    float all = 0.0f;
    for (int i = 0; i < kWarps; ++i) all += part[i];
    static_cast<float*>(args.out)[blockIdx.x] = all;
}

// out[i] = x of the thread beside it, by way of shared memory, n times over.
template <bool kSecond>
EDGE_DEVICE void rotate(const Args& args) {
    char* memory = dynamic_shared();
    int32_t* values = static_cast<int32_t*>(static_cast<void*>(memory));
    int32_t mine = static_cast<const int32_t*>(args.a)[threadIdx.x];
    for (int i = 0; i < args.n; ++i) {
        values[threadIdx.x] = mine;
        __syncthreads();
        mine = values[(threadIdx.x + 1) % blockDim.x];
        if constexpr (kSecond) __syncthreads();
    }
    static_cast<int32_t*>(args.out)[threadIdx.x] = mine;
}

// a (32 lanes, 4 words), b (32, 2), out (32, 4): fragments as they are.
template <bool kUnsigned>
EDGE_DEVICE void product_i8(const Args& args) {
    const uint32_t* a = static_cast<const uint32_t*>(args.a) + lane() * 4;
    const uint32_t* b = static_cast<const uint32_t*>(args.b) + lane() * 2;
    const uint32_t fa[4] = {a[0], a[1], a[2], a[3]}, fb[2] = {b[0], b[1]};
    int32_t d[4] = {1, 1, 1, 1};
    for (int i = 0; i < args.n; ++i) mma_i8<kUnsigned>(d, fa, fb);
    for (int i = 0; i < 4; ++i) static_cast<int32_t*>(args.out)[lane() * 4 + i] = d[i];
}
template <bool kBfloat>
EDGE_DEVICE void product_f16(const Args& args) {
    const uint32_t* a = static_cast<const uint32_t*>(args.a) + lane() * 4;
    const uint32_t* b = static_cast<const uint32_t*>(args.b) + lane() * 2;
    const uint32_t fa[4] = {a[0], a[1], a[2], a[3]}, fb[2] = {b[0], b[1]};
    float d[4] = {1, 1, 1, 1};
    for (int i = 0; i < args.n; ++i) mma_f16<kBfloat>(d, fa, fb);
    for (int i = 0; i < 4; ++i) static_cast<float*>(args.out)[lane() * 4 + i] = d[i];
}

// out (n, 32): what each lane gets from shuffles and votes.
EDGE_DEVICE void exchanges(const Args& args) {
    int32_t* out = static_cast<int32_t*>(args.out) + lane();
    const int32_t me = 100 + lane();
    out[0] = __shfl_sync(kAll, me, lane() / 4);
    out[32] = __shfl_xor_sync(kAll, me, 5);
    out[64] = __shfl_up_sync(kAll, me, 3);
    out[96] = __shfl_down_sync(kAll, me, 7);
    out[128] = static_cast<int32_t>(__ballot_sync(kAll, lane() % 3 == 0));
    out[160] = __any_sync(kAll, lane() == 9) + 2 * __all_sync(kAll, lane() < 31);
    out[192] = static_cast<int32_t>(__shfl_sync(kAll, static_cast<int64_t>(me) << 32, 31) >> 32);
}

// out (z, y, x): which block wrote there, counted from 1.
EDGE_DEVICE void blocks(const Args& args) {
    const uint32_t at = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int32_t* count = static_cast<int32_t*>(args.out);
    static_cast<int32_t*>(args.out)[1 + at] = 1 + atomicAdd(count, threadIdx.x == 0 ? 1 : 0);
}

// Shared memory as it was when the block began.
EDGE_DEVICE void fresh(const Args& args) {
    EDGE_SHARED uint32_t words[64];
    uint32_t* more = static_cast<uint32_t*>(static_cast<void*>(dynamic_shared()));
    uint32_t* out = static_cast<uint32_t*>(args.out) + blockIdx.x * 64;
    out[threadIdx.x] = words[threadIdx.x] | more[threadIdx.x];
    words[threadIdx.x] = more[threadIdx.x] = 0;
}

EDGE_DEVICE void some_leave(const Args& args) {
    if (threadIdx.x >= static_cast<uint32_t>(args.n)) return;
    __syncthreads();
    static_cast<int32_t*>(args.out)[threadIdx.x] = 1;
}
EDGE_DEVICE void never_met(const Args& args) {
    if (threadIdx.x % 32 < 5 && args.n != 0) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}
EDGE_DEVICE void two_places(const Args& args) {
    if (threadIdx.x < 32 && args.n != 0)
        __syncthreads();
    else
        __syncthreads();
}
EDGE_DEVICE void two_shuffles(const Args& args) {
    int32_t v = args.n;
    if (lane() < 16)
        v = __shfl_sync(kAll, v, 0);
    else
        v = __shfl_sync(kAll, v, 1);
    static_cast<int32_t*>(args.out)[threadIdx.x] = v;
}
EDGE_DEVICE void half_a_warp(const Args& args) {
    if (lane() >= args.n) return;
    static_cast<int32_t*>(args.out)[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}
EDGE_DEVICE void half_a_mask(const Args& args) {
    static_cast<int32_t*>(args.out)[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);
}
EDGE_DEVICE void beyond_shared(const Args& args) { dynamic_shared()[args.n] = 1; }
EDGE_DEVICE void beyond_static(const Args& args) {
    EDGE_SHARED float part[8];
    part[args.n + threadIdx.x / 32] = 1.0f;
    __syncthreads();
    static_cast<float*>(args.out)[threadIdx.x] = part[0];
}
EDGE_DEVICE void write(const Args& args) { static_cast<uint8_t*>(args.out)[args.n] = 1; }

}  // namespace edge

EDGE_KERNEL(block_sum, 128, edge::Args, edge::block_sum<4, true>)
EDGE_KERNEL(racing_sum, 128, edge::Args, edge::block_sum<4, false>)
EDGE_KERNEL(rotate, 96, edge::Args, edge::rotate<true>)
EDGE_KERNEL(racing_rotate, 96, edge::Args, edge::rotate<false>)
EDGE_KERNEL(product_u8, 32, edge::Args, edge::product_i8<true>)
EDGE_KERNEL(product_s8, 32, edge::Args, edge::product_i8<false>)
EDGE_KERNEL(product_f16, 32, edge::Args, edge::product_f16<false>)
EDGE_KERNEL(product_bf16, 32, edge::Args, edge::product_f16<true>)
EDGE_KERNEL(exchanges, 32, edge::Args, edge::exchanges)
EDGE_KERNEL(blocks, 33, edge::Args, edge::blocks)
EDGE_KERNEL(fresh, 64, edge::Args, edge::fresh)
EDGE_KERNEL(some_leave, 128, edge::Args, edge::some_leave)
EDGE_KERNEL(never_met, 64, edge::Args, edge::never_met)
EDGE_KERNEL(two_places, 64, edge::Args, edge::two_places)
EDGE_KERNEL(two_shuffles, 32, edge::Args, edge::two_shuffles)
EDGE_KERNEL(half_a_warp, 64, edge::Args, edge::half_a_warp)
EDGE_KERNEL(tail_warp, 48, edge::Args, edge::half_a_warp)
EDGE_KERNEL(half_a_mask, 32, edge::Args, edge::half_a_mask)
EDGE_KERNEL(beyond_shared, 32, edge::Args, edge::beyond_shared)
EDGE_KERNEL(beyond_static, 64, edge::Args, edge::beyond_static)
EDGE_KERNEL(write, 1, edge::Args, edge::write)
"""

# Runs some of them without Python: results and messages, a line each
PROGRAM = """
#include <cstdint>
#include <cstdio>
#define KERNEL(name) extern "C" const char* emu_##name(unsigned, unsigned, unsigned, size_t, const void*);
KERNEL(block_sum) KERNEL(product_u8) KERNEL(product_f16) KERNEL(product_bf16)
KERNEL(rotate) KERNEL(exchanges) KERNEL(never_met)
struct Record { const void* a; const void* b; void* out; int32_t n; };
template <class T>
static void show(const char* name, const char* wrong, const T& values) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < sizeof values; ++i)
        hash = (hash ^ reinterpret_cast<const unsigned char*>(&values)[i]) * 0x100000001b3u;
    std::printf("%s %s %016llx\\n", name, wrong == nullptr ? "ran" : wrong, (unsigned long long)hash);
}
int main() {
    static float x[5000];
    static uint32_t words[256];
    for (int i = 0; i < 5000; ++i) x[i] = static_cast<float>(i * 7919 % 257) * 0.37f;
    for (int i = 0; i < 256; ++i) words[i] = 0x3c00bc00u + static_cast<uint32_t>(i) * 0x00110007u;
    float sums[5] = {}, products[128] = {};
    int32_t dots[128] = {}, turned[96] = {}, lanes[224] = {};
    const Record sum{x, nullptr, sums, 1000}, byte{words, words, dots, 2}, half{words, words, products, 2};
    const Record turn{words, nullptr, turned, 50}, lane{nullptr, nullptr, lanes, 0};
    const Record bad{nullptr, nullptr, lanes, 1};
    show("block_sum", emu_block_sum(5, 1, 1, 0, &sum), sums);
    show("product_u8", emu_product_u8(1, 1, 1, 0, &byte), dots);
    show("product_f16", emu_product_f16(1, 1, 1, 0, &half), products);
    show("product_bf16", emu_product_bf16(1, 1, 1, 0, &half), products);
    show("rotate", emu_rotate(1, 1, 1, 384, &turn), turned);
    show("exchanges", emu_exchanges(1, 1, 1, 0, &lane), lanes);
    std::printf("%s\\n", emu_never_met(1, 1, 1, 0, &bad));
    show("exchanges", emu_exchanges(1, 1, 1, 0, &lane), lanes);
}
"""
