// Rows of f32 values turned into inputs of linear ops (EdgeInputs), with what comes before them on the way:
// prepare<Source, Kind, kVectors, kWhole>, a block of kRowThreads threads for each row of the grid's x.
//  - Source: PlainRows, NormRows<layer>, ActivatedRows<kind, gated>
//  - Kind: IntInputs<group>, HalfInputs, BfloatInputs, FloatInputs
//  - kVectors: of a row that a thread keeps; best ceil(width / 1024), at most 8, but any is right
//  - kWhole: width is a multiple of 4, and rows, weight and bias are aligned to 16 bytes
// Where nothing is needed of the whole row (no norm, no HalfInputs) the grid's y may share it among blocks,
// best ceil(padded width / 1024) of them with kVectors 1; otherwise it is 1.
#pragma once

#include "rows.cuh"

namespace edge {

constexpr int kInputTokens = 8;  // tokens of a block of inputs

// Where a token's inputs lie: chunk 0 of its codes, group 0 of its scales.
struct TokenInputs {
    uint8_t* codes;
    float* scales;
    int32_t* sums;
    int chunks, groups;

    EDGE_DEVICE TokenInputs(const EdgeInputs& in, int row) : chunks(in.chunks), groups(in.groups) {
        const int64_t block = row / kInputTokens, slot = row % kInputTokens;
        codes = in.codes + (block * chunks * kInputTokens + slot) * 64;
        scales = in.scales + block * groups * kInputTokens + slot;
        sums = in.sums == nullptr ? nullptr : in.sums + block * groups * kInputTokens + slot;
    }
    EDGE_DEVICE void store(int chunk, int byte, uint32_t word) const {
        if (chunk < chunks)
            *reinterpret_cast<uint32_t*>(codes + static_cast<int64_t>(chunk) * kInputTokens * 64 + byte) =
                word;
    }
};

EDGE_DEVICE uint32_t pack_codes(int32_t a, int32_t b, int32_t c, int32_t d) {
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<uint32_t>(d) << 24;
}

// 2^e for e in -149 .. 127.
EDGE_DEVICE float power_of_two(int e) {
    return float_of(e >= -126 ? static_cast<uint32_t>(e + 127) << 23 : 1u << (e + 149));
}
// The greatest e with 2^e <= v, for v > 0.
EDGE_DEVICE int exponent_of(float v) {
    if (v < 0x1p-126f) return static_cast<int>(bits_of(product(v, 0x1p24f)) >> 23) - 151;
    return static_cast<int>(bits_of(v) >> 23) - 127;
}

EDGE_DEVICE uint32_t bfloat_bits(float v) {  // nearest even; NaN stays one
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7fffffff) > kInfinite) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// int8 codes with a scale for each kGroup inputs: scale = absmax / 127, code = round_half_even(x / scale); a
// group of zeros has scale 0. Input 32m + 16h + 4q + i of a chunk of 64 is byte 16q + 8m + 4h + i.
template <int kGroup>
struct IntInputs {
    static_assert(kGroup == 16 || kGroup == 32 || kGroup == 64 || kGroup == 128);
    static constexpr int kChunkVectors = 16;
    static constexpr int kLanes = kGroup / 4;  // that share a group
    static constexpr bool kWholeRow = false;

    // Vector `at` of the row; returns the greatest magnitude of it.
    static EDGE_DEVICE uint32_t store(const TokenInputs& in, int at, const Floats4& v, int) {
        uint32_t top = magnitude(v);
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) top = larger(top, __shfl_xor_sync(kAll, top, mask));
        // exact for any magnitude, as multiples of 127 are
        const float scale = Divisor{1.0f, 127.0f, 1.0f / 127.0f}.of(float_of(top));
        const Divisor by = divisor(scale);
        const int32_t a = nearest_i8(by.of(v.x)), b = nearest_i8(by.of(v.y)), c = nearest_i8(by.of(v.z)),
                      d = nearest_i8(by.of(v.w));
        const int j = at % 16;
        in.store(at / 16, 16 * (j % 4) + 8 * (j / 8) + 4 * (j / 4 % 2), pack_codes(a, b, c, d));
        const int group = at / kLanes;
        const bool mine = at % kLanes == 0 && group < in.groups;
        if (mine) in.scales[static_cast<int64_t>(group) * kInputTokens] = scale;
        if (in.sums != nullptr) {
            int32_t sum = a + b + c + d;
#pragma unroll
            for (int mask = 1; mask < kLanes; mask *= 2) sum += __shfl_xor_sync(kAll, sum, mask);
            if (mine) in.sums[static_cast<int64_t>(group) * kInputTokens] = sum;
        }
        return top;
    }
    static EDGE_DEVICE void store_scale(const TokenInputs&, int) {}
};

