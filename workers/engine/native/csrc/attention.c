/* Attention over the block cache, softmax on the fly (Milakov and Gimelshein 2018; Dao et al. 2022).
 *
 * A block keeps the keys of its 16 tokens transposed, so that one vector holds the same number of 16 keys, and the values
 * one token after the other. Past tokens are taken in stretches of 8 blocks that begin at multiples of 128 tokens: the
 * same sums in the same order whether a token comes alone or in a slice of a prompt.
 */
#include <math.h>

#include "tailrace.h"

#define STRETCH 8
/* Query rows that share each key and value read. */
#if defined(__AVX512F__)
#define ROWS 6
#define WIDE 4
#else
#define ROWS 2
#define WIDE 2
#endif
#define MOST_ROWS 48
#define MOST_HEAD_DIM 512

/* Lower than any score, and still a number. */
#define NOTHING (-1e30f)

INLINE f32x16 load_cached(const void *base, size_t at, const int format) {
    return format == FORMAT_BF16 ? bf16_to_f32((const uint16_t *)base + at) : load16((const float *)base + at);
}

/* Tokens of a slice of `count` that one item takes: many, so that keys and values are read from the nearest cache, unless
 * that left threads without work. */
int attention_tile(const Model *model, int count) {
    int sharing = model->heads / model->kv_heads;
    int rows = count * sharing >= 8 * MOST_ROWS ? MOST_ROWS : 2 * ROWS;
    return rows < sharing ? 1 : rows / sharing;
}

/* Put one token's rotated key and its value, each `[kv_heads, head_dim]`, into the cache. */
void cache_write(const Model *model, const Layer *layer, const float *key, const float *value, int block, int slot) {
    int dim = model->head_dim;
    for (int head = 0; head < model->kv_heads; head++) {
        size_t base = (size_t)block * model->block_stride + (size_t)head * dim * BLOCK;
        const float *k = key + (size_t)head * dim, *v = value + (size_t)head * dim;
        for (int d = 0; d < dim; d++) {
            size_t key_at = base + (size_t)d * BLOCK + slot, value_at = base + (size_t)slot * dim + d;
            if (model->cache_format == FORMAT_BF16) {
                ((uint16_t *)layer->keys)[key_at] = f32_to_bf16(k[d]);
                ((uint16_t *)layer->values)[value_at] = f32_to_bf16(v[d]);
            } else {
                ((float *)layer->keys)[key_at] = k[d];
                ((float *)layer->values)[value_at] = v[d];
            }
        }
    }
}

