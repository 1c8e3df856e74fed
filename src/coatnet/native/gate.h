// Squeeze-excite: gates from the channels' means, and what they scale. A gate on the input channels of a product is a
// factor of its weights too: of those, image by image, where a map has more pixels than the product has columns.
#pragma once
#include <vector>

#include "product.h"

INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16<true>(_mm512_min_ps(negative, _mm512_set1_ps(80.0f)))));
}

INLINE float sigmoid(float x) { return _mm512_cvtss_f32(sigmoid(_mm512_set1_ps(x))); }

// Squeeze-excite of one image: channels' means (C), what they are squeezed to (S), before and after SiLU, and the gates (C).
// squeeze is (S, C), excite (S, C) too, transposed; S is `width`, C is `depth`.
struct Excited {
    const Op& op;
    const int64_t C = op.depth, S = op.width;
    std::vector<float> means = std::vector<float>(C + 16), raw = std::vector<float>(S), squeezed = raw, gates = means;

    // `of`: sums of an image's lines, `stride` rows of C numbers apart, to means over all pixels.
    void take_means(const float* of, int64_t stride, std::vector<float>& out) const {
        const __m512 pixels = _mm512_set1_ps(float(op.lines * op.cells));
        for (int64_t c = 0; c < C; c += 16) {
            __m512 total = _mm512_setzero_ps();
            for (int64_t line = 0; line < op.lines; line++)
                total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(tail(C - c), of + line * stride * C + c));
            _mm512_storeu_ps(&out[c], _mm512_div_ps(total, pixels));
        }
    }

    // A row of weights (C) times a vector.
    INLINE float dot(const float* row, const std::vector<float>& vector) const {
        __m512 total = _mm512_setzero_ps();
        for (int64_t c = 0; c < C; c += 16) {
            _mm_prefetch((const char*)(row + c) + AHEAD, _MM_HINT_T0);
            total = _mm512_fmadd_ps(_mm512_loadu_ps(&vector[c]), _mm512_maskz_loadu_ps(tail(C - c), row + c), total);
        }
        return _mm512_reduce_add_ps(total);
    }

    // Add to channels first to last of `out` the rows of weights (S, C), each times its number.
    void add_rows(const float* weights, const std::vector<float>& by_row, int64_t first, int64_t last, float* out) const {
        for (int64_t s = 0; s < S; s++)  // in the order that the weights lie in
            for (int64_t c = first; c < last; c += 16) {
                _mm_prefetch(weights + (s + 4) * C + c, _MM_HINT_T0);  // four rows on
                const __m512 w = _mm512_maskz_loadu_ps(tail(C - c), weights + s * C + c);
                _mm512_storeu_ps(out + c, _mm512_fmadd_ps(_mm512_set1_ps(by_row[s]), w, _mm512_loadu_ps(out + c)));
            }
    }

    // From sums of lines to the gates of channels first to last, whole vectors.
    void excite(const float* sums, int64_t stride, int64_t first, int64_t last) {
        take_means(sums, stride, means);
        for (int64_t s = 0; s < S; s++) {
            raw[s] = dot(op.squeeze + s * C, means) + op.squeeze_bias[s];
            squeezed[s] = raw[s] * sigmoid(raw[s]);
        }
        for (int64_t c = first; c < last; c += 16)
            _mm512_storeu_ps(&gates[c], _mm512_maskz_loadu_ps(tail(C - c), op.excite_bias + c));
        add_rows(op.excite, squeezed, first, last, gates.data());
        for (int64_t c = first; c < last; c += 16) _mm512_storeu_ps(&gates[c], sigmoid(_mm512_loadu_ps(&gates[c])));
    }
};

// GATE: sums (B, lines, C), `stride` rows of C numbers from line to line -> sigmoid(excite . silu(squeeze . mean)) into out,
// (B, C) fp32. Where there are more threads than images, several work on one: each squeezes for itself and excites its
// share of channels.
inline void gate(const Op& op, int64_t thread, int64_t threads) {
    Excited of = {op};
    const int64_t C = of.C, vectors = (C + 15) / 16;
    const int64_t parts = op.images < threads ? std::min((threads + op.images - 1) / op.images, vectors) : 1;
    const Share share(op.images * parts, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / parts;
        const Share own(vectors, unit % parts, parts);
        const int64_t first = 16 * own.first, last = std::min(16 * own.last, C);
        of.excite(op.sums + image * op.lines * op.stride * C, op.stride, first, last);
        std::copy(&of.gates[first], &of.gates[last], (float*)op.out + image * C + first);
    }
}

