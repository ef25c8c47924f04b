/* Products with packed weights.
 *
 * A packed matrix is a row of tiles, each of 16 outputs. Inside a tile the inputs follow each other:
 *   F32   16 floats for each input;
 *   BF16  16 pairs for each two inputs;
 *   Q4    for each group of 32 inputs: 16 scales and 16 minima (float16), then four vectors of 64 codes of 4 bits twice:
 *         vector s holds inputs 4s .. 4s + 3 of each output in its low halves and 16 + 4s .. in its high halves;
 *   Q8    the same with eight vectors of 64 codes of 8 bits.
 * A quantised weight is `code * scale + minimum`, as in GGUF's Q4_1. Its inputs are rounded to 8 bits, each group of 32
 * with a scale of its own, so that the products are sums of small integers (as llama.cpp does for these formats).
 */
#include <math.h>

#include "tailrace.h"

/* Rows that are multiplied at once: as many as the vector registers hold sums for. */
#if defined(__AVX512F__)
#define ROWS 6
#else
#define ROWS 2
#endif

#define HEADER 64 /* bytes of scales and minima of a group of a tile */

INLINE size_t group_bytes(int format) { return HEADER + (format == FORMAT_Q4 ? 256 : 512); }

INLINE size_t tile_bytes(int format, int inputs) {
    if (format == FORMAT_F32) return (size_t)inputs * LANES * 4;
    if (format == FORMAT_BF16) return (size_t)inputs * LANES * 2;
    return (size_t)(inputs / GROUP) * group_bytes(format);
}

INLINE int pair_count(int outputs) { return (outputs + PAIR - 1) / PAIR; }

size_t tr_packed_bytes(int format, int outputs, int inputs) {
    return 2 * (size_t)pair_count(outputs) * tile_bytes(format, inputs);
}

/* --- packing ------------------------------------------------------------------------------------------------------ */

/* Pack `rows` (float32 `[outputs, inputs]`) as FORMAT_F32 or FORMAT_BF16 into `out`, which is zero. */
void tr_pack_floats(uint8_t *out, int format, const float *rows, int outputs, int inputs) {
    size_t tile = tile_bytes(format, inputs);
    for (int n = 0; n < outputs; n++) {
        const float *row = rows + (size_t)n * inputs;
        uint8_t *base = out + (size_t)(n / LANES) * tile;
        int lane = n % LANES;
        if (format == FORMAT_F32)
            for (int k = 0; k < inputs; k++) ((float *)base)[k * LANES + lane] = row[k];
        else
            for (int k = 0; k < inputs; k++)
                ((uint16_t *)base)[(k / 2) * PAIR + 2 * lane + k % 2] = f32_to_bf16(row[k]);
    }
}

/* Pack codes (`[outputs, inputs]`), scales and minima (float16 `[outputs, inputs / GROUP]`) into `out`, which is zero. */
void tr_pack_codes(uint8_t *out, int format, const uint8_t *codes, const uint16_t *scales, const uint16_t *minima,
                   int outputs, int inputs) {
    size_t tile = tile_bytes(format, inputs);
    int groups = inputs / GROUP;
    for (int n = 0; n < outputs; n++) {
        int lane = n % LANES;
        for (int g = 0; g < groups; g++) {
            uint8_t *base = out + (size_t)(n / LANES) * tile + g * group_bytes(format);
            ((uint16_t *)base)[lane] = scales[(size_t)n * groups + g];
            ((uint16_t *)base)[LANES + lane] = minima[(size_t)n * groups + g];
            const uint8_t *code = codes + (size_t)n * inputs + g * GROUP;
            uint8_t *vectors = base + HEADER + 4 * lane;
            for (int i = 0; i < GROUP; i++) {
                if (format == FORMAT_Q4)
                    vectors[(i % 16) / 4 * 64 + i % 4] |= (uint8_t)(code[i] << (i < 16 ? 0 : 4));
                else
                    vectors[i / 4 * 64 + i % 4] = code[i];
            }
        }
    }
}