// Two 16-bit values a word. Input 16m + 8h + 2q + i of a chunk of 32 is half 8q + 4m + 2h + i.
EDGE_DEVICE void store_halves(const TokenInputs& in, int at, uint32_t low, uint32_t high) {
    const int j = at % 8, byte = 32 * (j % 2) + 8 * (j / 4) + 4 * (j / 2 % 2);
    in.store(at / 8, byte, low);
    in.store(at / 8, byte + 16, high);
}

// f16 of x / 2^e, with 2^e as the row's scale: its greatest magnitude comes to lie in [1, 2).
struct HalfInputs {
    static constexpr int kChunkVectors = 8;
    static constexpr bool kWholeRow = true;

    static EDGE_DEVICE uint32_t store(const TokenInputs& in, int at, const Floats4& v, int e) {
        // Two factors, as 2^-e alone may be beyond f32. Both products are exact, but of values that f16 ends
        // far above.
        const float half = power_of_two(-e / 2), rest = power_of_two(-e - -e / 2);
        const auto scaled = [&](float x) { return product(product(x, half), rest); };
        store_halves(in, at, pack_halves(scaled(v.x), scaled(v.y)), pack_halves(scaled(v.z), scaled(v.w)));
        return 0;  // the row's greatest was looked at before
    }
    static EDGE_DEVICE void store_scale(const TokenInputs& in, int e) { in.scales[0] = power_of_two(e); }
};

// bf16 as it comes, nearest even.
struct BfloatInputs {
    static constexpr int kChunkVectors = 8;
    static constexpr bool kWholeRow = false;

    static EDGE_DEVICE uint32_t store(const TokenInputs& in, int at, const Floats4& v, int) {
        const uint32_t a = bfloat_bits(v.x), b = bfloat_bits(v.y), c = bfloat_bits(v.z), d = bfloat_bits(v.w);
        store_halves(in, at, a | b << 16, c | d << 16);
        // a value beyond bf16 has become Inf
        return larger(larger(a & 0x7fff, b & 0x7fff), larger(c & 0x7fff, d & 0x7fff)) << 16;
    }
    static EDGE_DEVICE void store_scale(const TokenInputs& in, int) { in.scales[0] = 1.0f; }
};

// f32 in the row's order, 16 a chunk.
struct FloatInputs {
    static constexpr int kChunkVectors = 4;
    static constexpr bool kWholeRow = false;

    static EDGE_DEVICE uint32_t store(const TokenInputs& in, int at, const Floats4& v, int) {
        const int chunk = at / 4;
        if (chunk < in.chunks) {
            uint8_t* to = in.codes + static_cast<int64_t>(chunk) * kInputTokens * 64 + 16 * (at % 4);
            *reinterpret_cast<Floats4*>(to) = v;
        }
        return magnitude(v);
    }
    static EDGE_DEVICE void store_scale(const TokenInputs& in, int) { in.scales[0] = 1.0f; }
};

// A source gives a row's vectors: `early` reads what no kernel writes, `complete` the rest, and `value` is
// what becomes of it, once `look` has seen the whole row.

// The rows as they are.
struct PlainRows {
    template <bool kWhole>
    struct Of {
        using Item = Floats4;
        RowIn<kWhole> x;

        EDGE_DEVICE explicit Of(const EdgePrepare& p) : x{p.x, p.width} {}
        EDGE_DEVICE void choose(int64_t token) { x.values += token * x.width; }
        EDGE_DEVICE void early(int, Item&) const {}
        EDGE_DEVICE void complete(int at, Item& i) const { i = x.load(at); }
        template <class Run, class Load>
        EDGE_DEVICE bool look(const Run&, const Load&, const EdgePrepare&) {
            return true;
        }
        EDGE_DEVICE Floats4 value(int, const Item& i) const { return i; }
    };
};

// Their norm, over the whole row.
template <bool kLayer>
struct NormRows {
    template <bool kWhole>
    struct Of {
        using Item = NormItem;
        RowIn<kWhole> x, weight, bias;
        Norm<kLayer, kRowThreads> norm;

