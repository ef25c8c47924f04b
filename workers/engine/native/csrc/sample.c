/* The draw of a token from a row of logits: the same steps as `workers.engine.sampler.sample`, row by row without sorting
 * what cannot be drawn.
 */
#include <math.h>
#include <stdlib.h>

#include "tailrace.h"

/* A draw limited by top_p alone looks at so many of the likeliest tokens, and at all when these do not hold enough mass. */
static const int NUCLEI[] = {64, 1024};
/* Tokens whose greatest logits stand for them when a threshold is looked for. */
#define SPREAD 16

typedef struct {
    float logit;
    int32_t token;
} Candidate;

/* Parameters of one row; `key` is that of `workers.engine.noise.draw_key`. */
typedef struct {
    float temperature;
    int32_t top_k;
    float top_p;
    float min_p;
    float typical_p;
    int32_t unused;
    uint64_t key;
} Draw;

typedef struct {
    const float *logits;
    int64_t stride;
    int32_t vocabulary;
    const Draw *draws;
    int32_t *tokens;
} Sampling;

typedef uint64_t u64x8 __attribute__((vector_size(64)));

#define GOLDEN 0x9E3779B97F4A7C15ull

/* 53 random bits for (key, token): SplitMix64's finaliser, as in noise.py. */
INLINE uint64_t bits_of(uint64_t key, int32_t token) {
    uint64_t v = ((uint64_t)(token + 1) * GOLDEN) ^ key;
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9ull;
    v = (v ^ (v >> 27)) * 0x94D049BB133111EBull;
    return (v ^ (v >> 31)) >> 11;
}

/* Standard Gumbel noise. */
static float noise_of(uint64_t bits) {
    double uniform = ((double)bits + 0.5) * 0x1p-53;
    return (float)-log(-log(uniform));
}

static int likelier(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->token > y->token) - (x->token < y->token);
}

static int argmax(const float *logits, int count) {
    f32x16 best = splat16(-INFINITY);
    int n = 0;
    for (; n + LANES <= count; n += LANES) best = max16(load16(logits + n), best);
    float top = max_lanes(best);
    for (; n < count; n++) top = logits[n] > top ? logits[n] : top;
    for (n = 0; n < count; n++)
        if (logits[n] == top) return n;
    return 0;
}

/* Return the k-th greatest of `values` (Hoare 1961), which are reordered. */
static float select_greatest(float *values, int count, int k) {
    int first = 0, last = count - 1, place = k - 1;
    while (first < last) {
        float pivot = values[(first + last) / 2];
        int i = first, j = last;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i > j) break;
            float swapped = values[i];
            values[i++] = values[j];
            values[j--] = swapped;
        }
        if (place <= j)
            last = j;
        else if (place >= i)
            first = i;
        else
            break;
    }
    return values[place];
}

/* Return a number that at least `k` logits reach, and not many more. */
static float threshold(const float *logits, int count, int k, float *greatest) {
    int found = 0, n = 0;
    for (; n + SPREAD * LANES <= count; n += SPREAD * LANES, found += LANES) {
        f32x16 best = load16(logits + n);
        for (int i = 1; i < SPREAD; i++) best = max16(load16(logits + n + i * LANES), best);
        store16(greatest + found, best);
    }
    for (; n < count; n++) greatest[found++] = logits[n];
    if (k > found) return -INFINITY;
    return select_greatest(greatest, found, k);
}

/* Write the tokens whose logits reach `least`, divided by the temperature, likeliest first; none is impossible. */
static int gather(const float *logits, int count, float least, float temperature, Candidate *out) {
    int found = 0;
    const f32x16 limit = splat16(least);
    int n = 0;
    for (; n + LANES <= count; n += LANES) {
        f32x16 v = load16(logits + n);
#if defined(__AVX512F__)
        unsigned mask = _mm512_cmp_ps_mask((__m512)v, (__m512)limit, _CMP_GE_OQ);
        for (; mask; mask &= mask - 1) {
            int token = n + __builtin_ctz(mask);
            if (logits[token] > -INFINITY) out[found++] = (Candidate){logits[token] / temperature, token};
        }
#else
        (void)limit;
        if (max_lanes(v) < least) continue;
        for (int i = n; i < n + LANES; i++)
            if (logits[i] >= least && logits[i] > -INFINITY) out[found++] = (Candidate){logits[i] / temperature, i};
#endif
    }
    for (; n < count; n++)
        if (logits[n] >= least && logits[n] > -INFINITY) out[found++] = (Candidate){logits[n] / temperature, n};
    qsort(out, (size_t)found, sizeof(Candidate), likelier);
    return found;
}

