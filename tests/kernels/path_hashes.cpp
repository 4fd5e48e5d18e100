// Runs every kernel of every instruction set of this machine on the same numbers and prints a hash of the
// result:
// "<path> <kernel> <hash>". Lines of one kernel must be equal on all paths and all processors.
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "codec.h"
#include "kernels.h"

namespace {

uint64_t state = 1;
uint32_t next() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<uint32_t>(state >> 33);
}
float uniform() { return static_cast<float>(static_cast<int32_t>(next() % 20001) - 10000) * 1e-4f; }

std::vector<float> values(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = uniform();
    return v;
}

std::vector<uint8_t> bytes(int64_t n, uint8_t mask) {
    std::vector<uint8_t> v(static_cast<size_t>(n));
    for (uint8_t& x : v) x = static_cast<uint8_t>(next()) & mask;
    return v;
}

// f16 bit patterns of positive normal numbers
std::vector<uint16_t> halves(int64_t n) {
    std::vector<uint16_t> v(static_cast<size_t>(n));
    for (uint16_t& x : v) x = static_cast<uint16_t>(0x2000 + next() % 0x1800);
    return v;
}

template <class T>
void print(const char* path, const std::string& kernel, const T* data, size_t count) {
    uint64_t hash = 1469598103934665603ULL;
    const auto* p = reinterpret_cast<const unsigned char*>(data);
    for (size_t i = 0; i < count * sizeof(T); ++i) hash = (hash ^ p[i]) * 1099511628211ULL;
    std::printf("%s %s %016llx\n", path, kernel.c_str(), static_cast<unsigned long long>(hash));
}

struct Case {
    const char* name;
    int encoding, scale_per, group, bits;
    int scale_encoding = EDGE_ENC_F16, high_bits = 0;
    bool zero = false, min = false, outliers = false;
};

