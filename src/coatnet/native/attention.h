// ATTENTION: softmax(scale q.k + bias) v for each image and head, from one buffer of queries, keys and values. A head's
// biases come as a table by offset: (2 lines - 1) by (2 cells - 1), such that the offset of the key from the query grows
// along it.
#pragma once
#include <limits>

#include "product.h"

// A head's biases spread so that those of one query lie side by side for all keys, whatever lines these are on: for each
// column of queries the table's lines, each less what none of its keys reaches. Of queries further down the first comes later.
struct Biases {
    int64_t lines, cells, heights = 2 * lines - 1, row = 2 * cells - 1;

    int64_t size() const { return heights * row; }
    int64_t spread_size() const { return cells * heights * cells + 16; }  // vectors reach beyond the last
    int64_t place(int64_t query) const {
        return (query % cells * heights + lines - 1 - query / cells) * cells;  // of its bias for the first key
    }
    // Call `each(at, from, keys)` for up to 16 keys: they are spread at `at` and lie at `from` in the table.
    template <class Each>
    INLINE void by_keys(Each each) const {
        for (int64_t column = 0; column < cells; column++)
            for (int64_t height = 0; height < heights; height++)
                for (int64_t key = 0; key < cells; key += 16)
                    each((column * heights + height) * cells + key, height * row + cells - 1 - column + key, tail(cells - key));
    }
    void spread(const float* table, float* to) const {
        by_keys([&](int64_t at, int64_t from, __mmask16 keys) INLINE_LAMBDA {
            _mm512_mask_storeu_ps(to + at, keys, _mm512_maskz_loadu_ps(keys, table + from));
        });
    }
    // Add up what was spread.
    void gather(const float* spread, float* table) const {
        by_keys([&](int64_t at, int64_t from, __mmask16 keys) INLINE_LAMBDA {
            const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(keys, table + from), _mm512_maskz_loadu_ps(keys, spread + at));
            _mm512_mask_storeu_ps(table + from, keys, sum);
        });
    }
};

// Pack the keys of one head as weights: panels of 32 tokens, `words` 32-bit steps each; tokens beyond the last are 0.
inline void pack_keys(const char* keys, int64_t stride, int64_t tokens, int64_t words, int* out) {
    for (int64_t t = 0; t < (tokens + 31) / 32 * 32; t += 16)
        for (int64_t k = 0; k < words; k += 16) {
            __m512i rows[16];
            const __mmask16 mask = tail(words - k);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                rows[r] = _mm512_maskz_loadu_epi32(t + r < tokens ? mask : 0, keys + (t + r) * stride + 4 * k);
            transpose(rows);
            int* to = out + t / 32 * words * 32 + k * 32 + t % 32;
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                if (r < words - k) _mm512_storeu_si512(to + r * 32, rows[r]);
        }
}

// Pack `channels` of the values of one head, 32 at most, as weights: a step is 1 token in fp32, 2 in bf16.
template <int TYPE>
void pack_values(const char* values, int64_t stride, int64_t tokens, int64_t padded, int64_t channels, char* out) {
    if constexpr (TYPE == BF16) {
        const __mmask32 mask = channels >= 32 ? ~0u : (1u << channels) - 1;
        auto row = [&](int64_t t) { return _mm512_maskz_loadu_epi16(t < tokens ? mask : 0, values + t * stride); };
        for (int64_t t = 0; t < padded; t += 2, out += 128) {
            const __m512i even = row(t), odd = row(t + 1);
            _mm512_storeu_si512(out, zip<0>(even, odd));
            _mm512_storeu_si512(out + 64, zip<16>(even, odd));
        }
    } else {
        for (int64_t t = 0; t < padded; t++, out += 128)
            for (int64_t half = 0; half < 2; half++)
                _mm512_storeu_ps(out + half * 64, load<FP32>(values + t * stride + half * 64,
                                                             t < tokens ? tail(channels - half * 16) : 0));
    }
}

// The logits of R queries for a panel of keys, V vectors of which are tokens; `largest`, where it is given, takes part in
// them. Each query's biases lie at its place.
template <int TYPE, int R, int V>
INLINE void match(const Op& op, const char* queries, int64_t stride, const char* keys, const float* const (&places)[R],
                  int64_t token, int64_t padded, float* logits, __m512* largest) {
    const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(float(op.head_dim)));
    typename Dot<TYPE>::Sum sums[R][V];
    clear<TYPE, R, V>(sums);
    multiply<TYPE, R>(queries, stride, keys, 1, 0, op.head_dim * bytes(TYPE) / 4, sums);
#pragma GCC unroll 2
    for (int half = 0; half < V; half++) {
        const int64_t first = token + half * 16;
#pragma GCC unroll 14
        for (int r = 0; r < R; r++)
            sums[r][half] = op.relative == PRE ? _mm512_fmadd_ps(sums[r][half], factor, _mm512_loadu_ps(places[r] + first))
                                               : _mm512_mul_ps(sums[r][half], factor);
        const __mmask16 mask = tail(op.lines * op.cells - first);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            if (largest) largest[r] = _mm512_mask_max_ps(largest[r], mask, largest[r], sums[r][half]);
            _mm512_storeu_ps(logits + r * padded + first, sums[r][half]);
        }
    }
}

// Call `each(t, keys)` for every 16 tokens; `keys` says which of them there are.
template <class Each>
INLINE void each_vector(int64_t tokens, Each each) {
    int64_t t = 0;
    for (; t + 16 <= tokens; t += 16) each(t, __mmask16(0xffff));
    if (t < tokens) each(t, tail(tokens - t));
}