/* --- vectors ------------------------------------------------------------------------------------------------------ */

INLINE f32x16 halves_to_f32(const uint8_t *p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    union { __m256 half[2]; f32x16 whole; } u;
    u.half[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    u.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)));
    return u.whole;
#else
    f32x16 out;
    for (int i = 0; i < LANES; i++) {
        _Float16 x;
        memcpy(&x, p + 2 * i, 2);
        out[i] = (float)x;
    }
    return out;
#endif
}

/* 64 codes: four inputs of each of 16 outputs. */
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x64_unaligned __attribute__((vector_size(64), aligned(1)));

#if !defined(__AVX512VNNI__) && defined(__AVX2__)
/* Exact for codes below 128 only: the sum of two products must fit into 16 bits. */
INLINE i32x16 dot_small(i32x16 sums, u8x64 codes, int32_t inputs) {
    union { u8x64 whole; __m256i half[2]; } w = {codes};
    union { i32x16 whole; __m256i half[2]; } s = {sums};
    __m256i x = _mm256_set1_epi32(inputs), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++)
        s.half[i] = _mm256_add_epi32(s.half[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w.half[i], x), ones));
    return s.whole;
}
#endif

/* Add to each of 16 sums the products of four codes (0..255) and the four signed inputs in `inputs`. */
INLINE i32x16 dot_codes(i32x16 sums, u8x64 codes, int32_t inputs, const int bits) {
#if defined(__AVX512VNNI__)
    (void)bits;
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(inputs));
#elif defined(__AVX2__)
    if (bits == 4) return dot_small(sums, codes, inputs);
    i32x16 high = dot_small((i32x16){0}, codes >> 4, inputs);
    return dot_small(sums, codes & 15, inputs) + (high << 4);
#else
    (void)bits;
    int8_t x[4];
    memcpy(x, &inputs, 4);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sums[i] += codes[4 * i + j] * x[j];
    return sums;
#endif
}

#if defined(__AVX512BF16__)
/* Add to each of 16 sums the products of two bfloat16 weights and the two bfloat16 inputs in `inputs`. */
INLINE f32x16 dot_bf16(f32x16 sums, u32x16 weights, uint32_t inputs) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)inputs));
}
#endif

/* Whether bfloat16 products round their inputs to bfloat16 and use its dot product: only where that is faster than float32
 * products with widened weights. Zen 4 does it at full width; on Sapphire Rapids it is half as fast as float32. */
int rounds_to_bf16(void) {
#if defined(__AVX512BF16__)
    static int known = -1;
    if (known < 0) known = __builtin_cpu_is("amd");
    return known;
#else
    return 0;
#endif
}

/* --- activations -------------------------------------------------------------------------------------------------- */

/* Bring one row of activations into the form that weights of `format` are multiplied with; other arrays may be NULL.
 * FORMAT_F32, and FORMAT_BF16 unless `rounds_to_bf16`, take the activations as they are. */