/* Logarithm of the sum of exponentials of all logits over the temperature. */
static double log_total(const float *logits, int count, float temperature) {
    float top = logits[argmax(logits, count)] / temperature;
    if (top == -INFINITY) return -INFINITY;
    double total = 0;
    int n = 0;
    const f32x16 divisor = splat16(temperature), peak = splat16(top);
    while (n + LANES <= count) {
        /* Floats for a stretch, doubles over all of them. */
        f32x16 lanes = splat16(0);
        for (int i = 0; i < 64 && n + LANES <= count; i++, n += LANES) lanes += exp16(load16(logits + n) / divisor - peak);
        total += (double)sum_lanes(lanes);
    }
    for (; n < count; n++) total += exp((double)(logits[n] / temperature - top));
    return (double)top + log(total);
}

typedef struct {
    float distance;
    int place;
} Surprise;

static int nearer(const void *a, const void *b) {
    const Surprise *x = a, *y = b;
    if (x->distance != y->distance) return x->distance < y->distance ? -1 : 1;
    return (x->place > y->place) - (x->place < y->place);
}

/* Locally typical sampling (Meister et al. 2022): make the candidates beyond `mass` impossible. Return 0 without memory. */
static int keep_typical(Candidate *candidates, int count, float mass) {
    Surprise *surprises = malloc((size_t)count * sizeof(Surprise));
    if (!surprises) return 0;
    double total = 0, entropy = 0;
    for (int i = 0; i < count; i++) total += exp((double)(candidates[i].logit - candidates[0].logit));
    double normaliser = (double)candidates[0].logit + log(total);
    for (int i = 0; i < count; i++) {
        double log_prob = (double)candidates[i].logit - normaliser;
        if (candidates[i].logit > -INFINITY) entropy -= exp(log_prob) * log_prob;
    }
    for (int i = 0; i < count; i++)
        surprises[i] = (Surprise){(float)fabs(normaliser - (double)candidates[i].logit - entropy), i};
    qsort(surprises, (size_t)count, sizeof(Surprise), nearer);
    double sum = 0;
    int last = 0;
    while (last < count) {
        sum += exp((double)candidates[surprises[last].place].logit - normaliser);
        if (sum >= (double)mass) break;
        last++;
    }
    if (last >= count) last = count - 1;
    float limit = surprises[last].distance;
    for (int i = 0; i < count; i++)
        if (surprises[i].distance > limit) candidates[surprises[i].place].logit = -INFINITY;
    free(surprises);
    return 1;
}

/* Apply top_p, min_p and typical_p to candidates sorted by falling logit, and draw. Return -1 without memory. */
static int draw_sorted(Candidate *candidates, int count, double total, const Draw *draw) {
    int kept = count;
    if (draw->top_p < 1) {
        double before = 0;
        for (kept = 0; kept < count && (kept == 0 || before < (double)draw->top_p); kept++)
            before += exp((double)candidates[kept].logit - total);
    }
    if (draw->min_p > 0) {
        float least = candidates[0].logit + logf(draw->min_p);
        while (kept > 1 && candidates[kept - 1].logit < least) kept--;
    }
    if (draw->typical_p < 1 && !keep_typical(candidates, kept, draw->typical_p)) return -1;
    float best = -INFINITY;
    int token = candidates[0].token;
    for (int i = 0; i < kept; i++) {
        float value = candidates[i].logit + noise_of(bits_of(draw->key, candidates[i].token));
        if (value > best) {
            best = value;
            token = candidates[i].token;
        }
    }
    return token;
}