// R queries of one head of one image. 14 rows side by side: alone each would wait for its largest and its sum. What these
// were is `noted` for the way back, where that is given.
template <int TYPE, int R>
void attend(const Op& op, const char* queries, int64_t stride, const char* keys, const char* values,
            const float* const (&places)[R], float* logits, char* weights, char* out, int64_t channel, float* noted) {
    const int64_t tokens = op.lines * op.cells, padded = (tokens + 31) / 32 * 32;
    const int64_t panel_bytes = op.head_dim * bytes(TYPE) * 32;
    __m512 largest[R], totals[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
        largest[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        totals[r] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < tokens; t += PANEL, keys += panel_bytes)
        if (tokens - t > 16)
            match<TYPE, R, 2>(op, queries, stride, keys, places, t, padded, logits, largest);
        else
            match<TYPE, R, 1>(op, queries, stride, keys, places, t, padded, logits, largest);
    alignas(64) float tops[16], inverse[16];
    _mm512_store_ps(tops, by_row(largest, true));
    each_vector(tokens, [&](int64_t t, __mmask16 mask) INLINE_LAMBDA {
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(logits + r * padded + t), _mm512_set1_ps(tops[r]));
            const __m512 e = _mm512_maskz_mov_ps(mask, exp16<TYPE == FP32>(off));
            totals[r] = _mm512_add_ps(totals[r], e);
            if (op.relative == POST)
                _mm512_storeu_ps(logits + r * padded + t, e);
            else  // divided by their sum after the product
                store<TYPE>(weights + (r * padded + t) * bytes(TYPE), e);
        }
    });
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), by_row(totals, false)));
    if (noted) {
        std::copy_n(tops, R, noted);
        std::copy_n(inverse, R, noted + tokens);
    }
    for (int r = 0; r < R && op.relative == POST; r++) {
        each_vector(tokens, [&](int64_t t, __mmask16 mask) INLINE_LAMBDA {  // beyond the last bias may lie no number
            const __m512 bias = _mm512_maskz_loadu_ps(mask, places[r] + t), e = _mm512_loadu_ps(logits + r * padded + t);
            store<TYPE>(weights + (r * padded + t) * bytes(TYPE), _mm512_fmadd_ps(e, _mm512_set1_ps(inverse[r]), bias));
        });
        inverse[r] = 1.0f;
    }
    for (int64_t d = 0; d < op.head_dim; d += 32) {
        __m512 sums[R][2];
        clear<TYPE, R, 2>(sums);
        multiply<TYPE, R>(weights, padded * bytes(TYPE), values + d * padded * bytes(TYPE), 1, 0,
                          (tokens * bytes(TYPE) + 3) / 4, sums);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t c = channel + d + half * 16;
            const __mmask16 mask = tail(op.head_dim - d - half * 16);
            if (!mask) break;
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                __m512 value = _mm512_mul_ps(sums[r][half], _mm512_set1_ps(inverse[r]));
                if (op.out_type == UINT8)
                    value = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(mask, op.out_scale + c),
                                            _mm512_maskz_loadu_ps(mask, op.out_zero + c));
                store(op.out_type, out + (r * op.width + c) * bytes(op.out_type), value, mask);
            }
        }
    }
}

template <int TYPE>
void attention(const Op& op, int64_t thread, int64_t threads) {
    const int64_t tokens = op.lines * op.cells, padded = (tokens + 31) / 32 * 32, size = bytes(TYPE);
    const int64_t stride = 3 * op.width * size;
    const int64_t panels = (op.head_dim + 31) / 32 * 32;
    char* const keys = kept<struct Keys>(padded * op.head_dim * size);
    char* const values = kept<struct Values>(padded * panels * size);
    char* const weights = kept<struct Weights>(ROWS * padded * size);
    float* const logits = kept<struct Logits, float>(ROWS * padded);
    const Biases biases = {op.lines, op.cells};
    float* const spread = kept<struct Spread, float>(biases.spread_size());
    const Share share(op.images * op.heads, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t head = unit / op.images, image = unit % op.images, channel = head * op.head_dim;
        const char* q = op.source + image * tokens * stride + channel * size;
        const int64_t next = std::min(unit + 1, share.last - 1);
        const char* next_q = op.source + next % op.images * tokens * stride + next / op.images * op.head_dim * size;
        if (op.relative != NONE && (unit == share.first || image == 0)) biases.spread(op.bias + head * biases.size(), spread);
        pack_keys(q + op.width * size, stride, tokens, op.head_dim * size / 4, (int*)keys);
        for (int64_t d = 0; d < op.head_dim; d += 32)
            pack_values<TYPE>(q + (2 * op.width + d) * size, stride, tokens, padded, op.head_dim - d,
                              values + d * padded * size);
        for (int64_t t = 0, rows; t < tokens; t += rows) {
            auto go = [&]<int R>() {
                // The next head's, too far from one another for the processor to foresee.
                for (int64_t part = 0; part < 3 * R; part++)
                    for (int64_t at = 0; at < op.head_dim * size; at += 64)
                        _mm_prefetch(next_q + (3 * t + part) * op.width * size + at, _MM_HINT_T1);
                const float* places[R];
                for (int r = 0; r < R; r++) places[r] = spread + biases.place(t + r);
                attend<TYPE, R>(op, q + t * stride, stride, keys, values, places, logits, weights,
                                op.out + (image * tokens + t) * op.width * bytes(op.out_type), channel,
                                op.sums ? op.sums + (image * op.heads + head) * 2 * tokens + t : nullptr);
                rows = R;
            };
            if (tokens - t >= 14) go.template operator()<14>();
            else if (tokens - t >= 7) go.template operator()<7>();
            else if (tokens - t >= 2) go.template operator()<2>();
            else go.template operator()<1>();
        }
    }
}