void operand_row(int format, const float *x, int inputs, uint16_t *bf16, int8_t *codes, float *scales, float *sums) {
    if (format == FORMAT_BF16) {
        for (int k = 0; k < inputs; k++) bf16[k] = f32_to_bf16(x[k]);
        return;
    }
    const f32x16 magic = splat16(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    for (int g = 0; g < inputs / GROUP; g++) {
        f32x16 low = load16(x + g * GROUP), high = load16(x + g * GROUP + LANES);
        float largest = max_lanes(max16(max16(low, -low), max16(high, -high)));
        float scale = largest / 127.0f;
        float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f; /* of less it would be infinite */
        f32x16 a = (low * splat16(inverse) + magic) - magic;
        f32x16 b = (high * splat16(inverse) + magic) - magic;
        store_bytes(codes + g * GROUP, a);
        store_bytes(codes + g * GROUP + LANES, b);
        /* A value that is no number must not come out as one. */
        scales[g] = scale + 0.0f * sum_lanes(low + high);
        sums[g] = scale * sum_lanes(a + b);
    }
}

/* Write row `row` of a packed matrix as float32 `[inputs]`: how token embeddings are looked up. */
void matrix_row(const Matrix *matrix, int row, float *out) {
    const uint8_t *tile = matrix->data + (size_t)(row / LANES) * tile_bytes(matrix->format, matrix->inputs);
    int lane = row % LANES;
    if (matrix->format == FORMAT_F32) {
        for (int k = 0; k < matrix->inputs; k++) out[k] = ((const float *)tile)[k * LANES + lane];
        return;
    }
    if (matrix->format == FORMAT_BF16) {
        for (int k = 0; k < matrix->inputs; k++) {
            uint32_t bits = (uint32_t)((const uint16_t *)tile)[(k / 2) * PAIR + 2 * lane + k % 2] << 16;
            memcpy(out + k, &bits, 4);
        }
        return;
    }
    for (int g = 0; g < matrix->inputs / GROUP; g++) {
        const uint8_t *base = tile + g * group_bytes(matrix->format);
        float scale = halves_to_f32(base)[lane], minimum = halves_to_f32(base + 32)[lane];
        const uint8_t *vectors = base + HEADER + 4 * lane;
        for (int i = 0; i < GROUP; i++) {
            int code = matrix->format == FORMAT_Q4 ? (vectors[(i % 16) / 4 * 64 + i % 4] >> (i < 16 ? 0 : 4)) & 15
                                                   : vectors[i / 4 * 64 + i % 4];
            out[g * GROUP + i] = (float)code * scale + minimum;
        }
    }
}

/* --- products ----------------------------------------------------------------------------------------------------- */

/* `sums[m][t]`: row m of `x` times tile t of the pair at `tiles`. M, `bits` are constants where this is inlined. */
INLINE void multiply_codes(const int M, const int bits, const uint8_t *tiles, size_t tile, const Operand *x, int row,
                           f32x16 sums[][2]) {
    int groups = x->inputs / GROUP;
    const int vectors = bits == 4 ? 4 : 8;
    size_t step = HEADER + (size_t)vectors * 64;
    const int8_t *codes = x->codes + (size_t)row * x->inputs;
    const float *scales = x->scales + (size_t)row * groups;
    const float *totals = x->sums + (size_t)row * groups;
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = splat16(0);
    for (int g = 0; g < groups; g++) {
        const uint8_t *first = tiles + g * step, *second = first + tile;
        i32x16 whole[ROWS][2];
        for (int m = 0; m < M; m++) whole[m][0] = whole[m][1] = (i32x16){0};
#pragma GCC unroll 8
        for (int s = 0; s < vectors; s++) {
            u8x64 a = *(const u8x64_unaligned *)(first + HEADER + 64 * s);
            u8x64 b = *(const u8x64_unaligned *)(second + HEADER + 64 * s);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const int8_t *group = codes + (size_t)m * x->inputs + g * GROUP;
                int32_t low, high;
                memcpy(&low, group + 4 * s, 4);
                if (bits == 4) {
                    memcpy(&high, group + 16 + 4 * s, 4);
                    whole[m][0] = dot_codes(whole[m][0], a & 15, low, 4);
                    whole[m][1] = dot_codes(whole[m][1], b & 15, low, 4);
                    whole[m][0] = dot_codes(whole[m][0], (a >> 4) & 15, high, 4);
                    whole[m][1] = dot_codes(whole[m][1], (b >> 4) & 15, high, 4);
                } else {
                    whole[m][0] = dot_codes(whole[m][0], a, low, 8);
                    whole[m][1] = dot_codes(whole[m][1], b, low, 8);
                }
            }
        }
        f32x16 scale[2] = {halves_to_f32(first), halves_to_f32(second)};
        f32x16 minimum[2] = {halves_to_f32(first + 32), halves_to_f32(second + 32)};
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
            for (int t = 0; t < 2; t++) {
                f32x16 factor = scale[t] * splat16(scales[(size_t)m * groups + g]);
                sums[m][t] += __builtin_convertvector(whole[m][t], f32x16) * factor;
                sums[m][t] += minimum[t] * splat16(totals[(size_t)m * groups + g]);
            }
    }
}

