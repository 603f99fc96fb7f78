/* Small operations of a decoding step, and what a decoder layer does before and behind its attention. They round where
   transformers' own code does, operation by operation. Compiled by native.py. */

#include "vectors.h"

#define MOST_SIZE 1024 /* of a head */

typedef struct { /* pointers of NULL: there is no such norm, bias, or gated product */
    const void *in_norm, *query_norm, *key_norm, *mixed_norm, *mlp_norm, *out_norm;
    const void *qkv, *qkv_bias, *mix, *mix_bias, *gate_up, *gate_up_bias, *down, *down_bias;
    long hidden, heads, groups, size, inner; /* query heads, key heads, numbers of a head, numbers behind the gate */
    long one_more, turned_first, gelu;       /* norms scale by 1 + weight; heads are rotated, then normed; gelu, not silu */
    float eps, residual;                     /* what is added to states is scaled by it */
} layer;

void multiply_part_f32(const f32 *, long, const f32 *, const f32 *, f32 *, long, long, long, long, long);
void multiply_part_bf16(const bf16 *, long, const bf16 *, const bf16 *, bf16 *, long, long, long, long, long);

#ifdef _OPENMP
#include <omp.h>
#define BARRIER _Pragma("omp barrier")
#define PART omp_get_thread_num(), parts = omp_get_num_threads()
#else
#define BARRIER
#define PART 0, parts = 1
#endif

static inline vector rounded_f32(vector numbers) { return numbers; }
static inline vector rounded_bf16(vector numbers) {
    wide bits = (wide)numbers, nan = (wide)((bits & 0x7fffffff) > 0x7f800000);
    wide near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return (vector)((nan & bits) | (~nan & near));
}

/* g times its sigmoid of `steepness` g */
static inline vector opened(vector gate, vector slope) {
    integers below = slope < 0;
    vector e = power((vector)((integers)slope | (int32_t)0x80000000)), one = (vector){} + 1.0f;
    return gate * (vector)(((integers)e & below) | ((integers)one & ~below)) / (one + e);
}

static inline vector activated(vector gate, long gelu) {
    if (!gelu) return opened(gate, gate);
    return opened(gate, 1.5957691216f * (gate + 0.044715f * gate * gate * gate)); /* the approximation by tanh */
}

static long low(long total, long part, long parts) { return total * part / parts; }

/* All matrices are contiguous.
   rms_norm: rows x cols.
   beside: rows of `table` by their numbers and rows of states, both normed, side by side: (rows, 2 * cols).
   rope: states (batch, heads, rows, size) with these strides, the last of them 1, to a contiguous result; cos and sin
   (batch, rows, size).
   before: states (batch * rows, hidden), cos and sin (batch, rows, size) to query (batch, heads, rows, size), key and
   value (batch, groups, rows, size). `room`: for every row a normed one, APART, and one of the product.
   behind: states and mixed (rows, heads * size) to what the layer makes of them, or, where it has no gated product, to
   the sum of states and attention, with its norm in `normed`. `room`: for every row two of hidden
   and two of inner, and one each of hidden, heads * size and inner, APART. */
