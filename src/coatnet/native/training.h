// What training does to the wide maps of MBConv, in as few passes over memory as the order of things allows. Maps are
// bf16, (images, lines, cells, width). BatchNorm in training is a factor and a shift once its statistics are known; the
// activations between two products are computed again where they are needed and never stored.
//
// Sums are written line by line, or strip by strip where lines are done in strips, as (images, lines or strips, 2, width),
// so that they do not depend on the number of threads.
#pragma once

#include "product.h"

constexpr int64_t STRIP = 14;  // lines that a thread does in one go, with the line before and after computed again

inline int64_t line_bytes(const Op& op) { return 2 * op.cells * op.width; }

INLINE __m512 by_channel(const float* values, int64_t c, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, values + c); }

INLINE void keep_sums(const Op& op, int64_t unit, int64_t c, __mmask16 mask, __m512 first, __m512 second, bool adds) {
    float *const to = op.sums + 2 * unit * op.width + c, *const next = to + op.width;
    const __mmask16 added = adds ? mask : 0;
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(first, _mm512_maskz_loadu_ps(added, to)));
    _mm512_mask_storeu_ps(next, mask, _mm512_add_ps(second, _mm512_maskz_loadu_ps(added, next)));
}

// Read or write 16 channels on a walk through memory, and have those fetched that come some way after them.
INLINE __m512 read_on(const char* at, __mmask16 mask) {
    _mm_prefetch(at + AHEAD, _MM_HINT_T0);
    return load<BF16>(at, mask);
}
INLINE void write_on(char* at, __m512 value, __mmask16 mask) {
    __builtin_prefetch(at + AHEAD, 1, 3);  // it may still be another thread's
    store<BF16>(at, value, mask);
}

// 16 channels of one pixel: where they are, what BatchNorm does to them, and what is summed over the line's pixels.
struct Channels {
    int64_t image, first, moved;  // the last: bytes that `out` lies further than the other maps, where it has a border
    __mmask16 mask;
    __m512 factor = _mm512_setzero_ps(), shift = factor, sum = factor, second = factor;
    INLINE __m512 read(const char* map, int64_t at) const { return read_on(map + at, mask); }
    INLINE __m512 normed(__m512 value) const { return _mm512_fmadd_ps(value, factor, shift); }
};

enum Sums { NO_SUMS, ONE_SUM, TWO_SUMS };  // of each line; the second is 0 where there is one

constexpr int64_t SPAN = 1024;  // channels whose sums and factors stay in the first cache; more is a second walk

// Call `pixel(channels, at)` for every 16 channels of every pixel, `at` bytes into any of the maps. Memory is walked in its
// order, a span of channels at a time: crosswise, each cache line would be waited for and come twice. The row of the plan
// comes by value everywhere here: what is stored could else be one of its fields, which would be read again each time.
template <Sums SUMS, bool NORMED, class Pixel>
INLINE void each_pixel(const Op op, int64_t thread, int64_t threads, Pixel pixel) {
    const Share share(op.images * op.lines, thread, threads);
    for (int64_t line = share.first; line < share.last; line++) {
        const int64_t image = line / op.lines, start = line * line_bytes(op);
        const int64_t moved = op.out_line ? image * op.out_image + line % op.lines * op.out_line - start : 0;
        float *const sums = op.sums + 2 * line * op.width, *const seconds = sums + op.width;
        if (SUMS) std::fill_n(sums, 2 * op.width, 0.0f);
        auto channels = [&](int64_t c, int64_t at, __mmask16 mask) INLINE_LAMBDA {
            Channels s = {image, c, moved, mask};
            if (NORMED) s.factor = by_channel(op.factor, c, mask), s.shift = by_channel(op.shift, c, mask);
            if (SUMS) s.sum = by_channel(sums, c, mask);
            if (SUMS == TWO_SUMS) s.second = by_channel(seconds, c, mask);
            pixel(s, at);
            if (SUMS) _mm512_mask_storeu_ps(sums + c, mask, s.sum);
            if (SUMS == TWO_SUMS) _mm512_mask_storeu_ps(seconds + c, mask, s.second);
        };
        for (int64_t first = 0; first < op.width; first += SPAN) {
            const int64_t last = std::min(first + SPAN, op.width), whole = last - (last - first) % 16;
            for (int64_t x = 0, at = start; x < op.cells; x++, at += 2 * op.width) {
                for (int64_t c = first; c < whole; c += 16) channels(c, at + 2 * c, 0xffff);
                if (whole < last) channels(whole, at + 2 * whole, tail(last - whole));
            }
        }
    }
}

