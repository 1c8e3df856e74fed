// What is done to maps of pixels beside products: unfolding, 3x3 depthwise convolution, pooling, norm, mean, conversion; for
// training, branches that are scaled by image, and borders.
#pragma once
#include <limits>
#include <vector>

#include "product.h"

// Copy a line of a picture, C planes `plane` bytes apart and pixels `pixel` bytes apart, into the order of pixels.
inline void arrange(const char* from, int64_t plane, int64_t pixel, int64_t C, int64_t cells, float* to) {
    if (pixel == 4 * C && (plane == 4 || C == 1)) {
        memcpy(to, from, cells * pixel);
        return;
    }
    int64_t x = 0;
    if (C == 3 && pixel == 4)
        for (; x + 16 <= cells; x += 16) {  // value i of the 48 is that of plane i % 3 at i / 3
            const __m512 a = _mm512_loadu_ps(from + 4 * x), b = _mm512_loadu_ps(from + plane + 4 * x);
            const __m512 c = _mm512_loadu_ps(from + 2 * plane + 4 * x);
#pragma GCC unroll 3
            for (int part = 0; part < 3; part++) {
                alignas(64) int of_ab[16], all[16];
                for (int i = 0; i < 16; i++) {
                    const int at = (16 * part + i) / 3, of = (16 * part + i) % 3;
                    of_ab[i] = of == 1 ? 16 + at : at, all[i] = of == 2 ? 16 + at : i;
                }
                const __m512 ab = _mm512_permutex2var_ps(a, _mm512_load_si512(of_ab), b);
                _mm512_storeu_ps(to + 3 * x + 16 * part, _mm512_permutex2var_ps(ab, _mm512_load_si512(all), c));
            }
        }
    for (int64_t c = 0; c < C; c++)
        for (int64_t left = x; left < cells; left++) to[left * C + c] = *(const float*)(from + c * plane + left * pixel);
}

// UNFOLD: the patches of an fp32 picture, in any memory layout, as rows of (line, column, channel) values, zeros beyond
// its edge and after the last. `kernel` px, `stride` px; the first patch starts `padding` px before the edge. A thread
// brings each line of the picture into the order of pixels once, between zeros; a patch is `kernel` runs of such lines.
template <int OUT>
void unfold(const Op& op, int64_t thread, int64_t threads) {
    const int64_t C = op.depth, run = op.kernel * C, before = op.padding * C;  // values
    const int64_t count = (op.in_cells + op.padding + op.kernel + op.stride) * C + 32;
    float* const lines = kept<struct Unfolded, float>(op.kernel * count);
    std::fill_n(lines, op.kernel * count, 0.0f);
    std::vector<int64_t> held(op.kernel, -1);  // which line lies in each place, counted through all pictures with their padding
    auto arranged = [&](int64_t image, int64_t y) {  // y: from the first of the padding on
        const int64_t wanted = image * (op.lines * op.stride + op.kernel) + y, place = y % op.kernel;
        float* const to = lines + place * count;
        if (held[place] == wanted) return to;
        held[place] = wanted, y -= op.padding;
        if (y < 0 || y >= op.in_lines)
            std::fill_n(to + before, op.in_cells * C, 0.0f);
        else
            arrange(op.source + image * op.source_image + y * op.source_line, op.source_channel, op.source_cell, C, op.in_cells,
                    to + before);
        return to;
    };
    std::vector<const float*> picture_lines(op.kernel);
    const Share share(op.images * op.lines, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        for (int64_t k = 0; k < op.kernel; k++) picture_lines[k] = arranged(unit / op.lines, unit % op.lines * op.stride + k);
        for (int64_t x = 0; x < op.cells; x++) {
            char* out = op.out + (unit * op.cells + x) * op.width * bytes(OUT);
            for (int64_t k = 0; k < op.kernel; k++)
                for (int64_t i = 0; i < run; i += 16) {
                    // Whole vectors but at the end of a line, which may be another thread's: what they reach beyond a run
                    // is written over by the next one.
                    const int64_t at = k * run + i;
                    const __mmask16 stored = tail((op.cells - x) * op.width - at);
                    const __m512 values = _mm512_maskz_loadu_ps(tail(run - i), picture_lines[k] + x * op.stride * C + i);
                    store<OUT>(out + at * bytes(OUT), values, stored);
                }
            for (int64_t i = op.kernel * run; i < op.width; i += 16)
                store<OUT>(out + i * bytes(OUT), _mm512_setzero_ps(), tail(op.width - i));
        }
    }
}

