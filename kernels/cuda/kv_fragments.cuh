// Keys and values from the cache to the fragments of mma.m16n8k16, without shared memory. A tile is 16 keys
// at positions that are a multiple of 16; a lane is (r, q) = (lane / 4, lane % 4). Which column of a fragment
// is which key or dim is ours to choose, if queries, scores and sums follow:
//   keys    column c of key block n (0, 1) is key 4 (c / 2) + 2 n + c % 2 of the tile, so that a lane's
//   scores, and
//           the rows of values it multiplies them with, are keys 4q .. 4q+3;
//   dims    a row is cut into runs (below), in which each lane has adjacent dims: loads are as wide as they
//   can be.
// Codes become f16 exactly: a row's scale is left to the scores (K) or the weights (V); only int4, whose
// scales are those of 32 dims, is multiplied here, and rounded to f16.
#pragma once

#include "device.cuh"

namespace edge {

constexpr int kTile = 16;

// Dims first .. first + kLanes * kDims - 1 of a row, kDims of them a lane: as many bytes at once as row and
// place are aligned to. K: 4 lanes, whole steps of 4 dims (a lane's part of 16); V: 8 lanes. What is left at
// a row's end and fits no load is `guarded`: read dim by dim, zeros beyond the row.
template <class Format, int head_dim, int lanes, int first = 0, int word = 0, int step = 0, int index = 0>
struct Run {
    static constexpr int kRowBytes = Format::row_bytes(head_dim);
    static constexpr int kUnit = lanes == 4              ? Format::kKeyUnit
                                 : 8 / Format::kBits > 1 ? 8 / Format::kBits
                                                         : 1;
    static EDGE_DEVICE constexpr bool fits(int bytes) {
        const int dims = bytes * 8 / Format::kBits;
        return dims >= kUnit && dims % kUnit == 0 && first + lanes * dims <= head_dim &&
               kRowBytes % bytes == 0 && first * Format::kBits / 8 % bytes == 0;
    }
    static constexpr int kBytes = fits(16) ? 16 : fits(8) ? 8 : fits(4) ? 4 : fits(2) ? 2 : fits(1) ? 1 : 0;
    static constexpr bool kGuarded = kBytes == 0;
    static constexpr int kFirst = first, kLanes = lanes, kWord = word, kStep = step, kIndex = index;
    static constexpr int kDims = kGuarded ? (lanes == 4 ? 4 : 1) : kBytes * 8 / Format::kBits;
    static constexpr int kWords = kGuarded ? (lanes == 4 ? 2 : 1) : (kBytes + 3) / 4;
    static constexpr int kSteps = lanes == 4 ? kDims / 4 : kDims;  // of 16 dims, or blocks of 8
    static constexpr bool kLast = first + lanes * kDims >= head_dim;
    using Next = Run<Format, head_dim, lanes, first + lanes * kDims, word + kWords, step + kSteps, index + 1>;
};

template <class R>
EDGE_DEVICE constexpr int words_to(R = {}) {
    if constexpr (R::kLast)
        return R::kWord + R::kWords;
    else
        return words_to<typename R::Next>();
}
template <class R>
EDGE_DEVICE constexpr int steps_to(R = {}) {
    if constexpr (R::kLast)
        return R::kStep + R::kSteps;
    else
        return steps_to<typename R::Next>();
}
template <class R>
EDGE_DEVICE constexpr int runs_to(R = {}) {
    if constexpr (R::kLast)
        return R::kIndex + 1;
    else
        return runs_to<typename R::Next>();
}

// f(run) for every run of a row.
template <class R, class F>
EDGE_DEVICE void each_run(F&& f) {
    f(R{});
    if constexpr (!R::kLast) each_run<typename R::Next>(f);
}

// A cache format: kBits of a code; kRowScale: one f32 scale a row, which comes with the factor kFactor;
// kGroups: f16 scales and u8 zeros of 32 dims. key_dim: which of a lane's dims of a run its element e of pair
// p of step s is. keys() and values() give a step's b registers; one() gives a single dim as f16 bits.
struct KvF16 {
    static constexpr int kBits = 16, kKeyUnit = 4;
    static constexpr bool kRowScale = false, kGroups = false;
    static constexpr float kFactor = 1.0f;
    static EDGE_DEVICE constexpr int row_bytes(int head_dim) { return 2 * head_dim; }
    static EDGE_DEVICE int key_dim(int s, int p, int e) { return 4 * s + 2 * p + e; }
    template <int s>
    static EDGE_DEVICE void keys(const uint32_t* words, uint32_t, uint32_t, uint32_t (&b)[2]) {
        b[0] = words[2 * s];
        b[1] = words[2 * s + 1];
    }
    template <int s>
    static EDGE_DEVICE uint32_t values(const uint32_t* x, const uint32_t* y, uint32_t, uint32_t) {
        return byte_perm(x[s / 2], y[s / 2], s % 2 ? 0x7632 : 0x5410);
    }
    static EDGE_DEVICE uint32_t one(const EdgeKv& kv, int64_t row, int dim, int head_dim) {
        return reinterpret_cast<const uint16_t*>(kv.codes)[row * head_dim + dim];
    }
};

// 0x6400 is 1024 in f16, where the last bit counts 1: a byte below it, made unsigned, is 1024 + 128 + code.
struct KvInt8 {
    static constexpr int kBits = 8, kKeyUnit = 4;
    static constexpr bool kRowScale = true, kGroups = false;
    static constexpr float kFactor = 1.0f;
    static EDGE_DEVICE constexpr int row_bytes(int head_dim) { return head_dim; }
    static EDGE_DEVICE int key_dim(int s, int p, int e) { return 4 * s + 2 * p + e; }
    template <int s>
    static EDGE_DEVICE void keys(const uint32_t* words, uint32_t, uint32_t, uint32_t (&b)[2]) {
        const uint32_t w = words[s] ^ 0x80808080u;
        b[0] = half2_sub(byte_perm(w, 0x64646464u, 0x4140), 0x64806480u);
        b[1] = half2_sub(byte_perm(w, 0x64646464u, 0x4342), 0x64806480u);
    }
    template <int s>
    static EDGE_DEVICE uint32_t values(const uint32_t* x, const uint32_t* y, uint32_t, uint32_t) {
        const uint32_t both = byte_perm(x[s / 4], y[s / 4], 0x4400 + 0x1111 * (s % 4));
        return half2_sub(and_xor(both, 0x00ff00ffu, 0x64806480u), 0x64806480u);
    }
    static EDGE_DEVICE uint32_t one(const EdgeKv& kv, int64_t row, int dim, int head_dim) {
        const int8_t code = static_cast<int8_t>(kv.codes[row * head_dim + dim]);
        return float_to_half(static_cast<float>(code));
    }
};

// e4m3 is f16 without three bits of exponent: moved into its place it is the value / 256.
struct KvFp8 {
    static constexpr int kBits = 8, kKeyUnit = 4;
    static constexpr bool kRowScale = true, kGroups = false;
    static constexpr float kFactor = 256.0f;
    static EDGE_DEVICE constexpr int row_bytes(int head_dim) { return head_dim; }
    static EDGE_DEVICE int key_dim(int s, int p, int e) { return 4 * s + p + 2 * e; }
    // of the upper bytes of both halves
    static EDGE_DEVICE uint32_t widened(uint32_t w) { return and_or(w, 0x80008000u, (w >> 1) & 0x3f803f80u); }
    template <int s>
    static EDGE_DEVICE void keys(const uint32_t* words, uint32_t, uint32_t, uint32_t (&b)[2]) {
        b[0] = widened(words[s] << 8);
        b[1] = widened(words[s]);
    }
    template <int s>
    static EDGE_DEVICE uint32_t values(const uint32_t* x, const uint32_t* y, uint32_t, uint32_t) {
        return widened(byte_perm(x[s / 4], y[s / 4], 0x4400 + 0x1111 * (s % 4)));
    }
    static EDGE_DEVICE uint32_t one(const EdgeKv& kv, int64_t row, int dim, int head_dim) {
        return widened(static_cast<uint32_t>(kv.codes[row * head_dim + dim]) << 8);
    }
};

// Groups of 32 dims, two codes a byte. A code below the bits of 16 in f16 is 16 + code, and (16 + code) *
// scale less (16 + zero) * scale, which was rounded before, is the value but for 2^-11 of 31 scales and its
// own rounding. `scale` and `shift` = -(16 + zero) * scale are those of both halves.
struct KvInt4 {
    static constexpr int kBits = 4, kKeyUnit = 8, kGroup = 32;
    static constexpr bool kRowScale = false, kGroups = true;
    static constexpr float kFactor = 1.0f;
    static constexpr float kLargestScale = 2113.0f;  // 31 scales end f16
    static EDGE_DEVICE constexpr int row_bytes(int head_dim) { return (head_dim + 1) / 2; }
    static EDGE_DEVICE constexpr int groups(int head_dim) { return (head_dim + kGroup - 1) / kGroup; }
    static EDGE_DEVICE int key_dim(int s, int p, int e) { return s / 2 * 8 + s % 2 * 2 + p + 4 * e; }
    // Nibble `n` of both halves
    template <int n>
    static EDGE_DEVICE uint32_t scaled(uint32_t codes, uint32_t scale, uint32_t shift) {
        constexpr int kUp = 6 - 4 * n;
        const uint32_t moved = kUp > 0 ? codes << (kUp & 31) : codes >> (-kUp & 31);
        return half2_fma(and_or(moved, 0x03c003c0u, 0x4c004c00u), scale, shift);
    }
    static EDGE_DEVICE uint32_t shift_of(uint32_t scale, uint32_t zeros) {
        return half2_mul(scale, (zeros << 6) | 0xcc00cc00u);
    }
    template <int s>
    static EDGE_DEVICE void keys(const uint32_t* words, uint32_t scale, uint32_t shift, uint32_t (&b)[2]) {
        b[0] = scaled<s % 2 * 2>(words[s / 2], scale, shift);
        b[1] = scaled<s % 2 * 2 + 1>(words[s / 2], scale, shift);
    }
    template <int s>
    static EDGE_DEVICE uint32_t values(const uint32_t* x, const uint32_t* y, uint32_t scale, uint32_t shift) {
        return scaled<s % 4>(byte_perm(x[s / 8], y[s / 8], s % 8 < 4 ? 0x5410 : 0x7632), scale, shift);
    }
    static EDGE_DEVICE uint32_t one(const EdgeKv& kv, int64_t row, int dim, int head_dim) {
        const uint32_t byte = kv.codes[row * row_bytes(head_dim) + dim / 2];
        const int64_t group = row * groups(head_dim) + dim / kGroup;
        const uint32_t scale = static_cast<const uint16_t*>(kv.scale)[group];
        return scaled<0>(byte >> (dim % 2 * 4), scale, shift_of(scale, kv.zero[group])) & 0xffff;
    }
};

// What a lane keeps of `rows` rows between load and use. scale and zero are of groups: raw, so that nothing
// waits.
template <class Format, int head_dim, int lanes, int rows>
struct Rows {
    using First = Run<Format, head_dim, lanes>;
    static constexpr int kRuns = Format::kGroups ? runs_to<First>() : 1;
    uint32_t words[rows][words_to<First>()];
    uint32_t scale[rows][kRuns], zero[rows][kRuns];