#define KERNELS(T)                                                                                                    \
    static inline vector read_##T(const T *at, long left) {                                                           \
        if (left >= LANES) return load_##T(at);                                                                       \
        T some[LANES] = {0};                                                                                          \
        memcpy(some, at, left * sizeof(T));                                                                           \
        return load_##T(some);                                                                                        \
    }                                                                                                                 \
    static inline void write_##T(T *at, vector numbers, long left) {                                                  \
        T some[LANES];                                                                                                \
        store_##T(left >= LANES ? at : some, numbers);                                                                \
        if (left < LANES) memcpy(at, some, left * sizeof(T));                                                         \
    }                                                                                                                 \
    static void norm_##T(const T *in, const T *weight, T *out, long cols, float eps, long one_more) {                 \
        vector squares = {};                                                                                          \
        for (long c = 0; c < cols; c += LANES) {                                                                      \
            vector numbers = read_##T(in + c, cols - c);                                                              \
            squares += numbers * numbers;                                                                             \
        }                                                                                                             \
        float sum = 0;                                                                                                \
        for (int i = 0; i < LANES; i++) sum += squares[i];                                                            \
        float scale = 1.0f / sqrtf(sum / cols + eps);                                                                 \
        for (long c = 0; c < cols; c += LANES) {                                                                      \
            vector normed = read_##T(in + c, cols - c) * scale, by = read_##T(weight + c, cols - c);                  \
            write_##T(out + c, one_more ? normed * (by + 1.0f) : rounded_##T(normed) * by, cols - c);                 \
        }                                                                                                             \
    }                                                                                                                 \
    static void added_##T(const T *states, const T *addend, T *out, long cols, float scale) {                         \
        for (long c = 0; c < cols; c += LANES) {                                                                      \
            vector more = rounded_##T(read_##T(addend + c, cols - c) * scale);                                        \
            write_##T(out + c, read_##T(states + c, cols - c) + more, cols - c);                                      \
        }                                                                                                             \
    }                                                                                                                 \
    static void turn_##T(const T *x, const T *cosine, const T *sine, T *out, long half) {                             \
        for (long c = 0; c < half; c += LANES) {                                                                      \
            long left = half - c, d = c + half;                                                                       \
            vector first = read_##T(x + c, left), second = read_##T(x + d, left);                                     \
            vector turned = rounded_##T(first * read_##T(cosine + c, left));                                          \
            write_##T(out + c, turned - rounded_##T(second * read_##T(sine + c, left)), left);                        \
            turned = rounded_##T(second * read_##T(cosine + d, left));                                                \
            write_##T(out + d, turned + rounded_##T(first * read_##T(sine + d, left)), left);                         \
        }                                                                                                             \
    }                                                                                                                 \
    void rms_norm_##T(const T *in, const T *weight, T *out, long rows, long cols, long one_more, float eps) {         \
        for (long row = 0; row < rows; row++)                                                                         \
            norm_##T(in + row * cols, weight, out + row * cols, cols, eps, one_more);                                 \
    }                                                                                                                 \
    void beside_##T(const long *ids, const T *table, const T *first, const T *states, const T *second, T *out,         \
                    long rows, long cols, float eps) {                                                                \
        for (long row = 0; row < rows; row++, out += 2 * cols) {                                                      \
            norm_##T(table + ids[row] * cols, first, out, cols, eps, 0);                                              \
            norm_##T(states + row * cols, second, out + cols, cols, eps, 0);                                          \
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
    void before_##T(const layer *of, const T *states, const T *cos, const T *sin, T *query, T *key, T *value,         \
                    T *room, long batch, long rows, long threads) {                                                   \
        long hidden = of->hidden, size = of->size, all = of->heads + 2 * of->groups, lines = batch * rows;            \
        long apart = APART(T, hidden);                                                                                \
        T *product = room + lines * apart;                                                                            \
        _Pragma("omp parallel num_threads(threads) if(threads > 1)") {                                                \
            long part = PART;                                                                                         \
            const T *normed = of->in_norm ? room : states;                                                            \
            for (long r = low(lines, part, parts); of->in_norm && r < low(lines, part + 1, parts); r++)               \
                norm_##T(states + r * hidden, of->in_norm, room + r * apart, hidden, of->eps, of->one_more);          \
            BARRIER                                                                                                   \
            multiply_part_##T(normed, of->in_norm ? apart : hidden, of->qkv, of->qkv_bias, product, lines, hidden,    \
                              all * size, part, parts);                                                               \
            BARRIER                                                                                                   \
            for (long task = low(lines * all, part, parts); task < low(lines * all, part + 1, parts); task++) {       \
                long line = task / all, head = task % all, b = line / rows, r = line % rows;                          \
                const T *x = product + task * size, *norm = head < of->heads ? of->query_norm : of->key_norm;         \
                long of_key = head - of->heads, of_value = of_key - of->groups, place = line * size;                  \
                T kept[MOST_SIZE], *out = query + ((b * of->heads + head) * rows + r) * size;                         \
                if (of_key >= 0) out = key + ((b * of->groups + of_key) * rows + r) * size;                           \
                if (of_value >= 0) out = value + ((b * of->groups + of_value) * rows + r) * size;                     \
                if (of_value >= 0) memcpy(out, x, size * sizeof(T));                                                  \
                else if (!norm) turn_##T(x, cos + place, sin + place, out, size / 2);                                 \
                else if (of->turned_first) {                                                                          \
                    turn_##T(x, cos + place, sin + place, kept, size / 2);                                            \
                    norm_##T(kept, norm, out, size, of->eps, of->one_more);                                           \
                } else {                                                                                              \
                    norm_##T(x, norm, kept, size, of->eps, of->one_more);                                             \
                    turn_##T(kept, cos + place, sin + place, out, size / 2);                                          \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    void behind_##T(const layer *of, const T *states, const T *mixed, T *out, T *normed, T *room, long rows,          \
                    long threads) {                                                                                   \
        long hidden = of->hidden, inner = of->inner, width = of->heads * of->size, apart = hidden;                    \
        T *added = room, *gates = added + rows * hidden, *passed = gates + rows * 2 * inner;                          \
        T *moved = passed + rows * APART(T, inner), *sum = moved + rows * APART(T, width);                            \
        if (of->gate_up) normed = sum + rows * hidden, apart = APART(T, hidden);                                      \
        else sum = out;                                                                                               \
        _Pragma("omp parallel num_threads(threads) if(threads > 1)") {                                                \
            long part = PART, first = low(rows, part, parts), end = low(rows, part + 1, parts);                       \
            for (long r = first; r < end && APART(T, width) > width; r++)                                             \
                memcpy(moved + r * APART(T, width), mixed + r * width, width * sizeof(T));                            \
            BARRIER                                                                                                   \
            multiply_part_##T(APART(T, width) > width ? moved : mixed, APART(T, width), of->mix, of->mix_bias, added, \
                              rows, width, hidden, part, parts);                                                      \
            BARRIER                                                                                                   \
            for (long r = first; r < end; r++) {                                                                      \
                T *at = added + r * hidden;                                                                           \
                if (of->mixed_norm) norm_##T(at, of->mixed_norm, at, hidden, of->eps, of->one_more);                  \
                added_##T(states + r * hidden, at, sum + r * hidden, hidden, of->residual);                           \
                if (of->mlp_norm)                                                                                     \
                    norm_##T(sum + r * hidden, of->mlp_norm, normed + r * apart, hidden, of->eps, of->one_more);      \
            }                                                                                                         \
            if (of->gate_up) {                                                                                        \
                const T *of_mlp = of->mlp_norm ? normed : sum;                                                        \
                BARRIER                                                                                               \
                multiply_part_##T(of_mlp, of->mlp_norm ? apart : hidden, of->gate_up, of->gate_up_bias, gates, rows,  \
                                  hidden, 2 * inner, part, parts);                                                    \
                BARRIER                                                                                               \
                for (long r = 0; r < rows; r++)                                                                       \
                    for (long c = low(inner / LANES, part, parts); c < low(inner / LANES, part + 1, parts); c++) {    \
                        const T *gate = gates + r * 2 * inner + c * LANES;                                            \
                        vector open = rounded_##T(activated(load_##T(gate), of->gelu));                               \
                        store_##T(passed + r * APART(T, inner) + c * LANES, open * load_##T(gate + inner));           \
                    }                                                                                                 \
                BARRIER                                                                                               \
                multiply_part_##T(passed, APART(T, inner), of->down, of->down_bias, added, rows, inner, hidden, part, \
                                  parts);                                                                             \
                BARRIER                                                                                               \
                for (long r = first; r < end; r++) {                                                                  \
                    T *at = added + r * hidden;                                                                       \
                    if (of->out_norm) norm_##T(at, of->out_norm, at, hidden, of->eps, of->one_more);                  \
                    added_##T(sum + r * hidden, at, out + r * hidden, hidden, of->residual);                          \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
    }

KERNELS(f32)
KERNELS(bf16)