const Case kMatrices[] = {
    {"f32", EDGE_ENC_F32, EDGE_SCALE_NONE, 64, 32},
    {"f16", EDGE_ENC_F16, EDGE_SCALE_NONE, 64, 16},
    {"bf16", EDGE_ENC_BF16, EDGE_SCALE_NONE, 64, 16},
    {"e5m2", EDGE_ENC_E5M2, EDGE_SCALE_NONE, 64, 8},
    {"e4m3_row", EDGE_ENC_E4M3, EDGE_SCALE_ROW, 64, 8},
    {"e4m3_tensor", EDGE_ENC_E4M3, EDGE_SCALE_TENSOR, 64, 8},
    {"e4m3_g128", EDGE_ENC_E4M3, EDGE_SCALE_GROUP, 128, 8, EDGE_ENC_F32},
    {"nf4", EDGE_ENC_NF4, EDGE_SCALE_GROUP, 64, 4},
    {"nf4_f32", EDGE_ENC_NF4, EDGE_SCALE_GROUP, 64, 4, EDGE_ENC_F32},
    {"nf4_double", EDGE_ENC_NF4, EDGE_SCALE_GROUP, 64, 4, EDGE_ENC_DYNAMIC8},
    {"i8_row_o128", EDGE_ENC_I8, EDGE_SCALE_ROW, 64, 8, EDGE_ENC_F32, 0, false, false, true},
    {"i8_row", EDGE_ENC_I8, EDGE_SCALE_ROW, 64, 8},
    {"i8_g32", EDGE_ENC_I8, EDGE_SCALE_GROUP, 32, 8},
    {"i8_g128", EDGE_ENC_I8, EDGE_SCALE_GROUP, 128, 8},
    {"u4o8_g32", EDGE_ENC_U4O8, EDGE_SCALE_GROUP, 32, 4},
    {"u4o8_g64", EDGE_ENC_U4O8, EDGE_SCALE_GROUP, 64, 4},
    {"u4o8_g128", EDGE_ENC_U4O8, EDGE_SCALE_GROUP, 128, 4},
    {"u4_g64", EDGE_ENC_U4, EDGE_SCALE_GROUP, 64, 4, EDGE_ENC_F16, 0, true},
    {"u2o2_g32", EDGE_ENC_U2O2, EDGE_SCALE_GROUP, 32, 2},
    {"u2_g128", EDGE_ENC_U2, EDGE_SCALE_GROUP, 128, 2, EDGE_ENC_F16, 0, true},
    {"u3o4_g64", EDGE_ENC_U2O4, EDGE_SCALE_GROUP, 64, 2, EDGE_ENC_F16, 1},
    {"u3_g32", EDGE_ENC_U2, EDGE_SCALE_GROUP, 32, 2, EDGE_ENC_F16, 1, true},
    {"u5o16_g128", EDGE_ENC_U4O16, EDGE_SCALE_GROUP, 128, 4, EDGE_ENC_F16, 1},
    {"u6o32_g64", EDGE_ENC_U4O32, EDGE_SCALE_GROUP, 64, 4, EDGE_ENC_F16, 2},
    {"u4_min", EDGE_ENC_U4, EDGE_SCALE_GROUP, 32, 4, EDGE_ENC_F16, 0, false, true},
    {"u5_min", EDGE_ENC_U4, EDGE_SCALE_GROUP, 32, 4, EDGE_ENC_F16, 1, false, true},
    {"q2_k", EDGE_ENC_U2, EDGE_SCALE_GROUP, 16, 2, EDGE_ENC_U4U4, 0},
    {"q3_k", EDGE_ENC_U2O4, EDGE_SCALE_GROUP, 16, 2, EDGE_ENC_I8, 1},
    {"q4_k", EDGE_ENC_U4, EDGE_SCALE_GROUP, 32, 4, EDGE_ENC_U8, 0, false, true},
    {"q5_k", EDGE_ENC_U4, EDGE_SCALE_GROUP, 32, 4, EDGE_ENC_U8, 1, false, true},
    {"q6_k", EDGE_ENC_U4O32, EDGE_SCALE_GROUP, 16, 4, EDGE_ENC_I8, 2},
    {"mxfp4", EDGE_ENC_E2M1, EDGE_SCALE_GROUP, 32, 4, EDGE_ENC_E8M0, 0},
    {"nvfp4", EDGE_ENC_E2M1, EDGE_SCALE_GROUP, 16, 4, EDGE_ENC_E4M3, 0},
};

// Scales of groups in a byte, against another scale or as exponents.
bool quantized_scales(int encoding) {
    return encoding == EDGE_ENC_U4U4 || encoding == EDGE_ENC_I8 || encoding == EDGE_ENC_U8 ||
           encoding == EDGE_ENC_E8M0 || encoding == EDGE_ENC_E4M3;
}