// MOMENTS: the sums of source and of its square.
inline void moments(const Op op, int64_t thread, int64_t threads) {
    each_pixel<TWO_SUMS, false>(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 h = s.read(op.source, at);
        s.sum = _mm512_add_ps(s.sum, h);
        s.second = _mm512_fmadd_ps(h, h, s.second);
    });
}

// ACTED: out = gelu(factor * source + shift), and its sums.
inline void acted(const Op op, int64_t thread, int64_t threads) {
    each_pixel<ONE_SUM, true>(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 a = gelu<false>(s.normed(s.read(op.source, at)));
        s.sum = _mm512_add_ps(s.sum, a);
        write_on(op.out + at + s.moved, a, s.mask);
    });
}

// GATE_SLOPE: with a = gelu(factor * source + shift), the sums of gradient * a and of a.
inline void gate_slope(const Op op, int64_t thread, int64_t threads) {
    each_pixel<TWO_SUMS, true>(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 a = gelu<false>(s.normed(s.read(op.source, at)));
        s.sum = _mm512_fmadd_ps(s.read(op.gradient, at), a, s.sum);
        s.second = _mm512_add_ps(s.second, a);
    });
}

// ACTED_SLOPE: with z = factor * source + shift, a = gelu(z): the gradient of z, (gradient * gate + mean_slope) *
// gelu'(z), over the gradient itself; its sums, alone and times source; and out = a * gate.
inline void acted_slope(const Op op, int64_t thread, int64_t threads) {
    each_pixel<TWO_SUMS, true>(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        const __m512 gate = by_channel(op.gates + s.image * op.width, s.first, s.mask);
        const __m512 mean_slope = by_channel(op.mean_slopes + s.image * op.width, s.first, s.mask);
        const __m512 h = s.read(op.source, at), z = s.normed(h);
        const Gelu a = gelu_with_slope(z);
        write_on(op.out + at + s.moved, _mm512_mul_ps(a.value, gate), s.mask);
        const __m512 above = _mm512_fmadd_ps(s.read(op.gradient, at), gate, mean_slope);
        const __m512 slope = _mm512_mul_ps(above, a.slope);
        s.sum = _mm512_add_ps(s.sum, slope);
        s.second = _mm512_fmadd_ps(slope, h, s.second);
        write_on(op.gradient + at, slope, s.mask);
    });
}

// Three lines of numbers that slide down a map; line y is at (y mod 3). Of each, 16 channels of all pixels lie side by side,
// between a pixel of zeros at either end: a convolution of those channels finds its whole line in the first cache.
class Ring {
    int64_t block, size;
    float* start;

  public:
    Ring(int64_t cells, int64_t width)
        : block(16 * (cells + 2)), size((width + 15) / 16 * block), start(kept<Ring, float>(3 * size)) {
        std::fill_n(start, 3 * size, 0.0f);
    }
    // Channels c to c + 15 of line y, from its first pixel on.
    float* at(int64_t y, int64_t c) const { return start + (y + 3) % 3 * size + c / 16 * block + 16; }
    void clear(int64_t y) { std::fill_n(at(y, 0) - 16, size, 0.0f); }

    // Set line y to what `value(at, c, mask)` gives, `at` bytes from the line's start in a map.
    template <class Value>
    INLINE void fill(const Op& op, int64_t y, Value value) {
        float* const line = at(y, 0);
        for (int64_t x = 0; x < op.cells; x++)
            for (int64_t c = 0; c < op.width; c += 16)
                _mm512_store_ps(line + c / 16 * block + 16 * x, value(2 * (x * op.width + c), c, tail(op.width - c)));
    }
};

// While a line is computed crosswise, 16 channels of all pixels at a time, what comes after it is fetched in the order of
// memory: how far that is once channel c of pixel x is at hand, in bytes from a line's start.
INLINE int64_t fetched(const Op& op, int64_t c, int64_t x) { return 2 * (c * op.cells + 16 * x); }