    // Where a part of `lanes` begins in the cache's first row: a lane needs no more arithmetic for a row than
    // a multiple of its bytes.
    struct Start {
        const uint8_t* codes;
        const uint16_t* scale;
        const uint8_t* zero;
        int part;
    };
    static EDGE_DEVICE Start start(const EdgeKv& kv, int part) {
        Start from{kv.codes + part * First::kBytes, nullptr, nullptr, part};
        if constexpr (Format::kGroups) {
            from.scale = static_cast<const uint16_t*>(kv.scale) + group_of<First>(part);
            from.zero = kv.zero + group_of<First>(part);
        }
        return from;
    }

    // Row i, from `beyond` rows after row `at` of the cache.
    EDGE_DEVICE void load(const EdgeKv& kv, const Start& from, int i, int at, int beyond) {
        each_run<First>([&](auto run) {
            using R = decltype(run);
            uint32_t* w = &words[i][R::kWord];
            if constexpr (R::kGuarded) {
                const int dim = R::kFirst + from.part * R::kDims;
                for (int n = 0; n < R::kWords; ++n) w[n] = 0;
                for (int n = 0; n < R::kDims; ++n)
                    if (dim + n < head_dim)
                        w[n / 2] |= Format::one(kv, int64_t{at} + beyond, dim + n, head_dim) << n % 2 * 16;
            } else {
                const uint8_t* codes = from.codes + int64_t{at} * R::kRowBytes;
                codes += beyond * R::kRowBytes + R::kFirst * Format::kBits / 8;
                if constexpr (R::kBytes != First::kBytes) codes += from.part * (R::kBytes - First::kBytes);
                load_words<R::kBytes>(codes, w);
                if constexpr (Format::kGroups) {
                    constexpr int kGroups = Format::groups(head_dim);
                    const int64_t group = int64_t{at} * kGroups;
                    int further = R::kFirst / Format::kGroup;
                    if constexpr (R::kDims != First::kDims || R::kFirst % Format::kGroup != 0)
                        further = group_of<R>(from.part) - group_of<First>(from.part);
                    load_words<2>(from.scale + group + (beyond * kGroups + further), &scale[i][R::kIndex]);
                    load_words<1>(from.zero + group + (beyond * kGroups + further), &zero[i][R::kIndex]);
                }
            }
        });
    }

