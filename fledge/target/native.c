/* Small operations of a decoding step, one pass each over numbers that lie in the processor's caches. They round where
   transformers' own code does, operation by operation. Compiled by native.py. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide_bf16(bf16 number) {
    uint32_t bits = (uint32_t)number << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow_bf16(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float wide_f32(float value) { return value; }
static inline float narrow_f32(float value) { return value; }

/* rms_norm: rows x cols, contiguous.
   rope: states (batch, heads, rows, size) with these strides, the last of them 1, to a contiguous result; cos and sin
   (batch, rows, size), contiguous. */
#define KERNELS(T)                                                                                                    \
    void rms_norm_##T(const T *in, const T *weight, T *out, long rows, long cols, float eps) {                        \
        for (long row = 0; row < rows; row++, in += cols, out += cols) {                                              \
            float parts[16] = {0}, sum = 0;                                                                           \
            long c = 0;                                                                                               \
            for (; c + 16 <= cols; c += 16)                                                                           \
                for (int i = 0; i < 16; i++) parts[i] += wide_##T(in[c + i]) * wide_##T(in[c + i]);                   \
            for (; c < cols; c++) sum += wide_##T(in[c]) * wide_##T(in[c]);                                           \
            for (int i = 0; i < 16; i++) sum += parts[i];                                                             \
            float scale = 1.0f / sqrtf(sum / cols + eps);                                                             \
            for (c = 0; c < cols; c++)                                                                                \
                out[c] = narrow_##T(wide_##T(narrow_##T(wide_##T(in[c]) * scale)) * wide_##T(weight[c]));             \
        }                                                                                                             \
    }                                                                                                                 \
    void rope_##T(const T *in, const T *cos, const T *sin, T *out, long batch, long heads, long rows, long size,      \
                  long batch_stride, long head_stride, long row_stride) {                                             \
        long half = size / 2;                                                                                         \
        for (long b = 0; b < batch; b++)                                                                              \
            for (long h = 0; h < heads; h++)                                                                          \
                for (long r = 0; r < rows; r++, out += size) {                                                        \
                    const T *x = in + b * batch_stride + h * head_stride + r * row_stride;                            \
                    const T *cosine = cos + (b * rows + r) * size, *sine = sin + (b * rows + r) * size;               \
                    for (long c = 0; c < half; c++) {                                                                 \
                        float low = wide_##T(x[c]), high = wide_##T(x[c + half]);                                     \
                        out[c] = narrow_##T(wide_##T(narrow_##T(low * wide_##T(cosine[c]))) -                         \
                                            wide_##T(narrow_##T(high * wide_##T(sine[c]))));                          \
                        out[c + half] = narrow_##T(wide_##T(narrow_##T(high * wide_##T(cosine[c + half]))) +          \
                                                   wide_##T(narrow_##T(low * wide_##T(sine[c + half]))));             \
                    }                                                                                                 \
                }                                                                                                     \
    }

typedef float f32;
KERNELS(f32)
KERNELS(bf16)