/* Draw from the whole vocabulary. Noise is `-log(-log(u))`, at most `-log(1 - u)`: few tokens need more than that bound. */
static int draw_whole(const float *logits, int count, const Draw *draw) {
    int token = argmax(logits, count);
    float top = logits[token] / draw->temperature;
    float best = top + noise_of(bits_of(draw->key, token));
    float least = draw->min_p > 0 ? top + logf(draw->min_p) : -INFINITY;
    for (int n = 0; n < count; n += LANES) {
        int width = count - n < LANES ? count - n : LANES;
        uint64_t bits[LANES];
        for (int i = 0; i < LANES; i++) bits[i] = bits_of(draw->key, n + i);
        for (int i = 0; i < width; i++) {
            float logit = logits[n + i] / draw->temperature;
            /* The distance of u from 1 is at least 2^-(zeros + 1), where `zeros` are its leading zero bits of 53. */
            int zeros = __builtin_clzll(((1ull << 53) - bits[i]) << 10 | 1);
            if (logit + (float)(zeros + 1) * 0.69314719f + 1e-3f <= best || logit < least) continue;
            float value = logit + noise_of(bits[i]);
            if (value > best) {
                best = value;
                token = n + i;
            }
        }
    }
    return token;
}

/* Memory of one thread for the rows that it draws; kept, because fresh memory costs more than a draw. */
typedef struct {
    int count;
    Candidate *candidates;
    float *greatest;
} Scratch;

static _Thread_local Scratch scratch;

static int have_scratch(int count) {
    if (count <= scratch.count) return 1;
    free(scratch.candidates);
    free(scratch.greatest);
    scratch.candidates = malloc((size_t)count * sizeof(Candidate));
    scratch.greatest = malloc(((size_t)count + LANES) * sizeof(float));
    scratch.count = scratch.candidates && scratch.greatest ? count : 0;
    return scratch.count > 0;
}

/* The logarithm of the candidates' sum of exponentials. */
static double log_sum(const Candidate *candidates, int count) {
    double total = 0;
    for (int i = 0; i < count; i++) total += exp((double)(candidates[i].logit - candidates[0].logit));
    return (double)candidates[0].logit + log(total);
}

static int draw_top_k(const float *logits, int count, const Draw *draw) {
    float least = threshold(logits, count, draw->top_k, scratch.greatest);
    Candidate *candidates = scratch.candidates;
    int found = gather(logits, count, least, draw->temperature, candidates);
    if (!found) return 0;
    /* Equal logits at the border all stay. */
    int kept = draw->top_k < found ? draw->top_k : found;
    while (kept < found && candidates[kept].logit == candidates[kept - 1].logit) kept++;
    return draw_sorted(candidates, kept, log_sum(candidates, kept), draw);
}

static int draw_nucleus(const float *logits, int count, const Draw *draw) {
    Candidate *candidates = scratch.candidates;
    double total = log_total(logits, count, draw->temperature);
    for (size_t i = 0; i < sizeof NUCLEI / sizeof *NUCLEI && NUCLEI[i] < count && draw->typical_p >= 1; i++) {
        float least = threshold(logits, count, NUCLEI[i], scratch.greatest);
        int found = gather(logits, count, least, draw->temperature, candidates);
        if (found && exp(log_sum(candidates, found) - total) >= (double)draw->top_p)
            return draw_sorted(candidates, found, total, draw);
    }
    int found = gather(logits, count, -INFINITY, draw->temperature, candidates);
    return found ? draw_sorted(candidates, found, total, draw) : 0;
}

static int draw_row(const float *logits, int count, const Draw *draw) {
    if (draw->temperature <= 0) return argmax(logits, count);
    int limited = draw->top_k > 0 && draw->top_k < count;
    if (!limited && draw->top_p >= 1 && draw->typical_p >= 1) return draw_whole(logits, count, draw);
    if (!have_scratch(count)) return -1;
    return limited ? draw_top_k(logits, count, draw) : draw_nucleus(logits, count, draw);
}

static void draw_item(void *argument, int item) {
    const Sampling *s = argument;
    s->tokens[item] = draw_row(s->logits + s->stride * item, s->vocabulary, &s->draws[item]);
}

/* Choose a token for each row of `logits` (`[rows, stride]`); write -1 where memory runs out. */
void tr_sample(Threads *threads, const float *logits, int64_t stride, int rows, int vocabulary, const Draw *draws,
               int32_t *tokens) {
    Sampling sampling = {logits, stride, vocabulary, draws, tokens};
    if (rows > 1) threads_wake(threads);
    threads_each(threads, draw_item, &sampling, rows);
    if (rows > 1) threads_rest(threads);
}