void matrices(const char* path, const edge::Kernels& k) {
    constexpr int64_t kRows = 90, kCols = 300, kTokens = 15, kPanels = 6;
    for (const Case& c : kMatrices) {
        state = 7;
        const int64_t unit = c.group < EDGE_SMALLEST_UNIT ? EDGE_SMALLEST_UNIT : c.group;
        const int64_t padded = (kCols + unit - 1) / unit * unit, groups = padded / c.group;
        const int64_t items = kPanels * 16 * padded;
        // f16 and bf16 codes stay below their exponents of Inf, fp8 below NaN
        const uint8_t mask =
            c.bits == 16 || c.encoding == EDGE_ENC_E4M3 || c.encoding == EDGE_ENC_E5M2 ? 0xb7 : 0xff;
        std::vector<uint8_t> codes = bytes(items * c.bits / 8, mask);
        if (c.encoding == EDGE_ENC_F32) {
            const std::vector<float> w = values(items);
            std::memcpy(codes.data(), w.data(), codes.size());
        }
        const std::vector<uint16_t> half_scales = halves(kPanels * groups * 16);
        const std::vector<float> row_scales = values(kPanels * 16);
        const std::vector<uint8_t> zero = bytes(kPanels * groups * 16, 15);
        const std::vector<float> x = values(kTokens * kCols), bias = values(kRows);
        const std::vector<float> group_scales = values(kPanels * groups * 16), offset = {0.3f};
        const std::vector<uint8_t> scale_codes = bytes(kPanels * groups * 16, 0xff);
        const std::vector<uint16_t> outlier = halves(kPanels * 3 * 16);
        const int32_t index[] = {65, 299, -1};
        edge_matrix w{};
        w.codes = codes.data();
        w.scale = row_scales.data();
        if (c.scale_per == EDGE_SCALE_GROUP)
            w.scale = c.scale_encoding == EDGE_ENC_F16   ? static_cast<const void*>(half_scales.data())
                      : c.scale_encoding == EDGE_ENC_F32 ? static_cast<const void*>(group_scales.data())
                                                         : scale_codes.data();
        w.scale_encoding = c.scale_encoding;
        w.second = group_scales.data();
        w.offset = offset.data();
        if (c.outliers) {
            w.outlier = outlier.data();
            w.index = index;
            w.outliers = 3;
        }
        w.zero = c.zero ? zero.data() : nullptr;
        w.rows = kRows;
        w.cols = kCols;
        w.encoding = c.encoding;
        w.scale_per = c.scale_per;
        w.group = c.group;
        const std::vector<uint8_t> high = bytes(items * c.high_bits / 8, 0xff);
        const std::vector<uint8_t> small = bytes(kPanels * groups * 16, 0x77),
                                   minima = bytes(2 * groups * 96, 0xb7);
        const std::vector<uint16_t> super = halves(kPanels * 2 * 16), super_min = halves(super.size());
        w.high_bits = c.high_bits;
        w.high = c.high_bits == 0 ? nullptr : high.data();
        w.min = c.min ? minima.data() : nullptr;
        if (quantized_scales(c.scale_encoding)) {
            w.scale = small.data();
            w.super = c.scale_encoding == EDGE_ENC_E4M3 ? static_cast<const void*>(row_scales.data())
                                                        : super.data();
            w.super_min = super_min.data();
        }
        std::vector<int8_t> a(static_cast<size_t>(kTokens * padded));
        std::vector<float> scales(static_cast<size_t>(kTokens * groups));
        std::vector<int32_t> sums(scales.size());
        for (int64_t t = 0; t < kTokens; ++t) {
            // The order of tokens, and what is in the sums, belong to a path; the results do not
            const edge::TokenBlock block = edge::token_block(t, kTokens, k.largest_block);
            edge::QuantizeArgs q{};
            q.x = x.data() + t * kCols;
            q.n = kCols;
            q.padded = padded;
            q.group = c.group;
            q.offset = k.offset(c.encoding);
            q.skip = w.index;
            q.skips = w.outliers;
            q.block = block.size;
            q.codes = a.data() + block.first * padded + 4 * (t - block.first);
            q.scales = scales.data() + block.first * groups + t - block.first;
            q.sums = sums.data() + block.first * groups + t - block.first;
            k.quantize(q);
        }
        std::vector<float> out(static_cast<size_t>(kTokens * kRows));
        edge::LinearArgs args{};
        args.weight = &w;
        args.bias = bias.data();
        args.out = out.data();
        args.x = x.data();
        args.codes = a.data();
        args.scales = scales.data();
        args.sums = sums.data();
        args.out_stride = kRows;
        args.x_stride = kCols;
        args.code_stride = padded;
        args.group_stride = groups;
        args.tokens = kTokens;
        k.linear(w)(args, 0, kPanels);
        print(path, std::string("linear_") + c.name, out.data(), out.size());
        for (int64_t r = 0; r < kRows; ++r) edge::read_row(w, r, 1.5f, out.data());
        print(path, std::string("row_") + c.name, out.data(), kCols);
    }
}

