/* One pass of a Llama-like decoder over a flat batch (Touvron et al. 2023): norm, attention, norm, gated MLP, layer by
 * layer, then the logits of the rows that are wanted.
 *
 * The residual stream is float32. Everything that is per token is done row by row; only attention joins tokens.
 */
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "tailrace.h"

/* Rows of one item of per-row work; so few rows are not worth sharing out. */
#define ROWS_PER_ITEM 4
/* Items of a product for each thread: enough that a slow thread leaves work to the others. */
#define ITEMS_PER_THREAD 8

typedef struct {
    const Span *span;
    int first_token;
    int tokens;
} TokenTile;

/* The highest of a stretch of logits that begins at token `first`. */
typedef struct {
    float value;
    int32_t first;
    float poison; /* 0, or NaN when a logit is not finite */
} Peak;

/* What a step spends its time on; the order is that of `PHASES` in step.py. */
enum Phase { LAYOUT, OPERANDS, QKV, ROTARY, ATTENTION, OUTPUT, GATE_UP, DOWN, HEAD, PHASES };

typedef struct {
    const Model *model;
    Threads *threads;
    int64_t nanoseconds[PHASES]; /* since the stack was made */
    int64_t last_mark;
    int capacity; /* rows that the buffers hold */
    float *hidden, *normed, *qkv, *attended, *gated;
    float *angles; /* [rows, head_dim]: cosines, then sines */
    int32_t *blocks, *slots;
    /* the operand of the current product */
    uint16_t *bf16;
    int8_t *codes;
    float *scales, *sums;
    float *lows;
    TokenTile *tiles;
    int tile_count;
    Peak *peaks;
    size_t peak_capacity;
    const Batch *batch;
} Stack;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Put the time since the last mark down to `phase`. */
static void mark(Stack *stack, enum Phase phase) {
    int64_t time = now();
    stack->nanoseconds[phase] += time - stack->last_mark;
    stack->last_mark = time;
}

/* Write the seconds spent on each phase so far. */
void tr_phases(const Stack *stack, double *seconds) {
    for (int phase = 0; phase < PHASES; phase++) seconds[phase] = (double)stack->nanoseconds[phase] * 1e-9;
}

static int padded(int outputs) { return (outputs + PAIR - 1) / PAIR * PAIR; }

static int widest(const Model *model) {
    int width = model->hidden;
    if (model->intermediate > width) width = model->intermediate;
    if (model->heads * model->head_dim > width) width = model->heads * model->head_dim;
    return width;
}

Stack *tr_stack_new(const Model *model, Threads *threads) {
    Stack *stack = calloc(1, sizeof(Stack));
    if (!stack) return NULL;
    stack->model = model;
    stack->threads = threads;
    return stack;
}

static void release_buffers(Stack *stack) {
    void *buffers[] = {stack->hidden, stack->normed, stack->qkv,  stack->attended, stack->gated, stack->angles, stack->blocks,
                       stack->slots,  stack->bf16,   stack->codes, stack->scales,  stack->sums,  stack->lows,  stack->tiles};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    stack->hidden = stack->normed = stack->qkv = stack->attended = stack->gated = stack->angles = NULL;
    stack->blocks = stack->slots = NULL;
    stack->bf16 = NULL;
    stack->codes = NULL;
    stack->scales = stack->sums = stack->lows = NULL;
    stack->tiles = NULL;
    stack->capacity = 0;
}

void tr_stack_free(Stack *stack) {
    release_buffers(stack);
    free(stack->peaks);
    free(stack);
}

