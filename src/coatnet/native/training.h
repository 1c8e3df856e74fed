// What training does to the wide maps of MBConv, in as few passes over memory as the order of things allows. Maps are
// bf16, (images, lines, cells, width). BatchNorm in training is a factor and a shift once its statistics are known; the
// activations between two products are computed again where they are needed and never stored.
//
// Sums are written line by line, or strip by strip where lines are done in strips, as (images, lines or strips, 2, width),
// so that they do not depend on the number of threads.
#pragma once
#include <vector>

#include "product.h"

constexpr int64_t STRIP = 14;  // lines that a thread does in one go, with the line before and after computed again

inline int64_t line_bytes(const Op& op) { return 2 * op.cells * op.width; }

INLINE __m512 by_channel(const float* values, int64_t c, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, values + c); }

INLINE void keep_sums(const Op& op, int64_t unit, int64_t c, __mmask16 mask, __m512 first, __m512 second, bool adds = false) {
    float *const to = op.sums + 2 * unit * op.width + c, *const next = to + op.width;
    const __mmask16 added = adds ? mask : 0;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(first, _mm512_maskz_loadu_ps(added, to)));
    _mm512_mask_storeu_ps(next, mask, _mm512_add_ps(second, _mm512_maskz_loadu_ps(added, next)));
}

// 16 channels of one line: where they are, what BatchNorm does to them, and what is summed over the line's pixels.
struct Channels {
    int64_t image, first;
    __mmask16 mask;
    __m512 factor = _mm512_setzero_ps(), shift = factor, sum = factor, second = factor;
    INLINE __m512 read(const char* map, int64_t at) const { return load<BF16>(map + at, mask); }
    INLINE __m512 normed(__m512 value) const { return _mm512_fmadd_ps(value, factor, shift); }
};

// Call `pixel(channels, at)` for every pixel, `at` bytes into any of the maps, line after line; keep each line's sums.
template <class Pixel>
INLINE void each_pixel(const Op& op, int64_t thread, int64_t threads, Pixel pixel) {
    const Share share(op.images * op.lines, thread, threads);
    for (int64_t line = share.first; line < share.last; line++)
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            Channels s = {line / op.lines, c, mask};
            if (op.factor) s.factor = by_channel(op.factor, c, mask), s.shift = by_channel(op.shift, c, mask);
            const int64_t first = line * line_bytes(op) + 2 * c, end = first + line_bytes(op);
            for (int64_t at = first; at < end; at += 2 * op.width) pixel(s, at);
            keep_sums(op, line, c, mask, s.sum, s.second);
        }
}

// MOMENTS: the sums of source and of its square.
inline void moments(const Op& op, int64_t thread, int64_t threads) {
    each_pixel(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 h = s.read(op.source, at);
        s.sum = _mm512_add_ps(s.sum, h);
        s.second = _mm512_fmadd_ps(h, h, s.second);
    });
}

// ACTED: out = gelu(factor * source + shift), and its sums (the second ones are 0).
inline void acted(const Op& op, int64_t thread, int64_t threads) {
    each_pixel(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 a = gelu<false>(s.normed(s.read(op.source, at)));
        s.sum = _mm512_add_ps(s.sum, a);
        store<BF16>(op.out + at, a, s.mask);
    });
}

// GATE_SLOPE: the sums of gradient * a, where a = gelu(factor * source + shift); the second ones are 0.
inline void gate_slope(const Op& op, int64_t thread, int64_t threads) {
    each_pixel(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 a = gelu<false>(s.normed(s.read(op.source, at)));
        s.sum = _mm512_fmadd_ps(s.read(op.gradient, at), a, s.sum);
    });
}

// ACTED_SLOPE: with z = factor * source + shift, a = gelu(z): the gradient of z, (gradient * gate + mean_slope) *
// gelu'(z), over the gradient itself; its sums, alone and times source; and out = a * gate.
inline void acted_slope(const Op& op, int64_t thread, int64_t threads) {
    each_pixel(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 gate = by_channel(op.gates + s.image * op.width, s.first, s.mask);
        const __m512 mean_slope = by_channel(op.mean_slopes + s.image * op.width, s.first, s.mask);
        const __m512 h = s.read(op.source, at), z = s.normed(h);
        const Gelu a = gelu_with_slope(z);
        store<BF16>(op.out + at, _mm512_mul_ps(a.value, gate), s.mask);
        const __m512 above = _mm512_fmadd_ps(s.read(op.gradient, at), gate, mean_slope);
        const __m512 slope = _mm512_mul_ps(above, a.slope);
        s.sum = _mm512_add_ps(s.sum, slope);
        s.second = _mm512_fmadd_ps(slope, h, s.second);
        store<BF16>(op.gradient + at, slope, s.mask);
    });
}