#if defined(__AVX512BF16__)
INLINE void multiply_bf16(const int M, const uint8_t *tiles, size_t tile, const Operand *x, int row, f32x16 sums[][2]) {
    const uint16_t *inputs = x->bf16 + (size_t)row * x->inputs;
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = splat16(0);
    for (int k = 0; k < x->inputs; k += 2) {
        u32x16 a = (u32x16)load16((const float *)(tiles + (size_t)k * LANES * 2));
        u32x16 b = (u32x16)load16((const float *)(tiles + tile + (size_t)k * LANES * 2));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            uint32_t two;
            memcpy(&two, inputs + (size_t)m * x->inputs + k, 4);
            sums[m][0] = dot_bf16(sums[m][0], a, two);
            sums[m][1] = dot_bf16(sums[m][1], b, two);
        }
    }
}
#endif

/* bfloat16 weights and float32 inputs. */
INLINE void multiply_widened(const int M, const uint8_t *tiles, size_t tile, const Operand *x, int row,
                             f32x16 sums[][2]) {
    const float *inputs = x->f32 + (size_t)row * x->inputs;
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = splat16(0);
    for (int k = 0; k < x->inputs; k += 2) {
        u32x16 a = (u32x16)load16((const float *)(tiles + (size_t)k * LANES * 2));
        u32x16 b = (u32x16)load16((const float *)(tiles + tile + (size_t)k * LANES * 2));
        f32x16 weights[2][2] = {{(f32x16)(a << 16), (f32x16)(b << 16)},
                                {(f32x16)(a & 0xffff0000u), (f32x16)(b & 0xffff0000u)}};
        for (int i = 0; i < 2; i++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                f32x16 input = splat16(inputs[(size_t)m * x->inputs + k + i]);
                sums[m][0] += weights[i][0] * input;
                sums[m][1] += weights[i][1] * input;
            }
    }
}

INLINE void multiply_f32(const int M, const uint8_t *tiles, size_t tile, const Operand *x, int row, f32x16 sums[][2]) {
    const float *inputs = x->f32 + (size_t)row * x->inputs;
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = splat16(0);
    for (int k = 0; k < x->inputs; k++) {
        f32x16 a = load16((const float *)tiles + (size_t)k * LANES);
        f32x16 b = load16((const float *)(tiles + tile) + (size_t)k * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            f32x16 input = splat16(inputs[(size_t)m * x->inputs + k]);
            sums[m][0] += a * input;
            sums[m][1] += b * input;
        }
    }
}

INLINE void multiply(const int M, const Matrix *matrix, const uint8_t *tiles, size_t tile, const Operand *x, int row,
                     f32x16 sums[][2]) {
    switch (matrix->format) {
    case FORMAT_F32: multiply_f32(M, tiles, tile, x, row, sums); break;
    case FORMAT_BF16:
#if defined(__AVX512BF16__)
        if (rounds_to_bf16()) {
            multiply_bf16(M, tiles, tile, x, row, sums);
            break;
        }
#endif
        multiply_widened(M, tiles, tile, x, row, sums);
        break;
    case FORMAT_Q4: multiply_codes(M, 4, tiles, tile, x, row, sums); break;
    default: multiply_codes(M, 8, tiles, tile, x, row, sums);
    }
}