/* scores[r][16 n + lane]: query row r times each key of `count` (constant N) blocks. */
INLINE void score_blocks(const int M, const int N, const int format, const void *keys, const size_t *bases, int dim,
                         const float *const *queries, float (*scores)[STRETCH * BLOCK]) {
    f32x16 sums[ROWS][WIDE];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sums[m][n] = splat16(0);
    for (int d = 0; d < dim; d++) {
        f32x16 key[WIDE];
        for (int n = 0; n < N; n++) key[n] = load_cached(keys, bases[n] + (size_t)d * BLOCK, format);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            f32x16 query = splat16(queries[m][d]);
            for (int n = 0; n < N; n++) sums[m][n] += key[n] * query;
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store16(scores[m] + n * BLOCK, sums[m][n]);
}

/* out[r][16 * N dims]: add the values of `tokens` tokens weighted with each row's probabilities. What lies behind the last
 * token may be another sequence's remains, and is not touched. */
INLINE void weigh_values(const int M, const int N, const int format, const void *values, const size_t *bases, int tokens,
                         int dim, int from, float (*weights)[STRETCH * BLOCK], float *out) {
    f32x16 sums[ROWS][WIDE];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sums[m][n] = load16(out + m * dim + from + n * LANES);
    for (int token = 0; token < tokens; token++) {
        size_t at = bases[token / BLOCK] + (size_t)(token % BLOCK) * dim + from;
        f32x16 value[WIDE];
        for (int n = 0; n < N; n++) value[n] = load_cached(values, at + n * LANES, format);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            f32x16 weight = splat16(weights[m][token]);
            for (int n = 0; n < N; n++) sums[m][n] += value[n] * weight;
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store16(out + m * dim + from + n * LANES, sums[m][n]);
}

typedef struct {
    const void *keys, *values;
    const size_t *bases;
    int blocks;
    int tokens; /* in these blocks */
    int dim;
    const float *const *queries;
    float (*scores)[STRETCH * BLOCK];
    float *out; /* [rows, dim] */
} Tile;

INLINE void score_rows(const int M, const int format, const Tile *t) {
    int n = 0;
    for (; n + WIDE <= t->blocks; n += WIDE)
        score_blocks(M, WIDE, format, t->keys, t->bases + n, t->dim, t->queries,
                     (float (*)[STRETCH * BLOCK])(t->scores[0] + n * BLOCK));
    for (; n < t->blocks; n++)
        score_blocks(M, 1, format, t->keys, t->bases + n, t->dim, t->queries,
                     (float (*)[STRETCH * BLOCK])(t->scores[0] + n * BLOCK));
}

INLINE void weigh_rows(const int M, const int format, const Tile *t) {
    int from = 0;
    for (; from + WIDE * LANES <= t->dim; from += WIDE * LANES)
        weigh_values(M, WIDE, format, t->values, t->bases, t->tokens, t->dim, from, t->scores, t->out);
    for (; from < t->dim; from += LANES)
        weigh_values(M, 1, format, t->values, t->bases, t->tokens, t->dim, from, t->scores, t->out);
}

/* One function for each number of rows and format, so that all sums live in registers. */
#define TILE_FUNCTIONS(M)                                                                                              \
    static __attribute__((noinline)) void score_##M(const Tile *t, int format) {                                       \
        if (format == FORMAT_BF16) score_rows(M, FORMAT_BF16, t);                                                      \
        else score_rows(M, FORMAT_F32, t);                                                                             \
    }                                                                                                                  \
    static __attribute__((noinline)) void weigh_##M(const Tile *t, int format) {                                       \
        if (format == FORMAT_BF16) weigh_rows(M, FORMAT_BF16, t);                                                      \
        else weigh_rows(M, FORMAT_F32, t);                                                                             \
    }
TILE_FUNCTIONS(1)
TILE_FUNCTIONS(2)
#if ROWS == 6
TILE_FUNCTIONS(3)
TILE_FUNCTIONS(4)
TILE_FUNCTIONS(5)
TILE_FUNCTIONS(6)
#endif

typedef void (*TileFunction)(const Tile *, int);
#if ROWS == 6
static const TileFunction score_functions[ROWS] = {score_1, score_2, score_3, score_4, score_5, score_6};
static const TileFunction weigh_functions[ROWS] = {weigh_1, weigh_2, weigh_3, weigh_4, weigh_5, weigh_6};
#else
static const TileFunction score_functions[ROWS] = {score_1, score_2};
static const TileFunction weigh_functions[ROWS] = {weigh_1, weigh_2};
#endif

/* Ask for blocks that will be read soon: they lie apart, so the processor does not foresee them. */
INLINE void fetch_blocks(const void *base, const size_t *bases, int blocks, int dim, int format) {
    size_t item = format == FORMAT_BF16 ? 2 : 4;
    for (int b = 0; b < blocks; b++) {
        const char *block = (const char *)base + bases[b] * item;
        for (size_t at = 0; at < (size_t)dim * BLOCK * item; at += 64) __builtin_prefetch(block + at);
    }
}

/* Turn the scores of one row into weights; keep the row's running maximum and sum, and scale what it has so far. */
static void soften(float *scores, int blocks, int first_key, int oldest, int position, int dim, float *highest,
                   float *sum, float *out) {
    const f32x16 minus_infinity = splat16(-INFINITY);
    f32x16 peak = splat16(*highest);
    for (int b = 0; b < blocks; b++) {
        f32x16 s = load16(scores + b * BLOCK);
        int first = first_key + b * BLOCK;
        if (first + BLOCK - 1 > position || first < oldest) {
            s = keep_lanes(s, oldest - first, position - first, minus_infinity);
            store16(scores + b * BLOCK, s);
        }
        peak = max16(s, peak);
    }
    float top = max_lanes(peak);
    f32x16 total = splat16(0);
    for (int b = 0; b < blocks; b++) {
        f32x16 weight = exp16(load16(scores + b * BLOCK) - splat16(top));
        store16(scores + b * BLOCK, weight);
        total += weight;
    }
    float shrink = exp16(splat16(*highest - top))[0];
    *sum = *sum * shrink + sum_lanes(total);
    *highest = top;
    if (shrink != 1.0f)
        for (int d = 0; d < dim; d += LANES) store16(out + d, load16(out + d) * splat16(shrink));
}