/* Zeros for `rows` rows of `width` elements and a vector more, on a border of 64 bytes. */
static void *rows_of(int rows, int width, size_t size) {
    size_t bytes = ((size_t)rows * width * size + 127) / 64 * 64;
    void *memory = aligned_alloc(64, bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

static int make_room(Stack *stack, int rows) {
    if (rows <= stack->capacity) return 1;
    const Model *m = stack->model;
    rows = (rows + 63) / 64 * 64;
    int wide = widest(m);
    release_buffers(stack);
    stack->hidden = rows_of(rows, padded(m->hidden), 4);
    stack->normed = rows_of(rows, m->hidden, 4);
    stack->qkv = rows_of(rows, padded((m->heads + 2 * m->kv_heads) * m->head_dim), 4);
    stack->attended = rows_of(rows, m->heads * m->head_dim, 4);
    stack->gated = rows_of(rows, m->intermediate, 4);
    stack->angles = rows_of(rows, m->head_dim, 4);
    stack->blocks = rows_of(rows, 1, 4);
    stack->slots = rows_of(rows, 1, 4);
    stack->bf16 = rows_of(rows, wide, 2);
    stack->codes = rows_of(rows, wide, 1);
    stack->scales = rows_of(rows, wide / GROUP + 1, 4);
    stack->sums = rows_of(rows, wide / GROUP + 1, 4);
    stack->lows = rows_of(rows, m->widest_rank, 4);
    stack->tiles = rows_of(rows, 1, sizeof(TokenTile));
    if (!stack->hidden || !stack->normed || !stack->qkv || !stack->attended || !stack->gated || !stack->angles ||
        !stack->blocks || !stack->slots || !stack->bf16 || !stack->codes || !stack->scales || !stack->sums ||
        !stack->lows || !stack->tiles) {
        release_buffers(stack);
        return 0;
    }
    stack->capacity = rows;
    return 1;
}

/* --- work that is per row ----------------------------------------------------------------------------------------- */

typedef struct RowWork RowWork;
struct RowWork {
    Stack *stack;
    void (*row)(const RowWork *work, int row);
    int rows;
    const Matrix *matrix; /* whose operand is made */
    const int32_t *adapters;
    const float *source;
    int stride;
    const float *norm; /* weights of a norm, or NULL */
    const Layer *layer;
};

static void row_item(void *argument, int item) {
    const RowWork *work = argument;
    int end = (item + 1) * ROWS_PER_ITEM < work->rows ? (item + 1) * ROWS_PER_ITEM : work->rows;
    for (int row = item * ROWS_PER_ITEM; row < end; row++) work->row(work, row);
}

static void each_row(const RowWork *work) {
    threads_each(work->stack->threads, row_item, (void *)work, (work->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
}

/* Root mean square norm (Zhang and Sennrich 2019) of `count` numbers. */
static void rms_norm(const float *x, const float *weight, int count, float epsilon, float *out) {
    f32x16 squares = splat16(0);
    float rest = 0;
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        f32x16 v = load16(x + i);
        squares += v * v;
    }
    for (int j = i; j < count; j++) rest += x[j] * x[j];
    float factor = 1.0f / sqrtf((sum_lanes(squares) + rest) / (float)count + epsilon);
    for (i = 0; i + LANES <= count; i += LANES) store16(out + i, load16(x + i) * splat16(factor) * load16(weight + i));
    for (; i < count; i++) out[i] = x[i] * factor * weight[i];
}

static int needs_rounding(int format) { return format == FORMAT_BF16 ? rounds_to_bf16() : format != FORMAT_F32; }

/* Multiply a row with its adapter's `down` matrix. */
static void low_rank(const Lora *lora, const float *x, int inputs, float *low) {
    for (int j = 0; j < lora->rank; j++) {
        const float *down = lora->down + (size_t)j * inputs;
        f32x16 lanes = splat16(0);
        float rest = 0;
        int k = 0;
        for (; k + LANES <= inputs; k += LANES) lanes += load16(down + k) * load16(x + k);
        for (; k < inputs; k++) rest += down[k] * x[k];
        low[j] = sum_lanes(lanes) + rest;
    }
}

/* Make a row the operand of the next product, normed first when asked. */
static void operand_work(const RowWork *work, int row) {
    Stack *s = work->stack;
    int format = work->matrix->format, inputs = work->matrix->inputs;
    const float *x = work->source + (size_t)row * work->stride;
    size_t at = (size_t)row * inputs, group = (size_t)row * (inputs / GROUP);
    if (work->norm) {
        rms_norm(x, work->norm, inputs, s->model->norm_epsilon, s->normed + at);
        x = s->normed + at;
    }
    if (work->adapters && work->adapters[row] >= 0)
        low_rank(&work->matrix->loras[work->adapters[row]], x, inputs, s->lows + (size_t)row * s->model->widest_rank);
    if (needs_rounding(format))
        operand_row(format, x, inputs, s->bf16 + at, s->codes + at, s->scales + group, s->sums + group);
}

static Operand operand(Stack *s, const Matrix *matrix, int rows, const float *source, int stride, const float *norm) {
    const int32_t *adapters = matrix->loras ? s->batch->adapters : NULL;
    RowWork work = {s, operand_work, rows, matrix, adapters, source, stride, norm, NULL};
    /* Rows that need nothing are taken as they are. */
    if (norm || adapters || needs_rounding(matrix->format)) each_row(&work);
    return (Operand){matrix->inputs, norm ? s->normed : source, s->bf16, s->codes,           s->scales,
                     s->sums,        adapters,                  s->lows, s->model->widest_rank};
}

static void rotate(float *head, int dim, const float *angles) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half], c = angles[i], s = angles[half + i];
        head[i] = a * c - b * s;
        head[i + half] = b * c + a * s;
    }
}