/* Add what the rows' adapters add. */
INLINE void add_loras(const int M, const Matrix *matrix, int pair, const Operand *x, int row, f32x16 sums[][2]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        if (x->adapters[row + m] < 0) continue;
        const Lora *lora = &matrix->loras[x->adapters[row + m]];
        const float *low = x->lows + (size_t)(row + m) * x->low_stride;
        const float *up = lora->up + (size_t)pair * PAIR * lora->rank;
        for (int j = 0; j < lora->rank; j++) {
            sums[m][0] += load16(up + (size_t)j * LANES) * splat16(low[j]);
            sums[m][1] += load16(up + (size_t)(lora->rank + j) * LANES) * splat16(low[j]);
        }
    }
}

INLINE void finish_rows(const int M, const Matrix *matrix, int pair, int row, f32x16 sums[][2], Finish finish,
                        float *out, int stride) {
    if (matrix->bias)
        for (int m = 0; m < M; m++)
            for (int t = 0; t < 2; t++) sums[m][t] += load16(matrix->bias + pair * PAIR + t * LANES);
    for (int m = 0; m < M; m++) {
        float *line = out + (size_t)(row + m) * stride;
        if (finish == GATE) {
            f32x16 gate = sums[m][0];
            store16(line + pair * LANES, gate / (splat16(1.0f) + exp16(-gate)) * sums[m][1]);
            continue;
        }
        for (int t = 0; t < 2; t++) {
            float *place = line + pair * PAIR + t * LANES;
            store16(place, finish == ADD ? load16(place) + sums[m][t] : sums[m][t]);
        }
    }
}

/* One function for each number of rows, so that all sums of a block live in registers. */
#define BLOCK_OF_ROWS(M)                                                                                               \
    static __attribute__((noinline)) void rows_##M(const Matrix *matrix, const uint8_t *tiles, size_t tile,            \
                                                   const Operand *x, int row, int pair, Finish finish, float *out,     \
                                                   int stride) {                                                       \
        f32x16 sums[M][2];                                                                                             \
        multiply(M, matrix, tiles, tile, x, row, sums);                                                                \
        if (matrix->loras && x->adapters) add_loras(M, matrix, pair, x, row, sums);                                    \
        finish_rows(M, matrix, pair, row, sums, finish, out, stride);                                                  \
    }
BLOCK_OF_ROWS(1)
BLOCK_OF_ROWS(2)
#if ROWS == 6
BLOCK_OF_ROWS(3)
BLOCK_OF_ROWS(4)
BLOCK_OF_ROWS(5)
BLOCK_OF_ROWS(6)
#endif

typedef void (*RowBlock)(const Matrix *, const uint8_t *, size_t, const Operand *, int, int, Finish, float *, int);
#if ROWS == 6
static const RowBlock row_blocks[ROWS] = {rows_1, rows_2, rows_3, rows_4, rows_5, rows_6};
#else
static const RowBlock row_blocks[ROWS] = {rows_1, rows_2};
#endif

/* Multiply `rows` rows of `x` with pairs of tiles `first_pair` .. `last_pair - 1` of the matrix.
 *
 * `out` `[rows, out_stride]`: STORE writes and ADD adds output n at column n (whole pairs); GATE writes silu(gate) * up of
 * pair p at columns 16 p .. 16 p + 15.
 */
void linear_pairs(const Matrix *matrix, const Operand *x, int rows, int first_pair, int last_pair, Finish finish,
                  float *out, int out_stride) {
    size_t tile = tile_bytes(matrix->format, matrix->inputs);
    for (int pair = first_pair; pair < last_pair; pair++) {
        const uint8_t *tiles = matrix->data + 2 * (size_t)pair * tile;
        for (int row = 0; row < rows; row += ROWS) {
            int count = rows - row < ROWS ? rows - row : ROWS;
            row_blocks[count - 1](matrix, tiles, tile, x, row, pair, finish, out, out_stride);
        }
    }
}