// One line of numbers by (channel, pixel) within 3 lines that slide down a map: line y is at (y mod 3).
struct Ring {
    int64_t width, size;
    std::vector<float> values;
    Ring(int64_t cells, int64_t width) : width(width), size((cells + 2) * width), values(3 * size + 16) {}
    float* line(int64_t y) { return values.data() + (y + 3) % 3 * size + width; }  // a pixel of zeros on either side
    void clear(int64_t y) { std::fill_n(line(y) - width, size, 0.0f); }
};

// ACTED_DEPTHWISE: out = 3x3 depthwise convolution of gelu(factor * source + shift), and the moments of out.
inline void acted_depthwise(const Op& op, int64_t thread, int64_t threads) {
    const int64_t strips = (op.lines + STRIP - 1) / STRIP;
    const Share share(op.images * strips, thread, threads);
    const float* weights = (const float*)op.weight;
    Ring ring(op.cells, op.width);
    auto fill = [&](int64_t image, int64_t y) {
        if (y < 0 || y >= op.lines) return ring.clear(y);
        const char* from = op.source + (image * op.lines + y) * line_bytes(op);
        float* to = ring.line(y);
        for (int64_t x = 0; x < op.cells; x++)
            for (int64_t c = 0; c < op.width; c += 16) {
                const __mmask16 mask = tail(op.width - c);
                const __m512 z = _mm512_fmadd_ps(load<BF16>(from + 2 * (x * op.width + c), mask),
                                                 by_channel(op.factor, c, mask), by_channel(op.shift, c, mask));
                _mm512_mask_storeu_ps(to + x * op.width + c, mask, gelu<false>(z));
            }
    };
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / strips, first = unit % strips * STRIP, last = std::min(first + STRIP, op.lines);
        fill(image, first - 1);
        fill(image, first);
        for (int64_t y = first; y < last; y++) {
            fill(image, y + 1);
            const int64_t line = image * op.lines + y;
            for (int64_t c = 0; c < op.width; c += 16) {
                const __mmask16 mask = tail(op.width - c);
                __m512 w[3][3], sum = _mm512_setzero_ps(), squares = sum;
                for (int k = 0; k < 9; k++) w[k / 3][k % 3] = by_channel(weights + k * op.width, c, mask);
                const float* at[3] = {ring.line(y - 1) + c, ring.line(y) + c, ring.line(y + 1) + c};
                __m512 before = _mm512_setzero_ps(), here = before;
                char* out = op.out + line * line_bytes(op) + 2 * c;
                for (int64_t x = 0; x <= op.cells; x++) {
                    __m512 after = _mm512_setzero_ps();
#pragma GCC unroll 3
                    for (int k = 0; k < 3; k++) {
                        const __m512 a = _mm512_maskz_loadu_ps(mask, at[k] + x * op.width);
                        before = _mm512_fmadd_ps(a, w[k][2], before);
                        here = _mm512_fmadd_ps(a, w[k][1], here);
                        after = _mm512_fmadd_ps(a, w[k][0], after);
                    }
                    if (x) {
                        store<BF16>(out + 2 * (x - 1) * op.width, before, mask);
                        sum = _mm512_add_ps(sum, before);
                        squares = _mm512_fmadd_ps(before, before, squares);
                    }
                    before = here;
                    here = after;
                }
                keep_sums(op, unit, c, mask, sum, squares, y > first);
            }
        }
    }
}

// mix0 * a + mix1 * b + mix2
INLINE __m512 mixture(const Op& op, __m512 a, __m512 b, int64_t c, __mmask16 mask) {
    const __m512 rest = by_channel(op.mix + 2 * op.width, c, mask);
    return _mm512_fmadd_ps(b, by_channel(op.mix + op.width, c, mask), _mm512_fmadd_ps(a, by_channel(op.mix, c, mask), rest));
}

