/* The decoder step on the CPU: what the files of this folder share.
 *
 * Plain C11 with GCC's vector extensions, so that one source serves AVX-512, AVX2 and other CPUs; only the integer and
 * bfloat16 dot products name instructions. Every output element is summed in one fixed order, whatever the batch: a
 * token's numbers do not depend on its batch-mates, on how its prompt was sliced, or on the number of threads.
 */
#ifndef TAILRACE_H
#define TAILRACE_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LANES 16
/* Outputs are computed in pairs of tiles of 16; a matrix is padded to whole pairs. */
#define PAIR (2 * LANES)
/* Inputs that share a scale in the quantised formats. */
#define GROUP 32
/* Tokens in a block of the KV cache: the lanes of a vector. */
#define BLOCK LANES

#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x16_unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t i8x16 __attribute__((vector_size(16), aligned(1)));

enum Format { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_Q4 = 2, FORMAT_Q8 = 3 };

/* What an adapter adds to a matrix (Hu et al. 2021): `up` times `down`; nothing where `rank` is 0. */
typedef struct {
    int32_t rank;
    const float *down; /* [rank, inputs] */
    const float *up;   /* [tiles of outputs, rank, LANES], whole pairs of tiles */
} Lora;

/* A weight matrix `[outputs, inputs]`, packed by `tr_pack_*`. `bias` may be NULL, else it has whole pairs. */
typedef struct {
    int32_t format;
    int32_t outputs;
    int32_t inputs;
    const uint8_t *data;
    const float *bias;
    const Lora *loras; /* [adapters] or NULL */
} Matrix;

typedef struct {
    Matrix qkv;     /* query, key and value heads one after the other */
    Matrix output;
    Matrix gate_up; /* tile of the gate, tile of the up projection, in turn */
    Matrix down;
    const float *attention_norm; /* [hidden] */
    const float *mlp_norm;       /* [hidden] */
    const float *query_norm;     /* [head_dim] or NULL */
    const float *key_norm;       /* [head_dim] or NULL */
    void *keys;                  /* [kv_heads, head_dim, BLOCK] of block 0; the next ones `block_stride` apart */
    void *values;                /* [kv_heads, BLOCK, head_dim] of block 0 */
    int32_t window;              /* tokens back that a token sees, itself included; 0: all */
} Layer;

typedef struct {
    int32_t layer_count;
    int32_t hidden;
    int32_t intermediate;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t cache_format; /* FORMAT_F32 or FORMAT_BF16 */
    int32_t widest_rank;  /* of all adapters */
    int64_t block_stride; /* numbers from one block of a layer's keys or values to the next */
    float norm_epsilon;
    float attention_scale;
    float rope_scale;                 /* factor of cosine and sine */
    const float *inverse_frequencies; /* [head_dim / 2] */
    const Layer *layers;
    const float *final_norm; /* [hidden] */
    Matrix embedding;
    Matrix head;
} Model;

/* A slice of one sequence: rows `start` .. `start + count` of the batch; `context` tokens before it are in the cache. */
typedef struct {
    int32_t start;
    int32_t count;
    int32_t context;
    const int32_t *blocks;
} Span;

typedef struct {
    int32_t tokens;
    int32_t span_count;
    int32_t wanted_count;
    const int32_t *ids;      /* [tokens] */
    const int32_t *adapters; /* [tokens] number of each row's adapter, -1 for none; NULL when no row has one */
    const Span *spans;       /* [span_count] */
    const int32_t *wanted;   /* [wanted_count] rows whose logits are computed */
    float *logits;           /* [wanted_count, outputs of the head] */
    int32_t *best;           /* [wanted_count] the likeliest token, or -1 where a logit is not finite */
    float *hidden;           /* [tokens, hidden] the last hidden states, or NULL */
} Batch;

/* Rows of activations in the form that a matrix format multiplies. Strides are in elements of each array. */
typedef struct {
    int32_t inputs;
    const float *f32;      /* [rows, inputs], FORMAT_F32, FORMAT_BF16 */
    const uint16_t *bf16;  /* [rows, inputs], FORMAT_BF16 where `rounds_to_bf16` */
    const int8_t *codes;   /* [rows, inputs], quantised formats */
    const float *scales;   /* [rows, inputs / GROUP] value of one step of the codes */
    const float *sums;     /* [rows, inputs / GROUP] sum of the group's values */
    const int32_t *adapters; /* [rows] or NULL */
    const float *lows;       /* [rows, low_stride] the `down` product of each row that has an adapter */
    int32_t low_stride;
} Operand;