// Addresses are counted up from pixel to pixel: to multiply for each of them takes as long as the convolution.
template <int TYPE, int OUT>
void depthwise_line(const Op op, int64_t image, int64_t y) {
    const int64_t pixel = op.width * bytes(TYPE), out_pixel = op.width * bytes(OUT);
    const char* lines[3];
    int64_t along[3];  // bytes from pixel to pixel; 0 on the line beyond the edge, which is one pixel of zeros
    for (int k = 0; k < 3; k++) {
        const int64_t line = y * op.stride + k - 1;
        const bool inside = line >= 0 && line < op.in_lines;
        lines[k] = inside ? op.source + (image * op.in_lines + line) * op.in_cells * pixel : op.pad;
        along[k] = inside ? pixel : 0;
    }
    const float* weights = (const float*)op.weight;  // (9, C)
    char* const out = op.out + (image * op.lines + y) * op.cells * out_pixel;
    float* const sums = op.sums + (image * op.lines + y) * op.width;
    // What comes after this line, fetched in the order of memory while it is computed crosswise.
    const char* next = op.source + (image * op.in_lines + y + 2) * op.in_cells * pixel;
    const char* next_out = out + op.cells * out_pixel;
    for (int64_t c = 0; c < op.width; c += 16) {
        const __mmask16 mask = tail(op.width - c);
        __m512 w[3][3], sum = _mm512_setzero_ps();
        for (int k = 0; k < 9; k++) w[k / 3][k % 3] = _mm512_maskz_loadu_ps(mask, weights + k * op.width + c);
        const __m512 bias = _mm512_maskz_loadu_ps(mask, op.bias + c);
        const __m512 zero = TYPE == UINT8 ? _mm512_maskz_loadu_ps(mask, op.source_zero + c) : bias;
        const __m512 scale = OUT == UINT8 ? _mm512_maskz_loadu_ps(mask, op.out_scale + c) : bias;
        const __m512 shift = OUT == UINT8 ? _mm512_maskz_loadu_ps(mask, op.out_zero + c) : bias;
        auto value = [&](const char* from) INLINE_LAMBDA {
            const __m512 raw = load<TYPE>(from, mask);
            return TYPE == UINT8 ? _mm512_sub_ps(raw, zero) : raw;
        };
        char* to = out + c * bytes(OUT);
        auto emit = [&](__m512 total) INLINE_LAMBDA {
            total = gelu<TYPE == FP32>(total);
            sum = _mm512_add_ps(sum, total);
            if (OUT == UINT8) total = _mm512_fmadd_ps(total, scale, shift);
            store<OUT>(to, total, mask);
            to += out_pixel;
        };
        const char* at[3] = {lines[0] + c * bytes(TYPE), lines[1] + c * bytes(TYPE), lines[2] + c * bytes(TYPE)};
        if (op.stride == 1) {  // each pixel is loaded once and serves the sums of three
            __m512 before = bias, here = bias;
            for (int64_t x = 0; x < op.in_cells; x++) {
                if (x % (4 / bytes(TYPE)) == 0) _mm_prefetch(next, _MM_HINT_T1);  // every 64 bytes
                if (x % (4 / bytes(OUT)) == 0) __builtin_prefetch(next_out, 1, 2);
                next += 16 * bytes(TYPE), next_out += 16 * bytes(OUT);
                __m512 after = bias;
#pragma GCC unroll 3
                for (int k = 0; k < 3; k++) {
                    const __m512 v = value(at[k]);
                    at[k] += along[k];
                    before = _mm512_fmadd_ps(v, w[k][2], before);
                    here = _mm512_fmadd_ps(v, w[k][1], here);
                    after = _mm512_fmadd_ps(v, w[k][0], after);
                }
                if (x) emit(before);
                before = here;
                here = after;
            }
            emit(before);
        } else {
            for (int64_t x = 0; x < op.cells; x++) {
                __m512 total = bias;
                for (int64_t kx = 0; kx < 3; kx++) {
                    const int64_t column = x * op.stride + kx - 1;
                    if (column < 0 || column >= op.in_cells) continue;
                    for (int k = 0; k < 3; k++) total = _mm512_fmadd_ps(value(at[k] + column * along[k]), w[k][kx], total);
                }
                emit(total);
            }
        }
        _mm512_mask_storeu_ps(sums + c, mask, sum);
    }
}

