#include "codec.h"

#include <cmath>
#include <initializer_list>

#include "half.h"
#include "kernels.h"

namespace edge {
namespace {

constexpr float kTiny = 0x1p-126f;  // formats/scaled.py: f32 scales are never denormal

// formats/nf4_double.py
float double_scale(const edge_matrix& w, int64_t panel, int64_t lane, int64_t group, int64_t groups) {
    const int64_t share = EDGE_SECOND / w.group, seconds = (groups + share - 1) / share;
    const uint8_t code = static_cast<const uint8_t*>(w.scale)[(panel * groups + group) * kPanel + lane];
    const float product = EDGE_DYNAMIC[code] * w.second[(panel * seconds + group / share) * kPanel + lane];
    return product + *w.offset;
}

float group_scale(const edge_matrix& w, int64_t panel, int64_t lane, int64_t group, int64_t groups) {
    switch (w.scale_per) {
        case EDGE_SCALE_GROUP: {
            const int64_t at = (panel * groups + group) * kPanel + lane;
            if (w.scale_encoding == EDGE_ENC_F32) return static_cast<const float*>(w.scale)[at];
            if (w.scale_encoding == EDGE_ENC_DYNAMIC8) return double_scale(w, panel, lane, group, groups);
            return half_at(w.scale, at);
        }
        case EDGE_SCALE_ROW:
            return static_cast<const float*>(w.scale)[panel * kPanel + lane];
        case EDGE_SCALE_TENSOR:
            return static_cast<const float*>(w.scale)[0];
        default:
            return 1.0f;
    }
}

// Code of nibble `i` of a group whose bytes [half][16] start at q.
int nibble(const uint8_t* q, int64_t lane, int i, int half) {
    const int64_t at = i % half * kPanel + lane;
    return i < half ? q[at] & 15 : q[at] >> 4;
}

float absmax(const float* x, int n) {
    float m = 0.0f;
    for (int i = 0; i < n; ++i) m = std::fabs(x[i]) > m ? std::fabs(x[i]) : m;
    return m;
}

float raise(float wanted) { return wanted == 0.0f ? 0.0f : (wanted > kTiny ? wanted : kTiny); }

// The least f16 at or above a wanted scale (>= 0).
uint16_t half_above(float wanted) {
    uint16_t h = float_to_half(wanted);
    if (half_to_float(h) < wanted) ++h;
    return h;
}

uint8_t e4m3_code(float y) {
    const uint32_t sign = bits_from_float(y) >> 31 << 7;
    const float magnitude = std::fabs(y);
    const float a = magnitude < 448.0f ? magnitude : 448.0f;
    uint32_t code;
    if (a < 0x1p-6f) {
        code = static_cast<uint32_t>(std::nearbyint(a * 0x1p9f));
    } else {
        const uint32_t bits = bits_from_float(a);
        code = ((bits + ((bits >> 20) & 1) + 0x7ffff) >> 20) - (120u << 3);
    }
    return static_cast<uint8_t>(sign | code);
}

void write_int4_group(const edge_kv& kv, int64_t row, int g, const float* x, int n, int* status) {
    float low = 0.0f, high = 0.0f;
    for (int i = 0; i < n; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const uint16_t h = half_above((high - low) / 15.0f);
    const float scale = half_to_float(h);
    if (scale > 65504.0f) *status = EDGE_OUT_OF_RANGE;
    const float divisor = scale == 0.0f ? INFINITY : scale;
    const float zero = std::nearbyint(-low / divisor);
    const int64_t at = row * kv.row_scales + g;
    std::memcpy(static_cast<char*>(kv.scale) + 2 * at, &h, 2);
    kv.zero[at] = static_cast<uint8_t>(zero);
    uint8_t* q = kv.codes + row * kv.row_bytes + g * kv.group / 2;
    for (int i = 0; i < n; ++i) {
        float y = std::nearbyint(x[i] / divisor) + zero;
        y = y < 0.0f ? 0.0f : (y > 15.0f ? 15.0f : y);
        const uint8_t code = static_cast<uint8_t>(y);
        q[i / 2] = static_cast<uint8_t>(i % 2 == 0 ? code : q[i / 2] | code << 4);
    }
}

// sin and cos by Cody-Waite reduction and Taylor-like polynomials in f64: good to the last bit of f32, and
// the same on every machine, which libm's are not.
void sin_cos(double x, double* s, double* c) {
    const double n = std::nearbyint(x * 0.63661977236758134308);
    double r = std::fma(n, -1.57079632673412561417e+00, x);
    r = std::fma(n, -6.07710050630396597660e-11, r);
    r = std::fma(n, -2.02226624879595063154e-21, r);
    const double z = r * r;
    double p = 1.58969099521155010221e-10;
    for (double k : {-2.50507602534068634195e-08, 2.75573137070700676789e-06, -1.98412698298579493134e-04,
                     8.33333333332248946124e-03, -1.66666666666666324348e-01})
        p = std::fma(p, z, k);
    const double sine = std::fma(p * z, r, r);
    double q = -1.13596475577881948265e-11;
    for (double k : {2.08757232129817482790e-09, -2.75573143513906633035e-07, 2.48015872894767294178e-05,
                     -1.38888888888741095749e-03, 4.16666666666666019037e-02, -0.5})
        q = std::fma(q, z, k);
    const double cosine = std::fma(q, z, 1.0);
    switch (static_cast<int64_t>(n) & 3) {
        case 0:
            *s = sine;
            *c = cosine;
            return;
        case 1:
            *s = cosine;
            *c = -sine;
            return;
        case 2:
            *s = -sine;
            *c = -cosine;
            return;
        default:
            *s = -cosine;
            *c = sine;
            return;
    }
}

}  // namespace

void read_row(const edge_matrix& w, int64_t row, float scale, float* out) {
    if (quantizes(w.encoding) && w.encoding != EDGE_ENC_I8) return read_small_codes(w, row, scale, out);
    const int64_t panel = row / kPanel, lane = row % kPanel;
    const int64_t groups = (w.cols + w.group - 1) / w.group, half = w.group / 2;
    const uint8_t* q = static_cast<const uint8_t*>(w.codes);
    const uint8_t* nibbles = q + panel * groups * half * kPanel;
    const int64_t first = panel * groups * w.group * kPanel;  // item of the panel's first input
    for (int64_t k = 0; k < w.cols; ++k) {
        const int64_t g = k / w.group, at = first + k * kPanel + lane;
        const int i = static_cast<int>(k % w.group);
        const uint8_t* group = nibbles + g * half * kPanel;
        float v = 0.0f;
        switch (w.encoding) {
            case EDGE_ENC_F32:
                v = reinterpret_cast<const float*>(q)[at];
                break;
            case EDGE_ENC_F16:
                v = half_at(q, at);
                break;
            case EDGE_ENC_BF16:
                v = bfloat_at(q, at);
                break;
            case EDGE_ENC_E4M3:
                v = e4m3_to_float(q[at]);
                break;
            case EDGE_ENC_E5M2:
                v = e5m2_to_float(q[at]);
                break;
            case EDGE_ENC_I8:
                v = static_cast<float>(q[first + k / 4 * 64 + lane * 4 + k % 4] - 128);
                break;
            default:
                v = EDGE_NF4[nibble(group, lane, i, static_cast<int>(half))];
                break;
        }
        out[k] = v * group_scale(w, panel, lane, g, groups) * scale;
    }
    for (int64_t s = 0; s < w.outliers && w.index[s] >= 0; ++s)
        out[w.index[s]] = half_at(w.outlier, (panel * w.outliers + s) * kPanel + lane) * scale;
}

bool all_finite(const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(x[i])) return false;
    return true;
}

int write_kv_row(const edge_kv& kv, int64_t row, const float* x, int n) {
    if (!all_finite(x, n)) return EDGE_NOT_FINITE;
    uint8_t* q = kv.codes + row * kv.row_bytes;
    const float top = absmax(x, n);
    int status = EDGE_OK;
    switch (kv.encoding) {
        case EDGE_ENC_F32:
            std::memcpy(q, x, static_cast<size_t>(n) * 4);
            break;
        case EDGE_ENC_F16:
            if (top > 65504.0f) return EDGE_OUT_OF_RANGE;
            for (int i = 0; i < n; ++i) {
                const uint16_t h = float_to_half(x[i]);
                std::memcpy(q + 2 * i, &h, 2);
            }
            break;
        case EDGE_ENC_I8: {
            float scale = raise(top / 127.0f);
            if (kv.per_channel) {
                const uint16_t h = half_above(top / 127.0f);
                scale = half_to_float(h);
                if (scale > 65504.0f) status = EDGE_OUT_OF_RANGE;
                std::memcpy(static_cast<char*>(kv.scale) + 2 * row, &h, 2);
            } else {
                static_cast<float*>(kv.scale)[row] = scale;
            }
            const float divisor = scale == 0.0f ? INFINITY : scale;
            for (int i = 0; i < n; ++i) {
                float y = std::nearbyint(x[i] / divisor);
                y = y < -127.0f ? -127.0f : (y > 127.0f ? 127.0f : y);
                q[i] = static_cast<uint8_t>(static_cast<int8_t>(y));
            }
            break;
        }
        case EDGE_ENC_E4M3: {
            const float scale = raise(top / 448.0f);
            static_cast<float*>(kv.scale)[row] = scale;
            const float divisor = scale == 0.0f ? INFINITY : scale;
            for (int i = 0; i < n; ++i) q[i] = e4m3_code(x[i] / divisor);
            break;
        }
        default:
            for (int g = 0; g < kv.row_scales; ++g) {
                const int left = n - g * kv.group;
                write_int4_group(kv, row, g, x + g * kv.group, left < kv.group ? left : kv.group, &status);
            }
    }
    return status;
}

void copy_kv_row(const edge_kv& kv, int64_t from, int64_t to) {
    const auto copy = [&](void* plane, int64_t nbytes) {
        char* rows = static_cast<char*>(plane);
        if (rows != nullptr)
            std::memmove(rows + to * nbytes, rows + from * nbytes, static_cast<size_t>(nbytes));
    };
    copy(kv.codes, kv.row_bytes);
    copy(kv.scale, int64_t{kv.row_scales} * (kv.encoding == EDGE_ENC_U4 ? 2 : 4));
    copy(kv.zero, kv.row_scales);
}

void fill_angles(const float* inv_freq, int n, int32_t position, float scale, float* out) {
    for (int i = 0; i < n; ++i) {
        double s, c;
        sin_cos(static_cast<double>(static_cast<float>(position) * inv_freq[i]), &s, &c);
        out[i] = static_cast<float>(c * scale);
        out[n + i] = static_cast<float>(s * scale);
    }
}

}  // namespace edge