  private:
    template <class R>
    static EDGE_DEVICE int group_of(int part) {
        return (R::kFirst + part * R::kDims) / Format::kGroup;
    }
};

// Keys of a tile: of a lane, those of column r of both key blocks.
template <class Format, int head_dim>
struct Keys {
    Rows<Format, head_dim, 4, 2> rows;
    static constexpr int kSteps = steps_to<Run<Format, head_dim, 4>>();  // of 16 dims

    // f(step, n, b) for every step and key block.
    template <class F>
    EDGE_DEVICE void each(F&& f) const {
        each_run<Run<Format, head_dim, 4>>([&](auto run) {
            using R = decltype(run);
            uint32_t scale[2] = {}, shift[2] = {};
            if constexpr (Format::kGroups) {
                for (int n = 0; !R::kGuarded && n < 2; ++n) {
                    scale[n] = rows.scale[n][R::kIndex] * 0x10001u;
                    shift[n] = Format::shift_of(scale[n], rows.zero[n][R::kIndex] * 0x10001u);
                }
            }
            steps<R, 0>(scale, shift, f);
        });
    }

    // Which dim element e of pair p of a step is in lane q; head_dim and more are zeros.
    static EDGE_DEVICE int dim(int step, int q, int p, int e) {
        int found = head_dim;
        each_run<Run<Format, head_dim, 4>>([&](auto run) {
            using R = decltype(run);
            const int s = step - R::kStep;
            if (s >= 0 && s < R::kSteps)
                found =
                    R::kFirst + q * R::kDims + (R::kGuarded ? 4 * s + 2 * p + e : Format::key_dim(s, p, e));
        });
        return found;
    }