/* Find the blocks of the stretch at token `begin`, up to that of `last_position`; return how many there are. */
static int locate(const Model *model, const Span *span, int kv_head, int begin, int last_position, size_t *bases) {
    int blocks = last_position < begin ? 0 : (last_position - begin) / BLOCK + 1;
    if (blocks > STRETCH) blocks = STRETCH;
    for (int b = 0; b < blocks; b++)
        bases[b] = (size_t)span->blocks[begin / BLOCK + b] * model->block_stride +
                   (size_t)kv_head * model->head_dim * BLOCK;
    return blocks;
}

/* Attend with tokens `first_token` .. `first_token + tokens - 1` of the span, for the query heads of one key head. */
void attention_item(const Attention *attention, const Span *span, int first_token, int tokens, int kv_head) {
    const Model *model = attention->model;
    const Layer *layer = attention->layer;
    int dim = model->head_dim, sharing = model->heads / model->kv_heads;
    int first_position = span->context + first_token, last_position = first_position + tokens - 1;

    for (int part = 0; part < sharing; part += MOST_ROWS) {
        int heads = sharing - part < MOST_ROWS ? sharing - part : MOST_ROWS;
        int rows = tokens * heads;
        const float *queries[MOST_ROWS];
        float scores[MOST_ROWS][STRETCH * BLOCK] __attribute__((aligned(64)));
        float out[MOST_ROWS * MOST_HEAD_DIM] __attribute__((aligned(64)));
        float highest[MOST_ROWS], sum[MOST_ROWS];
        for (int r = 0; r < rows; r++) {
            int token = span->start + first_token + r / heads;
            int head = kv_head * sharing + part + r % heads;
            queries[r] = attention->queries + (size_t)token * attention->stride + (size_t)head * dim;
            highest[r] = NOTHING;
            sum[r] = 0;
        }
        memset(out, 0, (size_t)rows * dim * 4);
        int oldest_of_first = layer->window ? first_position - layer->window + 1 : 0;
        if (oldest_of_first < 0) oldest_of_first = 0;
        int begin = oldest_of_first / (STRETCH * BLOCK) * (STRETCH * BLOCK);
        size_t both[2][STRETCH];
        int ahead = locate(model, span, kv_head, begin, last_position, both[0]);
        for (int turn = 0; begin <= last_position; begin += STRETCH * BLOCK, turn ^= 1) {
            const size_t *bases = both[turn];
            int blocks = ahead;
            int cached = last_position + 1 - begin < blocks * BLOCK ? last_position + 1 - begin : blocks * BLOCK;
            fetch_blocks(layer->values, bases, blocks, dim, model->cache_format);
            ahead = locate(model, span, kv_head, begin + STRETCH * BLOCK, last_position, both[turn ^ 1]);
            for (int r = 0; r < rows; r += ROWS) {
                int count = rows - r < ROWS ? rows - r : ROWS;
                Tile tile = {layer->keys, layer->values, bases, blocks, cached, dim, queries + r, scores + r, out + r * dim};
                score_functions[count - 1](&tile, model->cache_format);
                for (int i = r; i < r + count; i++) {
                    int position = first_position + i / heads;
                    int oldest = layer->window ? position - layer->window + 1 : 0;
                    soften(scores[i], blocks, begin, oldest, position, dim, &highest[i], &sum[i], out + i * dim);
                }
                if (r == 0) fetch_blocks(layer->keys, both[turn ^ 1], ahead, dim, model->cache_format);
                weigh_functions[count - 1](&tile, model->cache_format);
            }
        }
        for (int r = 0; r < rows; r++) {
            int token = span->start + first_token + r / heads;
            int head = kv_head * sharing + part + r % heads;
            float *line = attention->out + ((size_t)token * model->heads + head) * dim;
            for (int d = 0; d < dim; d += LANES) store16(line + d, load16(out + r * dim + d) / splat16(sum[r]));
        }
    }
}
