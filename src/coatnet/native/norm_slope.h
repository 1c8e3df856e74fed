// What training does to a block's input and to sums: BatchNorm from sums to what it does to a map, and back; LayerNorm's
// way back; max pooling's. Maps are bf16, (images, lines, cells, width); sums are rows of fp32, as training.h writes them.
#pragma once

#include "training.h"

// Columns `first` to `last` of `count` rows of `width` numbers, added up in double: what they say may be a small difference.
template <class Purpose>
const double* add_rows(const float* rows, int64_t count, int64_t width, int64_t first, int64_t last) {
    const int64_t columns = last - first;
    double* const totals = kept<Purpose, double>(columns);
    std::fill_n(totals, columns, 0.0);
    for (int64_t row = 0; row < count; row++) {
        const float* from = rows + row * width + first;
        for (int64_t c = 0; c < columns; c++) totals[c] += from[c];
    }
    return totals;
}

struct Columns : Share {  // of a thread in `width` columns: whole vectors
    Columns(int64_t width, int64_t thread, int64_t threads) : Share((width + 15) / 16, thread, threads) {
        first *= 16;
        last = std::min(16 * last, width);
    }
};

// TOTAL: out (width) = the sum of `cells` rows of `sums`.
inline void total(const Op& op, int64_t thread, int64_t threads) {
    const Columns own(op.width, thread, threads);
    const double* totals = add_rows<struct Total>(op.sums, op.cells, op.width, own.first, own.last);
    for (int64_t c = own.first; c < own.last; c++) ((float*)op.out)[c] = totals[c - own.first];
}

// What BATCH_NORM finds, each by channel.
enum Found { FACTOR, SHIFT, MEAN_OF_ALL, INVERSE };

// BATCH_NORM: `images` rows of sums of a map and of its square, (2, width), over `cells` pixels in all -> out (4, width).
// `scale` and `bias` are its affine part; its running statistics are moved on, the variance as of a sample.
inline void batch_norm(const Op& op, int64_t thread, int64_t threads) {
    const int64_t C = op.width;
    const Columns own(C, thread, threads);
    const double* sums = add_rows<struct First>(op.sums, op.images, 2 * C, own.first, own.last);
    const double* squares = add_rows<struct Second>(op.sums + C, op.images, 2 * C, own.first, own.last);
    float* const out = (float*)op.out;
    for (int64_t c = own.first; c < own.last; c++) {
        const double mean = sums[c - own.first] / op.cells;
        const double variance = std::max(0.0, squares[c - own.first] / op.cells - mean * mean);
        const float inverse = 1 / __builtin_sqrt(variance + op.eps), factor = op.scale[c] * inverse;
        out[FACTOR * C + c] = factor;
        out[SHIFT * C + c] = op.bias[c] - float(mean) * factor;
        out[MEAN_OF_ALL * C + c] = mean;
        out[INVERSE * C + c] = inverse;
        const double of_sample = variance * op.cells / std::max<int64_t>(1, op.cells - 1);
        op.running_mean[c] += op.momentum * (mean - op.running_mean[c]);
        op.running_variance[c] += op.momentum * (of_sample - op.running_variance[c]);
    }
}

// BATCH_NORM_SLOPE: `images` rows of sums of its gradient, alone and times the map, and what BATCH_NORM found (in `source`)
// -> out (5, width): the gradients of `scale` and `bias`, and `mix`, three rows.
inline void batch_norm_slope(const Op& op, int64_t thread, int64_t threads) {
    const int64_t C = op.width;
    const Columns own(C, thread, threads);
    const double* slopes = add_rows<struct First>(op.sums, op.images, 2 * C, own.first, own.last);
    const double* with_map = add_rows<struct Second>(op.sums + C, op.images, 2 * C, own.first, own.last);
    const float* found = (const float*)op.source;
    float* const out = (float*)op.out;
    for (int64_t c = own.first; c < own.last; c++) {
        const double factor = found[FACTOR * C + c], mean = found[MEAN_OF_ALL * C + c], inverse = found[INVERSE * C + c];
        const double bias_slope = slopes[c - own.first], scale_slope = inverse * (with_map[c - own.first] - mean * bias_slope);
        const double by_map = -factor * inverse * scale_slope / op.cells;
        out[c] = scale_slope;
        out[C + c] = bias_slope;
        out[2 * C + c] = factor;
        out[3 * C + c] = by_map;
        out[4 * C + c] = -factor * bias_slope / op.cells - by_map * mean;
    }
}