// EXCITE_SLOPE: sums of lines (B, lines, 2, C): of the gates' gradients, and of what was gated. Gives the gates again, and the
// gradient that each pixel has through them (made_slopes); for the gradients of the weights, in `out`, a row an image:
// the gradients before the sigmoid (C), the means (C), the gradients before SiLU (S), and what comes after it (S).
inline void excite_slope(const Op& op, int64_t thread, int64_t threads) {
    Excited of = {op};
    const int64_t C = of.C, S = of.S;
    const Share share(op.images, thread, threads);
    const float pixels = op.lines * op.cells;
    std::vector<float> slopes(C + 16), by_squeezed(S);
    for (int64_t image = share.first; image < share.last; image++) {
        const float* sums = op.sums + image * op.lines * 2 * C;
        of.excite(sums + C, 2, 0, C);
        of.take_means(sums, 2, slopes);  // times 1 / pixels, as the gradients of the pixels want them
        float* const out = (float*)op.out + image * 2 * (C + S);
        for (int64_t c = 0; c < C; c++) {
            op.made_gates[image * C + c] = of.gates[c];
            slopes[c] *= of.gates[c] * (1 - of.gates[c]);
            out[c] = slopes[c] * pixels;
            out[C + c] = of.means[c];
        }
        for (int64_t s = 0; s < S; s++) {
            const float gate = sigmoid(of.raw[s]);
            by_squeezed[s] = of.dot(op.excite + s * C, slopes) * gate * (1 + of.raw[s] * (1 - gate));
            out[2 * C + s] = by_squeezed[s] * pixels;
            out[2 * C + S + s] = of.squeezed[s];
        }
        std::fill(slopes.begin(), slopes.end(), 0.0f);
        of.add_rows(op.squeeze, by_squeezed, 0, C, slopes.data());
        std::copy_n(slopes.data(), C, op.made_slopes + image * C);
    }
}

// SCALE: weights (panels, K, 32) fp32 times the gates (B, K) -> packed weights of each image; for 8 bit, with a scale a
// column that fits them, and the bias less what the zero points of the input add up to.
template <int OUT>
void scale(const Op& op, int64_t thread, int64_t threads) {
    const int64_t panels = (op.width + PANEL - 1) / PANEL, K = op.depth;
    const Share share(op.images * panels, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / panels, panel = unit % panels;
        const float* gates = (const float*)op.source + image * K;
        char* out = op.out + image * op.weight_image + panel * K * 32 * bytes(OUT);
        for (int64_t half = 0; half < 2; half++) {
            const float* w = (const float*)op.weight + panel * K * 32 + half * 16;
            auto row = [&](int64_t k) INLINE_LAMBDA {
                if (half == 0) {
                    _mm_prefetch((const char*)(w + k * 32) + AHEAD, _MM_HINT_T0);
                    _mm_prefetch((const char*)(w + k * 32 + 16) + AHEAD, _MM_HINT_T0);
                }
                return _mm512_mul_ps(_mm512_loadu_ps(w + k * 32), _mm512_set1_ps(gates[k]));
            };
            char* to = out + half * 64;
            if constexpr (OUT == FP32)
                for (int64_t k = 0; k < K; k++) _mm512_storeu_ps(to + k * 128, row(k));
            if constexpr (OUT == BF16)
                for (int64_t k = 0; k < K; k += 2) _mm512_storeu_si512(to + k / 2 * 128, pairs(row(k), row(k + 1)));
            if constexpr (OUT == UINT8) {
                __m512 largest = _mm512_set1_ps(std::numeric_limits<float>::min());
                for (int64_t k = 0; k < K; k++) largest = _mm512_max_ps(largest, _mm512_abs_ps(row(k)));
                const __m512 unit_size = _mm512_div_ps(largest, _mm512_set1_ps(127.0f));
                const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), largest);
                __m512 zeros = _mm512_setzero_ps();
                for (int64_t k = 0; k < K; k += 4) {
                    __m512i word = _mm512_setzero_si512();
                    for (int j = 0; j < 4; j++) {
                        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(row(k + j), inverse));
                        zeros = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(op.source_zero[k + j]), zeros);
                        word = _mm512_or_si512(
                            word, _mm512_slli_epi32(_mm512_and_si512(q, _mm512_set1_epi32(255)), 8 * j));
                    }
                    _mm512_storeu_si512(to + k / 4 * 128, word);
                }
                const int64_t column = panel * PANEL + half * 16, place = image * panels * PANEL + column;
                _mm512_storeu_ps(op.made_scale + place, unit_size);
                _mm512_storeu_ps(op.made_bias + place,
                                 _mm512_fnmadd_ps(unit_size, zeros,
                                                  _mm512_maskz_loadu_ps(tail(op.width - column), op.bias + column)));
            }
        }
    }
}

// GATED: each channel of an image's map times its gate, (B, C) fp32.
template <int TYPE>
void gated(const Op& op, int64_t thread, int64_t threads) {
    const int64_t units = op.images * op.lines, line = op.cells * op.width * bytes(TYPE);
    const Share share(units, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++)
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            const __m512 gate = _mm512_maskz_loadu_ps(mask, op.gates + unit / op.lines * op.width + c);
            for (int64_t at = unit * line + c * bytes(TYPE), x = 0; x < op.cells; x++, at += op.width * bytes(TYPE))
                store<TYPE>(op.out + at, _mm512_mul_ps(load<TYPE>(op.source + at, mask), gate), mask);
        }
}