        EDGE_DEVICE explicit Of(const EdgePrepare& p)
            : x{p.x, p.width}, weight{p.weight, p.width}, bias{p.bias, p.width} {}
        EDGE_DEVICE void choose(int64_t token) { x.values += token * x.width; }
        EDGE_DEVICE void early(int at, Item& i) const { i.weight = weight.load(at); }
        EDGE_DEVICE void complete(int at, Item& i) const { i.x = x.load(at); }
        template <class Run, class Load>
        EDGE_DEVICE bool look(const Run& kept, const Load& load, const EdgePrepare& p) {
            EDGE_SHARED float shared[2 * kRowWarps];
            return norm.look(kept, load, p.width, p.eps, shared);
        }
        EDGE_DEVICE Floats4 value(int at, const Item& i) const {
            const Floats4 v = norm.value(i);
            return bias.values == nullptr ? v : sum(v, bias.load(at));
        }
    };
};

// kKind(x), times y where it is gated.
template <Activation kKind, bool kGated>
struct ActivatedRows {
    template <bool kWhole>
    struct Of {
        using Item = Floats4;
        RowIn<kWhole> x, y;

        EDGE_DEVICE explicit Of(const EdgePrepare& p) : x{p.x, p.width}, y{p.y, p.width} {}
        EDGE_DEVICE void choose(int64_t token) {
            x.values += token * x.width;
            if constexpr (kGated) y.values += token * y.width;
        }
        EDGE_DEVICE void early(int, Item&) const {}
        EDGE_DEVICE void complete(int at, Item& i) const {
            const Floats4 v = x.load(at);
            const Floats4 u = kGated ? y.load(at) : Floats4{};
            i = {activate<kKind>(v.x), activate<kKind>(v.y), activate<kKind>(v.z), activate<kKind>(v.w)};
            if constexpr (kGated)
                i = {product(i.x, u.x), product(i.y, u.y), product(i.z, u.z), product(i.w, u.w)};
        }
        template <class Run, class Load>
        EDGE_DEVICE bool look(const Run&, const Load&, const EdgePrepare&) {
            return true;
        }
        EDGE_DEVICE Floats4 value(int, const Item& i) const { return i; }
    };
};

// rows 0: row t is token t; 1: row j is token logit_rows[j], for j < counts[EDGE_LOGITS]. Columns from width
// to the end of the chunks become zeros. Raises NOT_FINITE.
template <class Source, class Kind, int kVectors, bool kWhole>
EDGE_DEVICE void prepare(const EdgePrepare& p) {
    EDGE_SHARED uint32_t tops[kRowWarps];
    using From = typename Source::template Of<kWhole>;
    using Item = typename From::Item;
    From source(p);
    const int first = static_cast<int>(blockIdx.y) * kRowThreads + static_cast<int>(threadIdx.x);
    const int step = static_cast<int>(gridDim.y) * kRowThreads;
    Kept<kVectors, Item> kept(first, step, p.inputs.chunks * Kind::kChunkVectors);
    kept.keep([&](int at, Item& i) { source.early(at, i); });
    wait_for_inputs();

    const int row = static_cast<int>(blockIdx.x);
    const int count = p.step.counts[p.rows == 0 ? EDGE_TOKENS : EDGE_LOGITS];
    // A row of tokens is read before it is known to be one: buffers hold as many as the grid has, and the
    // wait for the count is not added to theirs.
    if (p.rows != 0 && row >= count) return;
    source.choose(p.rows == 0 ? row : p.step.logit_rows[row]);
    kept.keep([&](int at, Item& i) { source.complete(at, i); });
    if (row >= count) return;

    const auto load = [&](int at) {
        Item i;
        source.early(at, i);
        source.complete(at, i);
        return i;
    };
    uint32_t worst = source.look(kept, load, p) ? 0 : kInfinite;
    int e = 0;
    if constexpr (Kind::kWholeRow) {
        uint32_t top = 0;
        kept.each(load, [&](int at, const Item& i) { top = larger(top, magnitude(source.value(at, i))); });
        top = row_max<kRowThreads>(top, tops);
        worst = larger(worst, top);
        e = top == 0 || top >= kInfinite ? 0 : exponent_of(float_of(top));
    }
    const TokenInputs inputs(p.inputs, row);
    const RowOut<kWhole> out{p.out + static_cast<int64_t>(row) * p.width, p.width};
    kept.each(load, [&](int at, const Item& i) {
        const Floats4 v = source.value(at, i);
        if (p.out != nullptr) out.store(at, v);
        worst = larger(worst, Kind::store(inputs, at, v, e));
    });
    if (first == 0) Kind::store_scale(inputs, e);
    check(p.step, worst);
}

}  // namespace edge