// Where a line of a map that was strided over lies: line `y * stride` of (images, in_lines, in_cells, width).
INLINE int64_t strided_line(const Op& op, int64_t unit) {
    return (unit / op.lines * op.in_lines + unit % op.lines * op.stride) * op.in_cells * 2 * op.width;
}

// Call `use(from, at, unit, x, c, mask)` for every 16 channels of every `stride`-th pixel of every `stride`-th line: where they
// lie in the source, and in the map of those pixels alone, of which they are pixel x of line `unit`.
template <class Use>
INLINE void each_taken(const Op op, int64_t thread, int64_t threads, Use use) {
    const Share share(op.images * op.lines, thread, threads);
    const int64_t pixel = 2 * op.width;
    for (int64_t unit = share.first; unit < share.last; unit++)
        for (int64_t x = 0; x < op.cells; x++) {
            const char* from = op.source + strided_line(op, unit) + x * op.stride * pixel;
            const int64_t at = unit * line_bytes(op) + x * pixel;
            by_vector(op.width, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                use(from + 2 * c, at + 2 * c, unit, x, c, mask);
            });
        }
}

// NORMED: out = factor * source + shift, of the pixels taken.
inline void normed(const Op op, int64_t thread, int64_t threads) {
    each_taken(op, thread, threads,
               [&](const char* from, int64_t at, int64_t, int64_t, int64_t c, __mmask16 mask) INLINE_LAMBDA {
                   const __m512 factor = by_channel(op.factor, c, mask), shift = by_channel(op.shift, c, mask);
                   write_on(op.out + at, _mm512_fmadd_ps(read_on(from, mask), factor, shift), mask);
               });
}

// NORMED_SUMS: each line's sums of gradient, alone and times the source's pixel that NORMED took.
inline void normed_sums(const Op op, int64_t thread, int64_t threads) {
    each_taken(op, thread, threads,
               [&](const char* from, int64_t at, int64_t unit, int64_t x, int64_t c, __mmask16 mask) INLINE_LAMBDA {
                   const __m512 g = read_on(op.gradient + at, mask);
                   keep_sums(op, unit, c, mask, g, _mm512_mul_ps(g, read_on(from, mask)), x > 0);
               });
}

// SPREAD: the way back through NORMED, with its statistics, and past it: out = mix1 * source + mix2 + residual, and
// mix0 * gradient where NORMED took a pixel. `lines` and `cells` are the gradient's. May write over the residual.
inline void spread(const Op op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.in_lines, thread, threads);
    const int64_t pixel = 2 * op.width;
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / op.in_lines, y = unit % op.in_lines, start = unit * op.in_cells * pixel;
        const char* gradient = op.gradient + (image * op.lines + y / op.stride) * line_bytes(op);
        auto go = [&]<bool TAKEN>(int64_t x) INLINE_LAMBDA {
            const int64_t at = start + x * pixel;
            by_vector(op.width, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const __m512 by_source = by_channel(op.mix + op.width, c, mask);
                __m512 sum = _mm512_add_ps(by_channel(op.mix + 2 * op.width, c, mask),
                                           read_on(op.residual + at + 2 * c, mask));
                sum = _mm512_fmadd_ps(read_on(op.source + at + 2 * c, mask), by_source, sum);
                if (TAKEN)
                    sum = _mm512_fmadd_ps(read_on(gradient + 2 * c, mask), by_channel(op.mix, c, mask), sum);
                write_on(op.out + at + 2 * c, sum, mask);
            });
            if (TAKEN) gradient += pixel;
        };
        const int64_t taken = y % op.stride == 0 ? op.stride : op.in_cells;  // every so many pixels
        for (int64_t x = 0; x < op.in_cells; x++)
            if (y % op.stride == 0 && x % taken == 0)
                go.template operator()<true>(x);
            else
                go.template operator()<false>(x);
    }
}