template <int TYPE, int OUT>
void depthwise(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++)
        depthwise_line<TYPE, OUT>(op, unit / op.lines, unit % op.lines);
}

// The larger of two; where one is no number, that.
INLINE __m512 larger(__m512 a, __m512 b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

// POOL: the largest of 2x2 pixels, of fewer at an odd edge.
template <int TYPE>
void pool(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines, thread, threads);
    const int64_t pixel = op.width * bytes(TYPE);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t image = unit / op.lines, y = 2 * (unit % op.lines);
        const char* top = op.source + (image * op.in_lines + y) * op.in_cells * pixel;
        const char* bottom = y + 1 < op.in_lines ? top + op.in_cells * pixel : top;
        for (int64_t x = 0; x < op.cells; x++) {
            const int64_t left = 2 * x * pixel, right = 2 * x + 1 < op.in_cells ? left + pixel : left;
            char* out = op.out + (unit * op.cells + x) * pixel;
            by_vector(op.width, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
                const int64_t at = c * bytes(TYPE);
                const __m512 upper = larger(load<TYPE>(top + left + at, mask), load<TYPE>(top + right + at, mask));
                const __m512 lower = larger(load<TYPE>(bottom + left + at, mask), load<TYPE>(bottom + right + at, mask));
                store<TYPE>(out + at, larger(upper, lower), mask);
            });
        }
    }
}

constexpr float LAYER_NORM_EPS = 1e-5f;

// NORM: LayerNorm over the channels of each pixel; `scale` and `bias` are its affine part.
template <int TYPE>
void norm(const Op op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines * op.cells, thread, threads);
    for (int64_t pixel = share.first; pixel < share.last; pixel++) {
        const char* from = op.source + pixel * op.width * bytes(TYPE);
        char* out = op.out + pixel * op.width * bytes(op.out_type);
        // Several sums at once, since one alone would wait for itself.
        __m512 totals[4] = {}, squares[4] = {};
        auto each = [&](auto use) INLINE_LAMBDA {
            int64_t c = 0;
            for (; c + 64 <= op.width; c += 64)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) use(i, load<TYPE>(from + (c + 16 * i) * bytes(TYPE)), 0xffff);
            for (; c < op.width; c += 16) use(0, load<TYPE>(from + c * bytes(TYPE), tail(op.width - c)), tail(op.width - c));
        };
        auto sum = [](const __m512 (&of)[4]) {
            return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(of[0], of[1]), _mm512_add_ps(of[2], of[3])));
        };
        each([&](int i, __m512 value, __mmask16) INLINE_LAMBDA { totals[i] = _mm512_add_ps(totals[i], value); });
        const __m512 mean = _mm512_set1_ps(sum(totals) / op.width);
        each([&](int i, __m512 value, __mmask16 mask) INLINE_LAMBDA {
            const __m512 off = _mm512_maskz_sub_ps(mask, value, mean);
            squares[i] = _mm512_fmadd_ps(off, off, squares[i]);
        });
        const __m512 inverse = _mm512_set1_ps(1.0f / __builtin_sqrtf(sum(squares) / op.width + LAYER_NORM_EPS));
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            const __m512 off = _mm512_sub_ps(load<TYPE>(from + c * bytes(TYPE), mask), mean);
            __m512 value = _mm512_fmadd_ps(_mm512_mul_ps(off, inverse), _mm512_maskz_loadu_ps(mask, op.scale + c),
                                           _mm512_maskz_loadu_ps(mask, op.bias + c));
            if (op.out_type == UINT8)
                value = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, op.out_scale + c),
                                        _mm512_maskz_loadu_ps(mask, op.out_zero + c));
            store(op.out_type, out + c * bytes(op.out_type), value, mask);
        }
    }
}