void rows(const char* path, const edge::Kernels& k) {
    state = 11;
    constexpr int64_t kWidth = 203;
    std::vector<float> x = values(kWidth), y = values(kWidth), w = values(kWidth), out(kWidth);
    for (int64_t i = 0; i < kWidth; ++i) x[static_cast<size_t>(i)] *= 20.0f;
    for (int kind : {EDGE_OP_SILU, EDGE_OP_GELU, EDGE_OP_GELU_TANH, EDGE_OP_RELU}) {
        k.activation(kind, x.data(), y.data(), out.data(), kWidth);
        print(path, "activation_" + std::to_string(kind), out.data(), out.size());
    }
    for (int kind : {EDGE_OP_NORM_RMS, EDGE_OP_NORM_LAYER}) {
        for (int group : {0, 29}) {
            edge_op op{};
            op.kind = kind;
            op.group = group;
            op.x_width = op.out_width = kWidth;
            op.vec = w.data();
            op.bias = y.data();
            op.eps = 1e-5f;
            k.norm(op, x.data(), out.data());
            print(path, "norm_" + std::to_string(kind) + "_" + std::to_string(group), out.data(), out.size());
        }
    }
    for (int kind : {EDGE_OP_ROUND_E4M3, EDGE_OP_ROUND_I8}) {
        for (float scale : {0.0f, 0.11f}) {
            k.round(kind, scale, x.data(), out.data(), kWidth);
            print(path, "round_" + std::to_string(kind) + (scale == 0.0f ? "_own" : "_given"), out.data(),
                  out.size());
        }
    }
    k.add(x.data(), y.data(), 0.3f, out.data(), kWidth);
    print(path, "add", out.data(), out.size());
    std::vector<float> angles(46);
    edge::fill_angles(w.data(), 23, 1234567, 1.1f, angles.data());
    print(path, "angles", angles.data(), angles.size());
    edge_op op{};
    op.x_width = 4 * 50;
    op.head_dim = 50;
    op.freqs = 23;
    out = x;
    k.rope(op, angles.data(), out.data());
    print(path, "rope", out.data(), out.size());
    out = x;
    k.finish_logits(out.data(), kWidth, 0.7f, 5.0f);
    print(path, "logits", out.data(), out.size());
}

constexpr int kHeads = 6, kKvHeads = 2, kTokens = 3;

// Attention of kTokens queries from `position` on, in a cache of six pages that lie shuffled. open: the keys
// of the tokens' own page where K is per channel.
std::vector<float> attend(const edge::Kernels& k, const edge_cache& cache, int page_tokens, int position,
                          float softcap, const float* open, std::vector<float> q) {
    const int head_dim = cache.head_dim;
    const int32_t table[] = {3, 0, 5, 1, 2, 4};
    const int32_t positions[] = {position, position + 1, position + 2};
    std::vector<float> out(q.size());
    std::vector<float> scratch(static_cast<size_t>(edge::attention_floats(kHeads / kKvHeads, head_dim)));
    edge_op op{};
    op.x = q.data();
    op.out = out.data();
    op.x_width = op.out_width = kHeads * head_dim;
    op.heads = kHeads;
    op.kv_heads = kKvHeads;
    op.head_dim = head_dim;
    op.scale = 0.9f;
    op.window = head_dim == 64 ? 37 : 0;
    op.softcap = softcap;
    edge::AttentionArgs args{};
    args.op = &op;
    args.cache = &cache;
    args.page_table = table;
    args.positions = positions;
    args.tokens = kTokens;
    args.page_tokens = page_tokens;
    args.scratch = scratch.data();
    for (int head = 0; head < kKvHeads; ++head) {
        args.kv_head = head;
        args.head_begin = head * kHeads / kKvHeads;
        args.head_end = (head + 1) * kHeads / kKvHeads;
        if (open != nullptr) args.open = open + head * head_dim;
        k.attention(args);
    }
    return out;
}

