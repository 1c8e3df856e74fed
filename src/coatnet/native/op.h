// One row of a plan: what to do with which buffers. `plan.py` and `operations.py` write rows, `run` carries them out in order.
// Every field is 64 bits wide, so that both languages lay the struct out alike. Strides are in bytes.
#pragma once
#include <cstdint>

enum Kind : int64_t {
    UNFOLD, PRODUCT, DEPTHWISE, GATE, SCALE, GATED, POOL, NORM, ATTENTION, CONVERT, MEAN, TANH,
    MOMENTS, ACTED_DEPTHWISE, ACTED, GATE_SLOPE, ACTED_SLOPE, DEPTHWISE_SLOPE, MIXED, ATTENTION_SLOPE,
    WEIGHT_SLOPE, PACK, TOTAL, BATCH_NORM, BATCH_NORM_SLOPE, NORMED, NORMED_SUMS, SPREAD, POOL_SLOPE, LAYER_SLOPE,
    EXCITE_SLOPE, BRANCH, BORDERED
};
enum Type : int64_t { FP32, BF16, UINT8 };
enum Act : int64_t { LINEAR, GELU, GELU_KEPT, GELU_SLOPE };
enum Relative : int64_t { NONE, PRE, POST };

struct Op {
    int64_t kind, type, out_type, act;
    int64_t images, lines, cells;           // of the output: a batch of maps of `lines` rows of `cells` pixels
    int64_t depth, width;                   // channels in and out
    int64_t in_lines, in_cells;             // of the source map
    int64_t kernel, stride, padding;        // px
    int64_t source_image, source_line, source_cell, source_channel;
    int64_t out_image, out_line, out_cell;  // ACTED and ACTED_SLOPE: `out_line` is 0 where `out` lies as the source does
    int64_t segments, segment_stride;       // PRODUCT: K in so many runs (a 3x3 convolution has three)
    int64_t part;                           // PRODUCT: > 0 where so many steps of K are summed by themselves
    int64_t weight_image;                   // PRODUCT: > 0 where each image has weights, scales and biases of its own
    int64_t heads, head_dim, relative;      // ATTENTION
    const char *source, *weight, *residual; // residual lies as the output does
    const float *bias, *scale;              // by output channel, the former or none; scale turns sums of 8-bit products into numbers;
                                            // ATTENTION: a table of biases by offset for each head
    const float *out_scale, *out_zero;      // by output channel: 8 bit = number * out_scale + out_zero
    const char *pad;                        // DEPTHWISE: one pixel of zeros, in the source's type
    const float *source_zero;               // by input channel: the 8-bit value that stands for 0
    float *sums;                            // DEPTHWISE writes each line's sum by channel, GATE reads them; ATTENTION notes each
                                            // query's largest logit and 1 / its sum, (images, heads, 2, tokens), if asked to
    const float *squeeze, *squeeze_bias, *excite, *excite_bias;  // GATE
    float *made_scale, *made_bias;          // SCALE: by image and output channel
    float *made_gates, *made_slopes;        // EXCITE_SLOPE: by image and channel
    // Training (training.h): a map and its gradient; BatchNorm as a factor and a shift by channel; what gradients mix.
    char *gradient;
    const float *factor, *shift, *gates, *mean_slopes, *mix;
    float *running_mean, *running_variance; // BATCH_NORM: what inference norms by, moved on by `momentum`
    double eps, momentum;
    float *weight_sums;
    char *beside;                           // PRODUCT: a second map that lies as the output does (GELU_KEPT, GELU_SLOPE)
    int64_t adds;                           // WEIGHT_SLOPE: 1 where it adds to what `out` holds
    char *out;
};