// POOL_SLOPE: gradient (images, lines, cells, width) goes to the first of the largest of each 2x2 pixels of source, of fewer
// at an odd edge; out is 0 elsewhere.
inline void pool_slope(const Op op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines, thread, threads);
    const int64_t pixel = 2 * op.width, line = op.in_cells * pixel;
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t y = 2 * (unit % op.lines), start = (unit / op.lines * op.in_lines + y) * line;
        for (int64_t x = 0; x < op.cells; x++) {
            const bool has_right = 2 * x + 1 < op.in_cells, has_below = y + 1 < op.in_lines;
            const int64_t right = has_right ? pixel : 0, below = has_below ? line : 0;
            // A pixel that is missing is the one before again: it is never the first of the largest, and its zeros are
            // written over, from the last to the first.
            const int64_t places[4] = {0, right, below, right + below};
            by_vector(op.width, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const int64_t at = start + 2 * x * pixel + 2 * c;
                const __m512 g = read_on(op.gradient + unit * line_bytes(op) + x * pixel + 2 * c, mask);
                __m512 values[4];
                for (int i = 0; i < 4; i++) values[i] = read_on(op.source + at + places[i], mask);
                const __m512 largest =
                    _mm512_max_ps(_mm512_max_ps(values[0], values[1]), _mm512_max_ps(values[2], values[3]));
                __mmask16 left = 0xffff, taken[4];
                for (int i = 0; i < 4; i++) {
                    taken[i] = left & _mm512_cmp_ps_mask(values[i], largest, _CMP_EQ_OQ);
                    left &= ~taken[i];
                }
                for (int i = 3; i >= 0; i--) write_on(op.out + at + places[i], _mm512_maskz_mov_ps(taken[i], g), mask);
            });
        }
    }
}

// LAYER_SLOPE: the way back through LayerNorm over channels (NORM), and past it: the gradient of `source`, plus residual; each
// line's sums of the gradients of `scale` and of the bias. May write over the residual or the gradient.
inline void layer_slope(const Op op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines, thread, threads);
    const int64_t C = op.width, pixel = 2 * C;
    const __m512 zero = _mm512_setzero_ps();
    auto mean_of = [&](__m512 sum) { return _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C); };
    float* const values = kept<struct Values, float>(C + 16);  // of a pixel, less their mean
    for (int64_t unit = share.first; unit < share.last; unit++)
        for (int64_t x = 0; x < op.cells; x++) {
            const int64_t start = unit * line_bytes(op) + x * pixel;
            __m512 sum = zero, squares = zero, slopes = zero, with_normed = zero;
            by_vector(C, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const __m512 value = read_on(op.source + start + 2 * c, mask);
                sum = _mm512_add_ps(sum, value);
                _mm512_store_ps(values + c, value);
            });
            const __m512 mean = mean_of(sum);
            by_vector(C, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const __m512 off = _mm512_maskz_sub_ps(mask, _mm512_load_ps(values + c), mean);
                squares = _mm512_fmadd_ps(off, off, squares);
                _mm512_store_ps(values + c, off);
            });
            const float variance = _mm512_reduce_add_ps(squares) / C;
            const __m512 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + LAYER_NORM_EPS));
            by_vector(C, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const __m512 g = read_on(op.gradient + start + 2 * c, mask), scale = by_channel(op.scale, c, mask);
                const __m512 by_normed = _mm512_mul_ps(g, _mm512_mul_ps(_mm512_load_ps(values + c), inverse));
                keep_sums(op, unit, c, mask, by_normed, g, x > 0);
                slopes = _mm512_fmadd_ps(g, scale, slopes);
                with_normed = _mm512_fmadd_ps(by_normed, scale, with_normed);
            });
            const __m512 by_all = mean_of(slopes), by_normed = _mm512_mul_ps(mean_of(with_normed), inverse);
            by_vector(C, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const __m512 g = read_on(op.gradient + start + 2 * c, mask);
                const __m512 off = _mm512_fnmadd_ps(_mm512_load_ps(values + c), by_normed,
                                                    _mm512_fmsub_ps(g, by_channel(op.scale, c, mask), by_all));
                const __m512 past = read_on(op.residual + start + 2 * c, mask);
                write_on(op.out + start + 2 * c, _mm512_fmadd_ps(off, inverse, past), mask);
            });
        }
}