void attention(const char* path, const edge::Kernels& k) {
    constexpr int kPages = 6, kPageTokens = 16, kPosition = 70;
    for (int encoding : {EDGE_ENC_F32, EDGE_ENC_F16, EDGE_ENC_I8, EDGE_ENC_U4, EDGE_ENC_E4M3}) {
        for (int head_dim : {64, 20}) {
            state = 13;
            edge_cache cache{};
            cache.kv_heads = kKvHeads;
            cache.head_dim = head_dim;
            edge_kv kv{};
            kv.encoding = encoding;
            kv.group = encoding == EDGE_ENC_U4 ? 32 : head_dim;
            kv.row_scales = (head_dim + kv.group - 1) / kv.group;
            kv.row_bytes = encoding == EDGE_ENC_F32   ? 4 * head_dim
                           : encoding == EDGE_ENC_F16 ? 2 * head_dim
                           : encoding == EDGE_ENC_U4  ? (head_dim + 1) / 2
                                                      : head_dim;
            const int64_t count = static_cast<int64_t>(kPages) * kKvHeads * kPageTokens;
            std::vector<uint8_t> codes(static_cast<size_t>(count * kv.row_bytes)),
                zero(static_cast<size_t>(count * 4));
            std::vector<float> scale(static_cast<size_t>(count * 4));
            kv.codes = codes.data();
            kv.scale = scale.data();
            kv.zero = zero.data();
            cache.k = cache.v = kv;
            for (int64_t row = 0; row < count; ++row)
                edge::write_kv_row(kv, row, values(head_dim).data(), head_dim);
            const std::string name = std::to_string(encoding) + "_" + std::to_string(head_dim);
            print(path, "kv_" + name, codes.data(), codes.size());
            const std::vector<float> out =
                attend(k, cache, kPageTokens, kPosition, head_dim == 64 ? 2.0f : 0.0f, nullptr,
                       values(kTokens * kHeads * head_dim));
            print(path, "attention_" + name, out.data(), out.size());
        }
    }
}

// K per channel: pages of channels, and the keys of the tokens' own page as they came.
void channels(const char* path, const edge::Kernels& k) {
    constexpr int kPages = 6, kPosition = 70;
    for (int encoding : {EDGE_ENC_I8, EDGE_ENC_U4}) {
        for (int page_tokens : {16, 32}) {
            for (int head_dim : {64, 20}) {
                state = 17;
                edge_cache cache{};
                cache.kv_heads = kKvHeads;
                cache.head_dim = head_dim;
                edge_kv& kv = cache.k;
                kv.encoding = encoding;
                kv.group = 32;
                kv.row_scales = kv.per_channel = 1;
                kv.row_bytes = encoding == EDGE_ENC_U4 ? page_tokens / 2 : page_tokens;
                const int64_t rows = static_cast<int64_t>(kPages) * kKvHeads * head_dim;
                std::vector<uint8_t> codes(static_cast<size_t>(rows * kv.row_bytes)),
                    zero(static_cast<size_t>(rows));
                std::vector<uint16_t> scale(static_cast<size_t>(rows));
                kv.codes = codes.data();
                kv.scale = scale.data();
                kv.zero = zero.data();
                for (int64_t row = 0; row < rows; ++row)
                    edge::write_kv_row(kv, row, values(page_tokens).data(), page_tokens);
                std::vector<float> v =
                    values(static_cast<int64_t>(kPages) * kKvHeads * page_tokens * head_dim);
                cache.v.encoding = EDGE_ENC_F32;
                cache.v.codes = reinterpret_cast<uint8_t*>(v.data());
                cache.v.row_bytes = 4 * head_dim;
                const std::string name = std::to_string(encoding) + "_" + std::to_string(page_tokens) + "_" +
                                         std::to_string(head_dim);
                print(path, "channels_" + name, codes.data(), codes.size());
                print(path, "channel_scales_" + name, scale.data(), scale.size());
                std::vector<float> q = values(kTokens * kHeads * head_dim);
                const std::vector<float> open = values(9 * kKvHeads * head_dim);  // positions 64 to 72
                const std::vector<float> out =
                    attend(k, cache, page_tokens, kPosition, 0.0f, open.data(), std::move(q));
                print(path, "channel_attention_" + name, out.data(), out.size());
            }
        }
    }
}