/* Rotate a row's queries and keys (Su et al. 2021), scale the queries, and put keys and values into the cache. */
static void rotary_work(const RowWork *work, int row) {
    Stack *s = work->stack;
    const Model *m = s->model;
    const Layer *layer = work->layer;
    int dim = m->head_dim;
    float *query = s->qkv + (size_t)row * work->stride;
    float *key = query + m->heads * dim, *value = key + m->kv_heads * dim;
    const float *angles = s->angles + (size_t)row * dim;
    for (int h = 0; h < m->heads; h++, query += dim) {
        if (layer->query_norm) rms_norm(query, layer->query_norm, dim, m->norm_epsilon, query);
        rotate(query, dim, angles);
        for (int i = 0; i < dim; i++) query[i] *= m->attention_scale;
    }
    for (int h = 0; h < m->kv_heads; h++) {
        if (layer->key_norm) rms_norm(key + h * dim, layer->key_norm, dim, m->norm_epsilon, key + h * dim);
        rotate(key + h * dim, dim, angles);
    }
    cache_write(m, layer, key, value, s->blocks[row], s->slots[row]);
}

static void embed_work(const RowWork *work, int row) {
    Stack *s = work->stack;
    matrix_row(&s->model->embedding, s->batch->ids[row], s->hidden + (size_t)row * work->stride);
}

/* --- products ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const Matrix *matrix;
    const Operand *x;
    int rows;
    Finish finish;
    float *out;
    int stride;
    int pairs;
    int pairs_per_item;
    Peak *peaks; /* of the logits: [items, rows] */
} Product;

static void peak_of(const float *line, int first, int last, Peak *peak) {
    f32x16 best = splat16(-INFINITY), poison = splat16(0);
    int n = first;
    for (; n + LANES <= last; n += LANES) {
        f32x16 v = load16(line + n);
        best = max16(v, best);
        poison += v * splat16(0.0f);
    }
    float value = max_lanes(best), bad = sum_lanes(poison);
    for (int i = n; i < last; i++) {
        value = line[i] > value ? line[i] : value;
        bad += line[i] * 0.0f;
    }
    *peak = (Peak){value, first, bad};
}

static void product_item(void *argument, int item) {
    const Product *p = argument;
    int first = item * p->pairs_per_item;
    int last = first + p->pairs_per_item < p->pairs ? first + p->pairs_per_item : p->pairs;
    linear_pairs(p->matrix, p->x, p->rows, first, last, p->finish, p->out, p->stride);
    if (!p->peaks) return;
    int end = last * PAIR < p->matrix->outputs ? last * PAIR : p->matrix->outputs;
    for (int row = 0; row < p->rows; row++)
        peak_of(p->out + (size_t)row * p->stride, first * PAIR, end, &p->peaks[(size_t)item * p->rows + row]);
}

static int items_of(const Stack *s, int pairs, int *pairs_per_item) {
    int items = threads_count(s->threads) * ITEMS_PER_THREAD;
    *pairs_per_item = pairs > items ? (pairs + items - 1) / items : 1;
    return (pairs + *pairs_per_item - 1) / *pairs_per_item;
}

static void product(Stack *s, const Matrix *matrix, const Operand *x, int rows, Finish finish, float *out, int stride) {
    Product p = {matrix, x, rows, finish, out, stride, padded(matrix->outputs) / PAIR, 1, NULL};
    int items = items_of(s, p.pairs, &p.pairs_per_item);
    threads_each(s->threads, product_item, &p, items);
}

/* The logits of the wanted rows, and the likeliest token of each. */
static int logits(Stack *s, const Operand *x) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    int rows = b->wanted_count;
    Product p = {&m->head, x, rows, STORE, b->logits, padded(m->head.outputs), padded(m->head.outputs) / PAIR, 1, NULL};
    int items = items_of(s, p.pairs, &p.pairs_per_item);
    size_t needed = (size_t)items * rows;
    if (needed > s->peak_capacity) {
        free(s->peaks);
        s->peaks = malloc(needed * sizeof(Peak));
        s->peak_capacity = s->peaks ? needed : 0;
        if (!s->peaks) return 0;
    }
    p.peaks = s->peaks;
    threads_each(s->threads, product_item, &p, items);
    for (int row = 0; row < rows; row++) {
        Peak best = s->peaks[row];
        float poison = best.poison;
        for (int item = 1; item < items; item++) {
            Peak *peak = &s->peaks[(size_t)item * rows + row];
            if (peak->value > best.value) best = *peak;
            poison += peak->poison;
        }
        int token = -1;
        if (poison == 0.0f)
            for (token = best.first; b->logits[(size_t)row * p.stride + token] != best.value;) token++;
        b->best[row] = token;
    }
    return 1;
}

/* --- attention ---------------------------------------------------------------------------------------------------- */

typedef struct {
    Stack *stack;
    Attention attention;
} AttentionWork;

static void attention_work(void *argument, int item) {
    const AttentionWork *work = argument;
    int kv_heads = work->stack->model->kv_heads;
    const TokenTile *tile = &work->stack->tiles[item / kv_heads];
    attention_item(&work->attention, tile->span, tile->first_token, tile->tokens, item % kv_heads);
}