// ACTED_DEPTHWISE: out = 3x3 depthwise convolution of gelu(factor * source + shift), and the moments of out.
inline void acted_depthwise(const Op op, int64_t thread, int64_t threads) {
    const int64_t strips = (op.lines + STRIP - 1) / STRIP;
    const Share share(op.images * strips, thread, threads);
    const float* weights = (const float*)op.weight;
    Ring ring(op.cells, op.width);
    auto fill = [&](int64_t image, int64_t y) {
        if (y < 0 || y >= op.lines) return ring.clear(y);
        const char* from = op.source + (image * op.lines + y) * line_bytes(op);
        ring.fill(op, y, [&](int64_t at, int64_t c, __mmask16 mask) INLINE_LAMBDA {
            const __m512 factor = by_channel(op.factor, c, mask), shift = by_channel(op.shift, c, mask);
            _mm_prefetch(from + at + AHEAD, _MM_HINT_T0);
            return gelu<false>(_mm512_fmadd_ps(load<BF16>(from + at, mask), factor, shift));
        });
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
                const float* at[3] = {ring.at(y - 1, c), ring.at(y, c), ring.at(y + 1, c)};
                __m512 before = _mm512_setzero_ps(), here = before;
                char* out = op.out + line * line_bytes(op) + 2 * c;
                for (int64_t x = 0; x <= op.cells; x++) {
                    if (x % 2 == 0) __builtin_prefetch(op.out + (line + 1) * line_bytes(op) + fetched(op, c, x), 1, 2);
                    __m512 after = _mm512_setzero_ps();
#pragma GCC unroll 3
                    for (int k = 0; k < 3; k++) {
                        const __m512 a = _mm512_load_ps(at[k] + 16 * x);
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
inline void depthwise_slope(const Op op, int64_t thread, int64_t threads) {
    const int64_t strips = (op.lines + STRIP - 1) / STRIP;
    const Share share(op.images * strips, thread, threads);
    const float* weights = (const float*)op.weight;
    Ring ring(op.cells, op.width);
    auto fill = [&](int64_t image, int64_t y) {
        if (y < 0 || y >= op.lines) return ring.clear(y);
        const int64_t start = (image * op.lines + y) * line_bytes(op);
        ring.fill(op, y, [&](int64_t at, int64_t c, __mmask16 mask) INLINE_LAMBDA {
            at += start;
            return mixture(op, load<BF16>(op.gradient + at, mask), load<BF16>(op.residual + at, mask), c, mask);
        });
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
                const float* lines[3] = {ring.at(y + 1, c), ring.at(y, c), ring.at(y - 1, c)};
                for (int64_t x = 0; x < op.cells; x++) {
                    const int64_t at = 2 * (x * op.width + c);
                    if (x % 2 == 0) {  // every 64 bytes
                        const int64_t next = (line + 1) * line_bytes(op) + fetched(op, c, x), after = next + line_bytes(op);
                        _mm_prefetch(op.source + next, _MM_HINT_T1);
                        __builtin_prefetch(op.out + next, 1, 2);
                        _mm_prefetch(op.gradient + after, _MM_HINT_T1);
                        _mm_prefetch(op.residual + after, _MM_HINT_T1);
                    }
                    const __m512 h = load<BF16>(op.source + line * line_bytes(op) + at, mask);
                    const __m512 z = _mm512_fmadd_ps(h, factor, shift);
                    const Gelu a = gelu_with_slope(z);
                    __m512 slope = _mm512_setzero_ps();
#pragma GCC unroll 9
                    for (int k = 0; k < 9; k++) {  // this pixel went into output (y - ky + 1, x - kx + 1)
                        const __m512 g = _mm512_load_ps(lines[k / 3] + 16 * (x - k % 3 + 1));
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
inline void mixed(const Op op, int64_t thread, int64_t threads) {
    each_pixel<NO_SUMS, false>(op, thread, threads, [&](Channels& s, int64_t at) INLINE_LAMBDA {
        write_on(op.out + at, mixture(op, s.read(op.gradient, at), s.read(op.source, at), s.first, s.mask), s.mask);
    });
}