// DEPTHWISE_SLOPE: the way back through ACTED_DEPTHWISE. The gradient of its output is mix0 * gradient + mix1 * residual
// + mix2 (BatchNorm's backward; `residual` is that output). Gives the gradient of z = factor * source + shift, its sums,
// alone and times source, and those of the weights, (strips, 9, width).
inline void depthwise_slope(const Op& op, int64_t thread, int64_t threads) {
    const int64_t strips = (op.lines + STRIP - 1) / STRIP;
    const Share share(op.images * strips, thread, threads);
    const float* weights = (const float*)op.weight;
    Ring ring(op.cells, op.width);
    auto fill = [&](int64_t image, int64_t y) {
        if (y < 0 || y >= op.lines) return ring.clear(y);
        const int64_t start = (image * op.lines + y) * line_bytes(op);
        for (int64_t x = 0; x < op.cells; x++)
            for (int64_t c = 0; c < op.width; c += 16) {
                const __mmask16 mask = tail(op.width - c);
                const int64_t at = 2 * (x * op.width + c);
                const __m512 g = mixture(op, load<BF16>(op.gradient + start + at, mask),
                                         load<BF16>(op.residual + start + at, mask), c, mask);
                _mm512_mask_storeu_ps(ring.line(y) + x * op.width + c, mask, g);
            }
    };
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / strips, first = unit % strips * STRIP, last = std::min(first + STRIP, op.lines);
        float* weight_sums = op.weight_sums + unit * 9 * op.width;
        std::fill_n(weight_sums, 9 * op.width, 0.0f);
        fill(image, first - 1);
        fill(image, first);
        for (int64_t y = first; y < last; y++) {
            fill(image, y + 1);
            const int64_t line = image * op.lines + y;
            for (int64_t c = 0; c < op.width; c += 16) {
                const __mmask16 mask = tail(op.width - c);
                const __m512 factor = by_channel(op.factor, c, mask), shift = by_channel(op.shift, c, mask);
                __m512 w[9], dw[9], sum = _mm512_setzero_ps(), with_source = sum;
#pragma GCC unroll 9
                for (int k = 0; k < 9; k++) {
                    w[k] = by_channel(weights + k * op.width, c, mask);
                    dw[k] = by_channel(weight_sums + k * op.width, c, mask);
                }
                for (int64_t x = 0; x < op.cells; x++) {
                    const int64_t at = 2 * (x * op.width + c);
                    const __m512 h = load<BF16>(op.source + line * line_bytes(op) + at, mask);
                    const __m512 z = _mm512_fmadd_ps(h, factor, shift);
                    const Gelu a = gelu_with_slope(z);
                    __m512 slope = _mm512_setzero_ps();
#pragma GCC unroll 9
                    for (int k = 0; k < 9; k++) {  // this pixel went into output (y - ky + 1, x - kx + 1)
                        const float* from = ring.line(y - k / 3 + 1) + (x - k % 3 + 1) * op.width + c;
                        const __m512 g = _mm512_maskz_loadu_ps(mask, from);
                        slope = _mm512_fmadd_ps(g, w[k], slope);
                        dw[k] = _mm512_fmadd_ps(g, a.value, dw[k]);
                    }
                    slope = _mm512_mul_ps(slope, a.slope);
                    sum = _mm512_add_ps(sum, slope);
                    with_source = _mm512_fmadd_ps(slope, h, with_source);
                    store<BF16>(op.out + line * line_bytes(op) + at, slope, mask);
                }
#pragma GCC unroll 9
                for (int k = 0; k < 9; k++) _mm512_mask_storeu_ps(weight_sums + k * op.width + c, mask, dw[k]);
                keep_sums(op, unit, c, mask, sum, with_source, y > first);
            }
        }
    }
}

// MIXED: out = mix0 * gradient + mix1 * source + mix2.
inline void mixed(const Op& op, int64_t thread, int64_t threads) {
    each_pixel(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        store<BF16>(op.out + at, mixture(op, s.read(op.gradient, at), s.read(op.source, at), s.first, s.mask), s.mask);
    });
}
