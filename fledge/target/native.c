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

#define MOST_SIZE 1024        /* of a head that is normed */
#define WORTH_THREADS (1 << 14) /* numbers: with fewer, a second thread costs what it saves */

/* exp, to 2 in the last place: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. Compilers make vectors of it. */
static inline float exp_f32(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* All matrices are contiguous.
   rms_norm: rows x cols; with `added`, sum = in + added and its norm. Zeros up to `filled` rows.
   rope: states (batch, heads, rows, size) with these strides, the last of them 1, to a contiguous result; cos and sin
   (batch, rows, size).
   heads: of rows of a product, each `width` numbers that begin with `heads` heads of `size`, to (batch, heads, rows, size):
   normed per head where there is a weight, then rotated.
   gated: silu(gate) * up, from rows of gate and up (cols each) side by side. Zeros up to `filled` rows. */
#define KERNELS(T)                                                                                                    \
    static inline void norm_##T(const T *in, const T *weight, T *out, long cols, float eps) {                         \
        float parts[16] = {0}, sum = 0;                                                                               \
        long c = 0;                                                                                                   \
        for (; c + 16 <= cols; c += 16)                                                                               \
            for (int i = 0; i < 16; i++) parts[i] += wide_##T(in[c + i]) * wide_##T(in[c + i]);                       \
        for (; c < cols; c++) sum += wide_##T(in[c]) * wide_##T(in[c]);                                               \
        for (int i = 0; i < 16; i++) sum += parts[i];                                                                 \
        float scale = 1.0f / sqrtf(sum / cols + eps);                                                                 \
        for (c = 0; c < cols; c++)                                                                                    \
            out[c] = narrow_##T(wide_##T(narrow_##T(wide_##T(in[c]) * scale)) * wide_##T(weight[c]));                 \
    }                                                                                                                 \
    void rms_norm_##T(const T *in, const T *added, const T *weight, T *sum, T *out, long rows, long cols,             \
                      long filled, float eps) {                                                                       \
        _Pragma("omp parallel for if(rows * cols >= WORTH_THREADS)")                                                  \
        for (long row = 0; row < rows; row++) {                                                                       \
            const T *from = in + row * cols;                                                                          \
            for (long c = row * cols; added && c < (row + 1) * cols; c++)                                             \
                sum[c] = narrow_##T(wide_##T(in[c]) + wide_##T(added[c]));                                            \
            norm_##T(added ? sum + row * cols : from, weight, out + row * cols, cols, eps);                           \
        }                                                                                                             \
        memset(out + rows * cols, 0, (filled - rows) * cols * sizeof(T));                                             \
    }                                                                                                                 \
    static inline void turn_##T(const T *x, const T *cosine, const T *sine, T *out, long half) {                      \
        for (long c = 0; c < half; c++) {                                                                             \
            float low = wide_##T(x[c]), high = wide_##T(x[c + half]);                                                 \
            out[c] = narrow_##T(wide_##T(narrow_##T(low * wide_##T(cosine[c]))) -                                     \
                                wide_##T(narrow_##T(high * wide_##T(sine[c]))));                                      \
            out[c + half] = narrow_##T(wide_##T(narrow_##T(high * wide_##T(cosine[c + half]))) +                      \
                                       wide_##T(narrow_##T(low * wide_##T(sine[c + half]))));                         \
        }                                                                                                             \
    }                                                                                                                 \
    void rope_##T(const T *in, const T *cos, const T *sin, T *out, long batch, long heads, long rows, long size,      \
                  long batch_stride, long head_stride, long row_stride) {                                             \
        for (long b = 0; b < batch; b++)                                                                              \
            for (long h = 0; h < heads; h++)                                                                          \
                for (long r = 0; r < rows; r++, out += size) {                                                        \
                    long place = (b * rows + r) * size;                                                               \
                    const T *x = in + b * batch_stride + h * head_stride + r * row_stride;                            \
                    turn_##T(x, cos + place, sin + place, out, size / 2);                                             \
                }                                                                                                     \
    }                                                                                                                 \
    void heads_##T(const T *in, const T *weight, const T *cos, const T *sin, T *out, long batch, long heads,          \
                   long rows, long size, long width, float eps) {                                                     \
        _Pragma("omp parallel for collapse(2) if(batch * heads * rows * size >= WORTH_THREADS)")                      \
        for (long b = 0; b < batch; b++)                                                                              \
            for (long h = 0; h < heads; h++) {                                                                        \
                T normed[MOST_SIZE];                                                                                  \
                for (long r = 0; r < rows; r++) {                                                                     \
                    long row = b * rows + r;                                                                          \
                    const T *x = in + row * width + h * size;                                                         \
                    if (weight) norm_##T(x, weight, normed, size, eps), x = normed;                                   \
                    turn_##T(x, cos + row * size, sin + row * size, out + ((b * heads + h) * rows + r) * size,        \
                             size / 2);                                                                               \
                }                                                                                                     \
            }                                                                                                         \
    }                                                                                                                 \
    void gated_##T(const T *in, T *out, long rows, long cols, long filled) {                                          \
        memset(out + rows * cols, 0, (filled - rows) * cols * sizeof(T));                                             \
        _Pragma("omp parallel for if(rows * cols >= WORTH_THREADS)")                                                  \
        for (long row = 0; row < rows; row++) {                                                                       \
            const T *gates = in + 2 * row * cols;                                                                     \
            for (long c = 0; c < cols; c++) {                                                                         \
                float gate = wide_##T(gates[c]), open = gate / (1.0f + exp_f32(-gate));                               \
                out[row * cols + c] = narrow_##T(wide_##T(narrow_##T(open)) * wide_##T(gates[cols + c]));             \
            }                                                                                                         \
        }                                                                                                             \
    }

typedef float f32;
KERNELS(f32)
KERNELS(bf16)