// CONVERT: a map to 8 bit.
template <int TYPE>
void convert(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines * op.cells, thread, threads);
    for (int64_t pixel = share.first; pixel < share.last; pixel++)
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            const __m512 value = load<TYPE>(op.source + (pixel * op.width + c) * bytes(TYPE), mask);
            store<UINT8>(op.out + pixel * op.width + c,
                         _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, op.out_scale + c),
                                         _mm512_maskz_loadu_ps(mask, op.out_zero + c)),
                         mask);
        }
}

// MEAN: over all pixels of each image, to fp32.
template <int TYPE>
void mean(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images, thread, threads);
    const int64_t pixels = op.in_lines * op.in_cells;
    for (int64_t image = share.first; image < share.last; image++)
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            __m512 total = _mm512_setzero_ps();
            for (int64_t p = 0; p < pixels; p++)
                total = _mm512_add_ps(
                    total, load<TYPE>(op.source + ((image * pixels + p) * op.width + c) * bytes(TYPE), mask));
            store<FP32>(op.out + (image * op.width + c) * 4, _mm512_div_ps(total, _mm512_set1_ps(float(pixels))), mask);
        }
}

// TANH of each value, 1 - 2 / (exp(2 x) + 1).
template <int TYPE>
void tanh_map(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images, thread, threads);
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    for (int64_t image = share.first; image < share.last; image++)
        for (int64_t c = 0; c < op.width; c += 16) {
            const __mmask16 mask = tail(op.width - c);
            const int64_t at = (image * op.width + c) * bytes(TYPE);
            const __m512 doubled = _mm512_mul_ps(load<TYPE>(op.source + at, mask), two);
            const __m512 e = exp16<TYPE == FP32>(_mm512_min_ps(doubled, _mm512_set1_ps(80.0f)));
            store<TYPE>(op.out + at, _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one))), mask);
        }
}

// BRANCH: out = source times the image's gate, plus `residual`, where that is given. bf16.
inline void branch(const Op& op, int64_t thread, int64_t threads) {
    const Share share(op.images * op.lines, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const __m512 gate = _mm512_set1_ps(op.gates[unit / op.lines]);
        const int64_t start = 2 * unit * op.cells * op.width;
        by_vector(op.cells * op.width, [&](int64_t c, __mmask16 mask) INLINE_LAMBDA {
            const __m512 value = _mm512_mul_ps(load<BF16>(op.source + start + 2 * c, mask), gate);
            const __m512 past = op.residual ? load<BF16>(op.residual + start + 2 * c, mask) : _mm512_setzero_ps();
            store<BF16>(op.out + start + 2 * c, _mm512_add_ps(value, past), mask);
        });
    }
}

// BORDERED: out (images, lines + 2, cells + 2, width) = a border of zeros, and within it `source`, where that is given. bf16.
inline void bordered(const Op& op, int64_t thread, int64_t threads) {
    const int64_t pixel = 2 * op.width, line = op.cells * pixel, out_line = line + 2 * pixel;
    const Share share(op.images * (op.lines + 2), thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        char* const out = op.out + unit * out_line;
        const int64_t image = unit / (op.lines + 2), y = unit % (op.lines + 2) - 1;
        if (y < 0 || y >= op.lines) {
            memset(out, 0, out_line);
            continue;
        }
        memset(out, 0, pixel);
        if (op.source) memcpy(out + pixel, op.source + (image * op.lines + y) * line, line);
        memset(out + pixel + line, 0, pixel);
    }
}