/* Note where each row's key goes, its rotary angles, and how attention is shared out. */
static void lay_out(Stack *s) {
    const Model *m = s->model;
    const Batch *b = s->batch;
    int half = m->head_dim / 2;
    s->tile_count = 0;
    /* Slices of prompts, the last spans, come first: begun last, a large item would leave the other threads idle. */
    for (int n = b->span_count - 1; n >= 0; n--) {
        const Span *span = &b->spans[n];
        for (int i = 0; i < span->count; i++) {
            int row = span->start + i, position = span->context + i;
            s->blocks[row] = span->blocks[position / BLOCK];
            s->slots[row] = position % BLOCK;
            float *angles = s->angles + (size_t)row * m->head_dim;
            for (int d = 0; d < half; d++) {
                float angle = (float)position * m->inverse_frequencies[d];
                angles[d] = cosf(angle) * m->rope_scale;
                angles[half + d] = sinf(angle) * m->rope_scale;
            }
        }
        int per_tile = attention_tile(m, span->count);
        for (int first = 0; first < span->count; first += per_tile) {
            int tokens = span->count - first < per_tile ? span->count - first : per_tile;
            s->tiles[s->tile_count++] = (TokenTile){span, first, tokens};
        }
    }
}

/* --- the step ----------------------------------------------------------------------------------------------------- */

static void layer_step(Stack *s, const Layer *layer) {
    const Model *m = s->model;
    int rows = s->batch->tokens, hidden_stride = padded(m->hidden);
    int qkv_stride = padded(layer->qkv.outputs);

    Operand x = operand(s, &layer->qkv, rows, s->hidden, hidden_stride, layer->attention_norm);
    mark(s, OPERANDS);
    product(s, &layer->qkv, &x, rows, STORE, s->qkv, qkv_stride);
    mark(s, QKV);
    RowWork rotary = {s, rotary_work, rows, NULL, NULL, NULL, qkv_stride, NULL, layer};
    each_row(&rotary);
    mark(s, ROTARY);
    AttentionWork work = {s, {m, layer, s->qkv, qkv_stride, s->attended}};
    threads_each(s->threads, attention_work, &work, s->tile_count * m->kv_heads);
    mark(s, ATTENTION);
    x = operand(s, &layer->output, rows, s->attended, m->heads * m->head_dim, NULL);
    mark(s, OPERANDS);
    product(s, &layer->output, &x, rows, ADD, s->hidden, hidden_stride);
    mark(s, OUTPUT);

    x = operand(s, &layer->gate_up, rows, s->hidden, hidden_stride, layer->mlp_norm);
    mark(s, OPERANDS);
    product(s, &layer->gate_up, &x, rows, GATE, s->gated, m->intermediate);
    mark(s, GATE_UP);
    x = operand(s, &layer->down, rows, s->gated, m->intermediate, NULL);
    mark(s, OPERANDS);
    product(s, &layer->down, &x, rows, ADD, s->hidden, hidden_stride);
    mark(s, DOWN);
}

/* Compute a batch; its keys and values are in the cache afterwards. Return 0, or -1 when memory runs out. */
int tr_step(Stack *s, const Batch *batch) {
    const Model *m = s->model;
    int hidden_stride = padded(m->hidden);
    int most = batch->tokens > batch->wanted_count ? batch->tokens : batch->wanted_count;
    if (!make_room(s, most)) return -1;
    s->batch = batch;
    s->last_mark = now();
    threads_wake(s->threads);
    lay_out(s);
    RowWork embed = {s, embed_work, batch->tokens, NULL, NULL, NULL, hidden_stride, NULL, NULL};
    each_row(&embed);
    mark(s, LAYOUT);
    for (int n = 0; n < m->layer_count; n++) layer_step(s, &m->layers[n]);

    if (batch->hidden)
        for (int row = 0; row < batch->tokens; row++)
            rms_norm(s->hidden + (size_t)row * hidden_stride, m->final_norm, m->hidden, m->norm_epsilon,
                     batch->hidden + (size_t)row * m->hidden);
    int done = 1;
    if (batch->wanted_count) {
        /* The wanted rows move to the front; they come in rising order, so none is overwritten before its turn. */
        for (int n = 0; n < batch->wanted_count; n++)
            if (batch->wanted[n] != n)
                memcpy(s->hidden + (size_t)n * hidden_stride, s->hidden + (size_t)batch->wanted[n] * hidden_stride,
                       (size_t)m->hidden * 4);
        Operand x = operand(s, &m->head, batch->wanted_count, s->hidden, hidden_stride, m->final_norm);
        done = logits(s, &x);
        mark(s, HEAD);
    }
    threads_rest(s->threads);
    return done ? 0 : -1;
}
