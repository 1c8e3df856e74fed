// ATTENTION: softmax(scale q.k + bias) v for each image and head, from one buffer of queries, keys and values. Biases
// are read where they are added, from a head's table of offsets, which stays in the first cache: (2 lines - 1) by
// (2 cells - 1), such that the offset of the key from the query grows along it.
#pragma once
#include <vector>

#include "product.h"

// Keys side by side have biases side by side in the table, as long as they are on one line of the grid.
struct Run {
    __mmask16 keys;  // of a vector of 16
    int64_t at;      // of the first of the 16, from the query's place in the table
};

struct Biases {
    int64_t lines, cells, row;
    std::vector<std::vector<Run>> runs;  // by vector of keys

    Biases(int64_t lines, int64_t cells) : lines(lines), cells(cells), row(2 * cells - 1), runs((lines * cells + 15) / 16) {
        for (int64_t key = 0, count; key < lines * cells; key += count) {
            const int64_t in_vector = key % 16;
            count = std::min(16 - in_vector, cells - key % cells);
            runs[key / 16].push_back({__mmask16(tail(count) << in_vector), key / cells * row + key % cells - in_vector});
        }
    }
    int64_t size() const { return (2 * lines - 1) * row; }
    int64_t place(int64_t query) const { return (lines - 1 - query / cells) * row + cells - 1 - query % cells; }

    // Add the biases of 16 keys to their logits.
    INLINE __m512 added(int64_t key, const float* place, __m512 logits) const {
        for (const Run& run : runs[key / 16])
            logits = _mm512_add_ps(logits, _mm512_maskz_loadu_ps(run.keys, place + run.at));
        return logits;
    }
    INLINE void add(int64_t key, float* place, __m512 values) const {
        for (const Run& run : runs[key / 16])
            _mm512_mask_storeu_ps(place + run.at, run.keys,
                                  _mm512_add_ps(_mm512_maskz_loadu_ps(run.keys, place + run.at), values));
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

// The logits of R queries for a panel of keys, V vectors of which are tokens; `largest` takes part in them.
template <int TYPE, int R, int V>
INLINE void match(const Op& op, const char* queries, int64_t stride, const char* keys, const Biases& biases,
                  const float* const (&places)[R], int64_t token, int64_t padded, float* logits, __m512 (&largest)[R]) {
    const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(float(op.head_dim)));
    typename Dot<TYPE>::Sum sums[R][V];
    clear<TYPE, R, V>(sums);
    multiply<TYPE, R>(queries, stride, keys, 1, 0, op.head_dim * bytes(TYPE) / 4, sums);
#pragma GCC unroll 2
    for (int half = 0; half < V; half++) {
        const int64_t first = token + half * 16;
        if (op.relative == PRE) {
            const std::vector<Run>& runs = biases.runs[first / 16];
#pragma GCC unroll 14
            for (int r = 0; r < R; r++)
                sums[r][half] = _mm512_fmadd_ps(sums[r][half], factor,
                                                _mm512_maskz_loadu_ps(runs[0].keys, places[r] + runs[0].at));
            for (size_t i = 1; i < runs.size(); i++)
#pragma GCC unroll 14
                for (int r = 0; r < R; r++)
                    sums[r][half] = _mm512_add_ps(sums[r][half],
                                                  _mm512_maskz_loadu_ps(runs[i].keys, places[r] + runs[i].at));
        } else {
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) sums[r][half] = _mm512_mul_ps(sums[r][half], factor);
        }
        const __mmask16 mask = tail(op.lines * op.cells - first);
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            largest[r] = _mm512_mask_max_ps(largest[r], mask, largest[r], sums[r][half]);
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

template <int TYPE, int R>
void attend(const Op& op, const char* queries, int64_t stride, const char* keys, const char* values, const Biases& biases,
            const float* table, int64_t query, float* logits, char* weights, char* out, int64_t channel) {
    const int64_t tokens = op.lines * op.cells, padded = (tokens + 31) / 32 * 32;
    const int64_t panel_bytes = op.head_dim * bytes(TYPE) * 32;
    const float* places[R];
    for (int r = 0; r < R; r++) places[r] = table + biases.place(query + r);
    __m512 largest[R];
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) largest[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < tokens; t += PANEL, keys += panel_bytes)
        if (tokens - t > 16)
            match<TYPE, R, 2>(op, queries, stride, keys, biases, places, t, padded, logits, largest);
        else
            match<TYPE, R, 1>(op, queries, stride, keys, biases, places, t, padded, logits, largest);
    float inverse[R];
    for (int r = 0; r < R; r++) {
        float* row = logits + r * padded;
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest[r]));
        __m512 total = _mm512_setzero_ps();
        each_vector(tokens, [&](int64_t t, __mmask16 mask) INLINE_LAMBDA {
            const __m512 e = _mm512_maskz_mov_ps(mask, exp16<TYPE == FP32>(_mm512_sub_ps(_mm512_loadu_ps(row + t), top)));
            total = _mm512_add_ps(total, e);
            if (op.relative == POST)
                _mm512_storeu_ps(row + t, e);
            else  // divided by their sum after the product
                store<TYPE>(weights + (r * padded + t) * bytes(TYPE), e);
        });
        inverse[r] = 1.0f / _mm512_reduce_add_ps(total);
        if (op.relative != POST) continue;
        each_vector(tokens, [&](int64_t t, __mmask16) INLINE_LAMBDA {
            const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(row + t), _mm512_set1_ps(inverse[r]));
            store<TYPE>(weights + (r * padded + t) * bytes(TYPE), biases.added(t, places[r], weight));
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
    const Biases biases(op.lines, op.cells);
    const Share share(op.images * op.heads, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t head = unit / op.images, image = unit % op.images, channel = head * op.head_dim;
        const char* q = op.source + image * tokens * stride + channel * size;
        const int64_t next = std::min(unit + 1, share.last - 1);
        const char* next_q = op.source + next % op.images * tokens * stride + next / op.images * op.head_dim * size;
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
                attend<TYPE, R>(op, q + t * stride, stride, keys, values, biases,
                                op.bias + head * biases.size(), t, logits, weights,
                                op.out + (image * tokens + t) * op.width * bytes(op.out_type), channel);
                rows = R;
            };
            if (tokens - t >= 14) go.template operator()<14>();
            else if (tokens - t >= 7) go.template operator()<7>();
            else if (tokens - t >= 2) go.template operator()<2>();
            else go.template operator()<1>();
        }
    }
}