/* threads.c */
typedef struct Threads Threads;
typedef void (*Work)(void *argument, int item);
Threads *tr_threads_start(int count);
void tr_threads_stop(Threads *threads);
int threads_count(const Threads *threads);
void threads_wake(Threads *threads);
void threads_rest(Threads *threads);
void threads_each(Threads *threads, Work work, void *argument, int items);

/* linear.c */
size_t tr_packed_bytes(int format, int outputs, int inputs);
int rounds_to_bf16(void);
void operand_row(int format, const float *x, int inputs, uint16_t *bf16, int8_t *codes, float *scales, float *sums);
void matrix_row(const Matrix *matrix, int row, float *out);
/* What happens to the sums of one pair of tiles of one row. */
typedef enum { STORE, ADD, GATE } Finish;
void linear_pairs(const Matrix *matrix, const Operand *x, int rows, int first_pair, int last_pair, Finish finish,
                  float *out, int out_stride);

/* attention.c */
typedef struct {
    const Model *model;
    const Layer *layer;
    const float *queries; /* [tokens, stride], rotated and scaled */
    int32_t stride;
    float *out;           /* [tokens, heads * head_dim] */
} Attention;
int attention_tile(const Model *model, int count);
void cache_write(const Model *model, const Layer *layer, const float *key, const float *value, int block, int slot);
void attention_item(const Attention *attention, const Span *span, int first_token, int tokens, int kv_head);

/* small vector helpers */
INLINE f32x16 load16(const float *p) { return *(const f32x16_unaligned *)p; }
INLINE void store16(float *p, f32x16 v) { *(f32x16_unaligned *)p = v; }
INLINE f32x16 splat16(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE f32x16 bf16_to_f32(const uint16_t *p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    u32x16 wide = __builtin_convertvector(*(const u16x16 *)p, u32x16) << 16;
    return (f32x16)wide;
#endif
}

/* Write whole numbers between -127 and 127 as bytes. */
INLINE void store_bytes(int8_t *p, f32x16 whole) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)whole)));
#else
    *(i8x16 *)p = __builtin_convertvector(__builtin_convertvector(whole, i32x16), i8x16);
#endif
}

/* Round to the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* `yes` in the lanes where `a < b`, `no` elsewhere, also where one of them is no number. */
INLINE f32x16 where_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)no, (__m512)yes);
#else
    i32x16 mask = a < b;
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
#endif
}

/* The greater of each two lanes; `b` where one of them is no number. */
INLINE f32x16 max16(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return where_less(b, a, a, b);
#endif
}

/* `values` in the lanes first .. last, `other` elsewhere. */
INLINE f32x16 keep_lanes(f32x16 values, int first, int last, f32x16 other) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32x16 mask = (lane >= first) & (lane <= last);
    return (f32x16)((mask & (i32x16)values) | (~mask & (i32x16)other));
}

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

INLINE float sum_lanes(f32x16 v) {
    union { f32x16 whole; f32x8 half[2]; } a = {v};
    union { f32x8 whole; f32x4 half[2]; } b = {a.half[0] + a.half[1]};
    f32x4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

INLINE float max_lanes(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

/* e to the x, about 1 unit in the last place; 0 below -87, at most e to the 88; NaN stays NaN (Cephes' polynomial). */
INLINE f32x16 exp16(f32x16 x) {
    const f32x16 low = splat16(-87.0f), high = splat16(88.0f), magic = splat16(12582912.0f);
    f32x16 clamped = where_less(x, low, low, x);
    clamped = where_less(high, clamped, high, clamped);
    f32x16 n = clamped * splat16(1.44269504088896341f) + magic;
    n -= magic;
    f32x16 r = clamped - n * splat16(0.693359375f);
    r = r - n * splat16(-2.12194440e-4f);
    f32x16 p = splat16(1.9875691500e-4f);
    p = p * r + splat16(1.3981999507e-3f);
    p = p * r + splat16(8.3334519073e-3f);
    p = p * r + splat16(4.1665795894e-2f);
    p = p * r + splat16(1.6666665459e-1f);
    p = p * r + splat16(5.0000001201e-1f);
    p = p * (r * r) + r + splat16(1.0f);
    i32x16 exponent = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return where_less(x, low, splat16(0.0f), p * (f32x16)exponent);
}

#endif