  private:
    template <class R, int s, class F>
    EDGE_DEVICE void steps(const uint32_t (&scale)[2], const uint32_t (&shift)[2], F& f) const {
        uint32_t b[2][2];
        for (int n = 0; n < 2; ++n) {
            if constexpr (R::kGuarded) {
                b[n][0] = rows.words[n][R::kWord];
                b[n][1] = rows.words[n][R::kWord + 1];
            } else {
                Format::template keys<s>(&rows.words[n][R::kWord], scale[n], shift[n], b[n]);
            }
        }
        f(R::kStep + s, b);
        if constexpr (s + 1 < R::kSteps) steps<R, s + 1>(scale, shift, f);
    }
};

// Values of a tile: of a lane, the part r of keys 4q .. 4q+3.
template <class Format, int head_dim>
struct Values {
    Rows<Format, head_dim, 8, 4> rows;
    static constexpr int kBlocks = steps_to<Run<Format, head_dim, 8>>();  // of 8 dims

    // f(block, b) for every block of dims.
    template <class F>
    EDGE_DEVICE void each(F&& f) const {
        each_run<Run<Format, head_dim, 8>>([&](auto run) {
            using R = decltype(run);
            uint32_t scale[2] = {}, shift[2] = {};
            if constexpr (Format::kGroups) {
                for (int n = 0; !R::kGuarded && n < 2; ++n) {
                    scale[n] = rows.scale[2 * n][R::kIndex] | rows.scale[2 * n + 1][R::kIndex] << 16;
                    shift[n] = Format::shift_of(
                        scale[n], rows.zero[2 * n][R::kIndex] | rows.zero[2 * n + 1][R::kIndex] << 16);
                }
            }
            blocks<R, 0>(scale, shift, f);
        });
    }

    // f(run, dim) for every run: block run.kStep + s of the sums has, in column c, dim run.kFirst + c *
    // run.kDims + s.
    template <class F>
    static EDGE_DEVICE void each_part(F&& f) {
        each_run<Run<Format, head_dim, 8>>(f);
    }

  private:
    template <class R, int s, class F>
    EDGE_DEVICE void blocks(const uint32_t (&scale)[2], const uint32_t (&shift)[2], F& f) const {
        uint32_t b[2];
        for (int n = 0; n < 2; ++n) {
            const uint32_t *x = &rows.words[2 * n][R::kWord], *y = &rows.words[2 * n + 1][R::kWord];
            if constexpr (R::kGuarded)
                b[n] = x[0] | y[0] << 16;
            else
                b[n] = Format::template values<s>(x, y, scale[n], shift[n]);
        }
        f(R::kStep + s, b);
        if constexpr (s + 1 < R::kSteps) blocks<R, s + 1>(scale, shift, f);
    }
};

}  // namespace edge