// The keys of the last positions lie at other places than their positions, as in a tree of tokens.
void bent_attention(const char* path, const edge::Kernels& k) {
    state = 17;
    constexpr int kHeadDim = 48, kRows = 48, kPosition = 37, kBend = 29;
    edge_cache cache{};
    cache.kv_heads = 1;
    cache.head_dim = kHeadDim;
    edge_kv kv{};
    kv.encoding = EDGE_ENC_I8;
    kv.group = kv.row_bytes = kHeadDim;
    kv.row_scales = 1;
    std::vector<uint8_t> codes(kRows * kHeadDim);
    std::vector<float> scale(kRows);
    kv.codes = codes.data();
    kv.scale = scale.data();
    cache.k = cache.v = kv;
    for (int64_t row = 0; row < kRows; ++row) edge::write_kv_row(kv, row, values(kHeadDim).data(), kHeadDim);
    const int32_t table[] = {1, 2, 0}, positions[] = {kPosition};
    const int32_t places[] = {40, 29, 31, 38, 33, 47, 30, 44, 36};
    std::vector<float> q = values(2 * kHeadDim), out(q.size());
    std::vector<float> scratch(static_cast<size_t>(edge::attention_floats(2, kHeadDim)));
    edge_op op{};
    op.x = q.data();
    op.out = out.data();
    op.x_width = op.out_width = 2 * kHeadDim;
    op.heads = 2;
    op.kv_heads = 1;
    op.head_dim = kHeadDim;
    op.scale = 0.3f;
    op.window = 30;
    edge::AttentionArgs args{};
    args.op = &op;
    args.cache = &cache;
    args.page_table = table;
    args.positions = positions;
    args.path = places;
    args.bend = kBend;
    args.tokens = 1;
    args.head_end = 2;
    args.page_tokens = 16;
    args.scratch = scratch.data();
    k.attention(args);
    print(path, "attention_bent", out.data(), out.size());
}

void low_rank(const char* path, const edge::Kernels& k) {
    state = 19;
    constexpr int64_t kRows = 90, kCols = 75, kTokens = 7, kRank = 13, kPadded = 16, kPanels = 6;
    const std::vector<uint16_t> a = halves(kPadded * 80), b = halves(kPanels * 16 * kRank);
    const std::vector<float> x = values(kTokens * kCols);
    std::vector<float> u(static_cast<size_t>(kTokens * kPadded)), out = values(kTokens * kRows);
    edge::LowRankArgs args{};
    args.weight = a.data();
    args.x = x.data();
    args.u = u.data();
    args.out = out.data();
    args.x_stride = kCols;
    args.u_stride = kPadded;
    args.out_stride = kRows;
    args.tokens = kTokens;
    args.cols = kCols;
    args.rank = kRank;
    args.rows = kRows;
    args.scale = 0.7f;
    k.low_rank_in(args, 0, kPadded);
    print(path, "low_rank_in", u.data(), u.size());
    args.weight = b.data();
    k.low_rank_out(args, 0, kPanels);
    print(path, "low_rank_out", out.data(), out.size());
}

}  // namespace

int main() {
    const char* names[] = {"auto", "scalar", "avx2", "avx512", "neon"};
    const uint32_t features = edge_cpu_features();
    const edge::Kernels* tables[] = {nullptr, edge::scalar_kernels(), edge::avx2_kernels(),
                                     edge::avx512_kernels(), edge::neon_kernels()};
    for (int simd = EDGE_SIMD_SCALAR; simd <= EDGE_SIMD_NEON; ++simd) {
        if (!(features >> simd & 1)) continue;
        matrices(names[simd], *tables[simd]);
        rows(names[simd], *tables[simd]);
        attention(names[simd], *tables[simd]);
        channels(names[simd], *tables[simd]);
        bent_attention(names[simd], *tables[simd]);
        low_rank(names[simd], *tables[simd]);
    }
    return 0;
}
