#include "tests/support/call.h"

#include "src/philox.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct shape check_shapes[] = {
#define CHECK(...) {__VA_ARGS__},
#include "tests/shapes.inc"
#undef CHECK
};
const int check_shape_count = sizeof check_shapes / sizeof check_shapes[0];

const struct features feature_sets[] = {
#define FEATURES(name_, ...) {.name = name_, __VA_ARGS__},
#include "tests/support/features.inc"
#undef FEATURES
};
const int feature_set_count = sizeof feature_sets / sizeof feature_sets[0];

const struct features *features_named(const char *name) {
    for (int i = 0; i < feature_set_count; i++) {
        if (strcmp(feature_sets[i].name, name) == 0)
            return &feature_sets[i];
    }
    fprintf(stderr, "no feature set %s\n", name);
    abort();
}

const char *slot_name(enum slot slot) {
    static const char *const names[SLOTS] = {
        "query",        "key",           "value",          "output",
        "lse",          "bias",          "mask",           "alibi_slopes",
        "sinks",        "query_lengths", "key_lengths",    "cu_seqlens_q",
        "cu_seqlens_k", "block_table",   "query_segments", "key_segments",
        "block_mask",   "query_scale",   "key_scale",      "value_scale",
        "d_output",     "d_lse",         "d_query",        "d_key",
        "d_value",      "d_bias",        "d_alibi_slopes", "d_sinks",
    };
    return names[slot];
}

/* The tensor that a gradient belongs to; any other is its own. */
static enum slot slot_of(enum slot slot) {
    static const enum slot of[SLOTS - TENSOR_SLOTS] = {OUTPUT, LSE,  QUERY,        KEY,
                                                       VALUE,  BIAS, ALIBI_SLOPES, SINKS};
    return slot < TENSOR_SLOTS ? slot : of[slot - TENSOR_SLOTS];
}

bool call_writes(const struct call *c, enum slot slot) {
    return c->made_from.features.backward ? slot >= D_QUERY : slot == OUTPUT || slot == LSE;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Chance ----------------------------------------------------------------------------------------------- */

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). */
uint64_t random_bits(uint64_t seed, uint64_t n) {
    uint64_t x = seed * UINT64_C(0x9e3779b97f4a7c15) + n * UINT64_C(0xd1342543de82ef95) + 1;
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

int64_t random_below(uint64_t seed, uint64_t n, int64_t below) {
    return below > 0 ? (int64_t)(random_bits(seed, n) % (uint64_t)below) : 0;
}

/* The sum of four uniform numbers, scaled to variance 1: near enough to normal, and cheap. */
double random_normal(uint64_t seed, uint64_t n) {
    const uint64_t bits = random_bits(seed, n);
    double sum = -2;
    for (int i = 0; i < 4; i++)
        sum += (double)(bits >> 16 * i & 0xffff) / 65536;
    return sum * 1.7320508075688772;
}

/* Seeds of what is drawn for a case, apart from the elements of slot s, which use seed + s. */
enum {
    DRAW_ROWS = 100,
    DRAW_KEYS,
    DRAW_Q_LENGTHS,
    DRAW_K_LENGTHS,
    DRAW_PAGES,
    DRAW_POISON,
    DRAW_NAN,
    DRAW_MAX,
    DRAW_DROPOUT,
    DRAW_GRADIENTS,
    DRAW_GRADIENT_TYPES,
    DRAW_ORDER
};

static uint64_t draw(const struct call *c, uint64_t what) {
    return c->made_from.seed * 1009 + what;
}

/* ---- Lengths ---------------------------------------------------------------------------------------------- */

/* From 0 to `most`; one entry of the batch has all. */
static int64_t draw_length(const struct call *c, uint64_t what, int64_t b, int64_t most) {
    const int64_t full = random_below(draw(c, what), 1000, c->made_from.shape.batch);
    return b == full ? most : random_below(draw(c, what), (uint64_t)b, most + 1);
}

static void set_spans(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    const struct features *f = &c->made_from.features;
    int64_t q_start = 0, k_start = 0;
    assert(s->batch <= MAX_BATCH);
    for (int64_t b = 0; b < s->batch; b++) {
        struct span *own = &c->span[b];
        own->q_start = q_start;
        own->k_start = k_start;
        own->q_len = own->q_rows = f->varlen_q ? draw_length(c, DRAW_ROWS, b, s->len_q) : s->len_q;
        own->k_len = own->k_rows = f->varlen_k ? draw_length(c, DRAW_KEYS, b, s->len_k) : s->len_k;
        if (f->query_lengths)
            own->q_len = least(own->q_rows, draw_length(c, DRAW_Q_LENGTHS, b, s->len_q));
        if (f->key_lengths || f->page_size)
            own->k_len = least(own->k_rows, draw_length(c, DRAW_K_LENGTHS, b, s->len_k));
        own->diagonal = f->diagonal_offset + (f->bottom_right ? own->k_len - own->q_len : 0);
        q_start += f->varlen_q ? own->q_rows : 0;
        k_start += f->varlen_k ? own->k_rows : 0;
    }
    c->extent_q = s->len_q;
    c->extent_k =
        f->page_size ? (s->len_k + f->page_size - 1) / f->page_size * f->page_size : s->len_k;
    /* Without a stated maximum any sequence may be as long as all of them together. */
    if (f->varlen_q && random_below(draw(c, DRAW_MAX), 0, 2))
        c->extent_q = q_start;
    else if (f->varlen_q)
        c->desc.max_seqlen_q = s->len_q;
    if (f->varlen_k && random_below(draw(c, DRAW_MAX), 1, 2))
        c->extent_k = k_start;
    else if (f->varlen_k)
        c->desc.max_seqlen_k = s->len_k;
}

/* ---- Tensors ---------------------------------------------------------------------------------------------- */

static enum layout layout_of(const struct call *c, enum slot slot) {
    static const enum layout mixed[SLOTS] = {
        [QUERY] = HEADS_INNER, [KEY] = SLICED,      [VALUE] = ODD,  [OUTPUT] = HEADS_INNER,
        [LSE] = ODD,           [BIAS] = INNER_2,    [MASK] = ODD,   [SINKS] = ODD,
        [KEY_LENGTHS] = ODD,   [D_OUTPUT] = SLICED, [D_LSE] = ODD,  [D_QUERY] = ODD,
        [D_KEY] = HEADS_INNER, [D_VALUE] = INNER_2, [D_BIAS] = ODD,
    };
    const enum layout all = c->made_from.features.layout;
    return all == MIXED ? mixed[slot] : all;
}

static void make(struct call *c, enum slot slot, enum element e, int ndim, const int64_t *shape,
                 unsigned broadcast) {
    tensor_make(&c->tensor[slot], e, ndim, shape, layout_of(c, slot), broadcast,
                call_writes(c, slot) ? OUTPUT_FILL : GAP_FILL);
    c->has[slot] = true;
}

/* Of ALIBI_SLOPES and SINKS there is no other than f32. */
static enum element element_of(const struct features *f, enum slot slot, enum element e) {
    const bool may_differ = slot == LSE || slot == BIAS || slot == ALIBI_SLOPES || slot == SINKS,
               has_element =
                   (slot == LSE && f->lse == LSE_ELEMENT) || (slot == BIAS && f->bias_element);
    return may_differ && !has_element ? F32 : e;
}

/* Value in the memory of key, with its strides. */
static void make_view(struct call *c, int64_t dim_v) {
    struct tensor *const value = &c->tensor[VALUE];
    *value = c->tensor[KEY];
    value->shape[value->dl.ndim - 1] = dim_v;
    value->dl.shape = value->shape;
    value->dl.strides = value->stride;
    c->has[VALUE] = true;
}

bool call_has_view(const struct call *c) {
    return c->has[VALUE] && c->tensor[VALUE].image == c->tensor[KEY].image;
}

static void make_main(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    const struct features *f = &c->made_from.features;
    const enum element e = c->made_from.element, of_query = f->query ? f->query : e,
                       of_key = f->key ? f->key : e, of_value = f->value ? f->value : e;
    const int64_t total_q =
        s->batch ? c->span[s->batch - 1].q_start + c->span[s->batch - 1].q_rows : 0;
    const int64_t total_k =
        s->batch ? c->span[s->batch - 1].k_start + c->span[s->batch - 1].k_rows : 0;
    const int64_t pages = f->page_size ? s->batch * (c->extent_k / f->page_size) + 2 : 0;
    const unsigned heads = f->broadcast_heads ? 2 : 0; /* axis 1 in every form */
    const bool view = f->view && of_key == of_value && s->dim_v <= s->dim_qk;

    if (f->varlen_q) {
        make(c, QUERY, of_query, 3, (int64_t[]){total_q, s->heads_q, s->dim_qk}, 0);
        make(c, OUTPUT, e, 3, (int64_t[]){total_q, s->heads_q, s->dim_v}, 0);
    } else {
        make(c, QUERY, of_query, 4, (int64_t[]){s->batch, s->heads_q, s->len_q, s->dim_qk}, 0);
        make(c, OUTPUT, e, 4, (int64_t[]){s->batch, s->heads_q, s->len_q, s->dim_v}, 0);
    }
    if (f->varlen_k) {
        make(c, KEY, of_key, 3, (int64_t[]){total_k, s->heads_kv, s->dim_qk}, heads);
        if (view)
            make_view(c, s->dim_v);
        else
            make(c, VALUE, of_value, 3, (int64_t[]){total_k, s->heads_kv, s->dim_v}, heads);
    } else {
        const int64_t outer = f->page_size ? pages : s->batch,
                      length = f->page_size ? f->page_size : s->len_k;
        make(c, KEY, of_key, 4, (int64_t[]){outer, s->heads_kv, length, s->dim_qk}, heads);
        if (view)
            make_view(c, s->dim_v);
        else
            make(c, VALUE, of_value, 4, (int64_t[]){outer, s->heads_kv, length, s->dim_v}, heads);
    }
    if (f->lse || f->backward) {
        const enum element le = element_of(f, LSE, e);
        if (f->varlen_q)
            make(c, LSE, le, 2, (int64_t[]){s->heads_q, total_q}, 0);
        else
            make(c, LSE, le, 3, (int64_t[]){s->batch, s->heads_q, s->len_q}, 0);
    }
}

static void make_broadcast(struct call *c, enum slot slot, enum element e, unsigned axes) {
    const int64_t full[4] = {c->made_from.shape.batch, c->made_from.shape.heads_q, c->extent_q,
                             c->extent_k};
    int64_t shape[4];
    unsigned broadcast = 0;
    for (int axis = 0; axis < 4; axis++) {
        const bool spans = axes >> axis & 1, expanded = c->made_from.features.expanded;
        shape[axis] = spans || expanded ? full[axis] : 1;
        broadcast |= !spans && expanded ? 1u << axis : 0;
    }
    make(c, slot, e, 4, shape, broadcast);
}

static int64_t blocks(int64_t extent, int64_t size) { return (extent + size - 1) / size; }

static void make_scale(struct call *c, enum slot slot, int64_t entries, int64_t heads) {
    const int kind = c->made_from.features.scales;
    make(c, slot, F32, kind == 1 ? 1 : 2, (int64_t[]){kind == 2 ? entries : 1, heads}, 0);
}

static void make_later(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    const struct features *f = &c->made_from.features;
    if (f->segments) {
        const bool packed_q = f->varlen_q, packed_k = f->varlen_k;
        make(c, QUERY_SEGMENTS, I32, packed_q ? 1 : 2,
             packed_q ? c->tensor[QUERY].shape : (int64_t[]){s->batch, s->len_q}, 0);
        make(c, KEY_SEGMENTS, I32, packed_k ? 1 : 2,
             packed_k ? c->tensor[KEY].shape : (int64_t[]){s->batch, c->extent_k}, 0);
    }
    if (f->block_q)
        make(c, BLOCK_MASK, U8, 4,
             (int64_t[]){s->batch, s->heads_q, blocks(c->extent_q, f->block_q),
                         blocks(c->extent_k, f->block_k)},
             0);
    if (f->scales) {
        const int64_t entries = f->page_size ? c->tensor[KEY].shape[0] : s->batch;
        make_scale(c, QUERY_SCALE, s->batch, s->heads_q);
        make_scale(c, KEY_SCALE, entries, s->heads_kv);
        make_scale(c, VALUE_SCALE, entries, s->heads_kv);
    }
}

static void make_rest(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    const struct features *f = &c->made_from.features;
    const int64_t batch[] = {s->batch}, heads[] = {s->heads_q}, both[] = {s->batch, s->heads_q},
                  ends[] = {s->batch + 1};
    if (f->bias)
        make_broadcast(c, BIAS, element_of(f, BIAS, c->made_from.element), f->bias);
    if (f->mask)
        make_broadcast(c, MASK, U8, f->mask);
    if (f->alibi)
        make(c, ALIBI_SLOPES, F32, f->alibi, f->alibi == 2 ? both : heads, 0);
    if (f->sinks)
        make(c, SINKS, F32, 1, heads, 0);
    if (f->query_lengths)
        make(c, QUERY_LENGTHS, I32, 1, batch, 0);
    if (f->key_lengths || f->page_size)
        make(c, KEY_LENGTHS, I32, 1, batch, 0);
    if (f->varlen_q)
        make(c, CU_SEQLENS_Q, I32, 1, ends, 0);
    if (f->varlen_k)
        make(c, CU_SEQLENS_K, I32, 1, ends, 0);
    if (f->page_size)
        make(c, BLOCK_TABLE, I32, 2, (int64_t[]){s->batch, c->extent_k / f->page_size}, 0);
}

enum element call_gradient_element(const struct call *c, enum slot slot) {
    return random_below(draw(c, DRAW_GRADIENT_TYPES), slot, 2)
               ? F32
               : element_of(&c->made_from.features, slot_of(slot), c->made_from.element);
}

/* Those that are inputs, and most of those that are not. */
static bool wants(const struct call *c, enum slot slot) {
    const bool all = random_below(draw(c, DRAW_GRADIENTS), 0, 2),
               alone = random_below(draw(c, DRAW_GRADIENTS), 1, 8) == 0;
    if (!c->has[slot_of(slot)])
        return false;
    if (slot == D_OUTPUT || all)
        return true;
    if (alone)
        return slot == D_QUERY + random_below(draw(c, DRAW_GRADIENTS), 2, 3);
    return slot == D_VALUE || random_below(draw(c, DRAW_GRADIENTS), slot, 4);
}

/* A gradient has each element by itself, also where its tensor has stride 0. */
static void make_gradients(struct call *c) {
    const unsigned heads = c->made_from.features.broadcast_heads ? 2 : 0;
    for (enum slot slot = D_OUTPUT; slot < SLOTS; slot++) {
        const struct tensor *of = &c->tensor[slot_of(slot)];
        if (wants(c, slot))
            make(c, slot, call_gradient_element(c, slot), of->dl.ndim, of->shape,
                 slot == D_OUTPUT ? heads : 0);
    }
}

/* ---- Values ----------------------------------------------------------------------------------------------- */

static double mask_value(const struct call *c, uint64_t n, const int64_t index[4]) {
    if (c->made_from.features.mask_rows &&
        random_below(draw(c, MASK), 1000000 + (uint64_t)index[2], 3) == 0)
        return 0;
    return random_below(draw(c, MASK), n, 4) != 0 ? (double)(1 + n % 255) : 0;
}

static double value_of(const struct call *c, enum slot slot, uint64_t n, const int64_t index[4]) {
    const struct features *f = &c->made_from.features;
    const double x = random_normal(draw(c, slot), n);
    switch (slot) {
    case QUERY:
        return f->logits != 0 ? x * f->logits : x;
    case BIAS: /* a hole in one that spans no keys takes all of them from a row */
        return f->bias_holes && n % 7 == 3 ? -INFINITY : x;
    case MASK:
        return mask_value(c, n, index);
    case ALIBI_SLOPES:
        return ldexp(1, -(int)(1 + n % 8));
    case QUERY_SEGMENTS:
    case KEY_SEGMENTS:
        if (f->segment_rows)
            return floor((double)index[c->tensor[slot].dl.ndim - 1] / (double)f->segment_rows);
        return (double)random_below(draw(c, slot), n / 5, 3) - 1;
    case BLOCK_MASK:
        return (double)random_below(draw(c, slot), n, 3);
    case QUERY_SCALE:
    case KEY_SCALE:
    case VALUE_SCALE:
        return 0.25 + (double)random_below(draw(c, slot), n, 1000) / 1000;
    default:
        return x;
    }
}

/* All but results, lengths and the block table. */
static void fill_values(struct call *c) {
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &c->tensor[slot];
        if (!c->has[slot] || slot == OUTPUT || slot == LSE || call_writes(c, (enum slot)slot) ||
            (slot >= QUERY_LENGTHS && slot <= BLOCK_TABLE))
            continue;
        int64_t index[4] = {0};
        for (int64_t n = 0, count = tensor_count(t); n < count; n++, tensor_next(t, index))
            tensor_set(t, index, value_of(c, (enum slot)slot, (uint64_t)n, index));
    }
}

static void set_integer(struct call *c, enum slot slot, int64_t i, int64_t j, int64_t value) {
    if (c->has[slot])
        tensor_set(&c->tensor[slot], (int64_t[4]){i, j}, (double)value);
}

static int64_t common_divisor(int64_t a, int64_t b) {
    return b == 0 ? a : common_divisor(b, a % b);
}

static void fill_lengths(struct call *c) {
    const struct features *f = &c->made_from.features;
    const int64_t batch = c->made_from.shape.batch;
    set_integer(c, CU_SEQLENS_Q, 0, 0, 0);
    set_integer(c, CU_SEQLENS_K, 0, 0, 0);
    for (int64_t b = 0; b < batch; b++) {
        const struct span *s = &c->span[b];
        /* Lengths may exceed what a packed sequence owns; the lesser of the two counts. */
        set_integer(c, QUERY_LENGTHS, b, 0,
                    s->q_len == s->q_rows ? c->made_from.shape.len_q : s->q_len);
        set_integer(c, KEY_LENGTHS, b, 0,
                    f->varlen_k && s->k_len == s->k_rows ? c->made_from.shape.len_k : s->k_len);
        set_integer(c, CU_SEQLENS_Q, b + 1, 0, s->q_start + s->q_rows);
        set_integer(c, CU_SEQLENS_K, b + 1, 0, s->k_start + s->k_rows);
    }
    if (!f->page_size)
        return;
    /* A page per entry in shuffled order; entries past the length point nowhere. */
    const int64_t columns = c->extent_k / f->page_size, pages = c->tensor[KEY].shape[0];
    const int64_t first = random_below(draw(c, DRAW_PAGES), 0, pages);
    int64_t step = 1 + random_below(draw(c, DRAW_PAGES), 1, pages);
    while (common_divisor(step, pages) != 1) /* so that the walk below visits each page once */
        step--;
    for (int64_t n = 0; n < batch * columns; n++) {
        const int64_t b = n / columns, column = n % columns;
        const bool used = column * f->page_size < c->span[b].k_len;
        set_integer(c, BLOCK_TABLE, b, column, used ? (first + n * step) % pages : 0x7ffffff0);
    }
}

static double poison(const struct call *c, uint64_t n) {
    static const double kinds[] = {NAN, INFINITY, -INFINITY};
    return kinds[random_below(draw(c, DRAW_POISON), n, 3)];
}

static void poison_row(struct call *c, enum slot slot, int64_t index[4]) {
    struct tensor *t = &c->tensor[slot];
    const int last = t->dl.ndim - 1;
    for (index[last] = 0; index[last] < t->shape[last]; index[last]++)
        tensor_set(t, index, poison(c, (uint64_t)index[last]));
}

/* Heads of key and value that are memory of their own. */
static int64_t own_heads(const struct call *c) {
    return c->made_from.features.broadcast_heads ? least(1, c->made_from.shape.heads_kv)
                                                 : c->made_from.shape.heads_kv;
}

/* Whether a row may look at key j of head g; with `weighs`, also whether some bias lets its value count. */
static bool key_seen(const struct call *c, int64_t b, int64_t g, int64_t j, bool weighs) {
    const int64_t heads = c->made_from.shape.heads_q / own_heads(c);
    for (int64_t h = g * heads; h < (g + 1) * heads; h++) {
        for (int64_t i = 0; i < c->span[b].q_len; i++) {
            if (call_sees(c, b, h, i, j) && (!weighs || call_bias(c, b, h, i, j) != -INFINITY))
                return true;
        }
    }
    return false;
}

/* Pages and page tails that no sequence owns. */
static void poison_pages(struct call *c) {
    const struct tensor *key = &c->tensor[KEY];
    const int64_t size = c->made_from.features.page_size, keys = size ? key->shape[0] * size : 0;
    bool *owned = calloc((size_t)keys + 1, sizeof *owned);
    int64_t index[4];
    assert(owned);
    for (int64_t b = 0; size && b < c->made_from.shape.batch; b++) {
        for (int64_t j = 0; j < c->span[b].k_len; j++) {
            call_row(c, KEY, b, 0, j, index);
            owned[index[0] * size + index[2]] = true;
        }
    }
    for (int64_t n = 0; n < keys; n++) {
        for (int64_t g = 0; g < key->shape[1] && !owned[n]; g++) {
            poison_row(c, KEY, (int64_t[4]){n / size, g, n % size});
            poison_row(c, VALUE, (int64_t[4]){n / size, g, n % size});
        }
    }
    free(owned);
}

static void poison_unseen(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    const bool paged = c->made_from.features.page_size != 0;
    int64_t index[4];
    for (int64_t b = 0; b < s->batch && s->heads_q; b++) {
        const struct span *own = &c->span[b];
        for (int64_t n = 0; n < own_heads(c) * own->k_rows; n++) {
            const int64_t g = n / own->k_rows, j = n % own->k_rows;
            if ((paged && j >= own->k_len) || key_seen(c, b, g, j, true))
                continue;
            call_row(c, VALUE, b, g, j, index);
            poison_row(c, VALUE, index);
            if (key_seen(c, b, g, j, false))
                continue;
            call_row(c, KEY, b, g, j, index);
            poison_row(c, KEY, index);
        }
        /* Numbers in every other case: a row that looks for what is not finite would find these rows by it. */
        const int64_t poisoned =
            c->made_from.seed % 2 ? 0 : s->heads_q * (own->q_rows - own->q_len);
        for (int64_t n = 0; n < poisoned; n++) {
            call_row(c, QUERY, b, n % s->heads_q, own->q_len + n / s->heads_q, index);
            poison_row(c, QUERY, index);
        }
    }
    poison_pages(c);
}

/* Whether row i of head h sees a key, or with `weighs`, one that some weight can go to. */
static bool row_sees(const struct call *c, int64_t b, int64_t h, int64_t i, bool weighs) {
    for (int64_t j = 0; j < c->span[b].k_len; j++) {
        if (call_sees(c, b, h, i, j) && (!weighs || call_bias(c, b, h, i, j) != -INFINITY))
            return true;
    }
    return false;
}

/* What stands in rows that see nothing is nothing to any gradient. */
static void poison_blind_row(struct call *c, int64_t b, int64_t h, int64_t i) {
    int64_t index[4];
    bool heads_see = false;
    if (!row_sees(c, b, h, i, false)) {
        call_row(c, QUERY, b, h, i, index);
        poison_row(c, QUERY, index);
    }
    if (row_sees(c, b, h, i, true))
        return;
    for (int64_t n = 0; c->made_from.features.broadcast_heads && n < c->made_from.shape.heads_q;
         n++)
        heads_see |= row_sees(c, b, n, i, true);
    if (!heads_see) {
        call_row(c, D_OUTPUT, b, h, i, index);
        poison_row(c, D_OUTPUT, index);
    }
    if (c->has[D_LSE] && !c->has[SINKS]) {
        call_row(c, D_LSE, b, h, i, index);
        tensor_set(&c->tensor[D_LSE], index, poison(c, (uint64_t)i));
    }
}

/* Whether a row may look at a key over which element `index` of the bias stands. */
static bool bias_is_seen(const struct call *c, const int64_t index[4]) {
    const struct tensor *t = &c->tensor[BIAS];
    const int64_t extents[4] = {c->made_from.shape.batch, c->made_from.shape.heads_q, c->extent_q,
                                c->extent_k};
    int64_t count = 1, at[4];
    for (int axis = 0; axis < 4; axis++)
        count *= t->shape[axis] > 1 ? 1 : extents[axis];
    for (int64_t n = 0; n < count; n++) {
        int64_t left = n;
        for (int axis = 3; axis >= 0; axis--) {
            at[axis] = t->shape[axis] > 1 ? index[axis] : left % extents[axis];
            left /= t->shape[axis] > 1 ? 1 : extents[axis];
        }
        if (call_sees(c, at[0], at[1], at[2], at[3]))
            return true;
    }
    return false;
}

static void poison_bias(struct call *c) {
    struct tensor *t = &c->tensor[BIAS];
    int64_t index[4] = {0};
    for (int64_t n = tensor_count(t); n > 0; n--, tensor_next(t, index)) {
        if (!bias_is_seen(c, index))
            tensor_set(t, index, poison(c, (uint64_t)n));
    }
}

static void poison_for_backward(struct call *c) {
    const struct shape *s = &c->made_from.shape;
    for (int64_t b = 0; b < s->batch; b++) {
        for (int64_t n = 0; n < s->heads_q * c->span[b].q_rows; n++)
            poison_blind_row(c, b, n % s->heads_q, n / s->heads_q);
    }
    if (c->has[BIAS] && !c->made_from.features.expanded)
        poison_bias(c);
}

/* NaN, or what is planted, in one element that takes part, if chance finds one. */
static void set_nan(struct call *c) {
    static const enum slot slots[] = {[NAN_QUERY] = QUERY, [NAN_KEY] = KEY, [NAN_VALUE] = VALUE};
    const struct shape *s = &c->made_from.shape;
    if (c->made_from.features.nan == NO_NAN || s->batch == 0 || s->heads_q == 0)
        return;
    const enum slot slot = slots[c->made_from.features.nan];
    const int64_t heads = slot == QUERY ? s->heads_q : own_heads(c);
    for (uint64_t attempt = 0; attempt < 100; attempt += 4) {
        int64_t index[4];
        const int64_t b = random_below(draw(c, DRAW_NAN), attempt, s->batch);
        const int64_t h = random_below(draw(c, DRAW_NAN), attempt + 1, heads);
        const int64_t l =
            random_below(draw(c, DRAW_NAN), attempt + 2, slot == QUERY ? s->len_q : s->len_k);
        if (slot == QUERY ? l >= c->span[b].q_len : !key_seen(c, b, h, l, true))
            continue;
        call_row(c, slot, b, h, l, index);
        const int last = c->tensor[slot].dl.ndim - 1;
        index[last] = random_below(draw(c, DRAW_NAN), attempt + 3, c->tensor[slot].shape[last]);
        const double planted = c->made_from.features.planted;
        tensor_set(&c->tensor[slot], index, planted == 0 ? NAN : planted);
        return;
    }
}

/* ---- The call --------------------------------------------------------------------------------------------- */

static void set_desc(struct call *c) {
    const struct features *f = &c->made_from.features;
    c->desc.struct_size = sizeof c->desc;
    c->desc.flags = (f->window ? DLATTN_WINDOW : 0) | (f->exact_scale ? DLATTN_EXACT_SCALE : 0) |
                    (f->empty_lse_inf ? DLATTN_EMPTY_LSE_INF : 0);
    if (f->backward && random_below(draw(c, DRAW_ORDER), 0, 2))
        c->desc.flags |= DLATTN_ANY_ORDER;
    c->desc.scale = f->scale;
    c->desc.softcap = f->softcap;
    c->desc.window_left = f->window ? f->window_left : 0;
    c->desc.window_right = f->window ? f->window_right : 0;
    c->desc.causal = f->causal;
    c->desc.alignment = f->bottom_right ? DLATTN_ALIGN_BOTTOM_RIGHT : DLATTN_ALIGN_TOP_LEFT;
    c->desc.diagonal_offset = f->diagonal_offset;
    c->desc.block_q = (int32_t)f->block_q;
    c->desc.block_k = (int32_t)f->block_k;
    c->desc.dropout_probability = f->dropout;
    c->desc.dropout_seed = f->dropout > 0 ? random_bits(draw(c, DRAW_DROPOUT), 0) : 0;
    c->desc.dropout_offset = f->dropout > 0 ? random_bits(draw(c, DRAW_DROPOUT), 1) : 0;
}

void call_make(struct call *c, const struct test_case *from) {
    memset(c, 0, sizeof *c);
    c->made_from = *from;
    set_desc(c);
    set_spans(c);
    make_main(c);
    make_rest(c);
    make_later(c);
    if (from->features.backward)
        make_gradients(c);
    fill_values(c);
    fill_lengths(c);
    poison_unseen(c);
    if (from->features.backward)
        poison_for_backward(c);
    set_nan(c);
}

void call_copy(struct call *c, const struct call *from) {
    const bool view = call_has_view(from);
    *c = *from;
    for (int slot = 0; slot < SLOTS; slot++) {
        if (c->has[slot] && (slot != VALUE || !view))
            tensor_copy(&c->tensor[slot], &from->tensor[slot]);
    }
    if (view)
        make_view(c, from->tensor[VALUE].shape[from->tensor[VALUE].dl.ndim - 1]);
}

void call_free(struct call *c) {
    const bool view = call_has_view(c);
    for (int slot = 0; slot < SLOTS; slot++) {
        if (c->has[slot] && (slot != VALUE || !view))
            tensor_free(&c->tensor[slot]);
    }
}

void call_upcast(struct call *wide, const struct call *from) {
    memset(wide, 0, sizeof *wide);
    wide->made_from = from->made_from;
    wide->desc = from->desc;
    memcpy(wide->span, from->span, sizeof wide->span);
    wide->extent_q = from->extent_q;
    wide->extent_k = from->extent_k;
    wide->made_from.features.layout = COMPACT;
    for (int slot = 0; slot < SLOTS; slot++) {
        const struct tensor *t = &from->tensor[slot];
        const bool widens = slot < MASK || (slot >= D_OUTPUT && slot <= D_BIAS);
        const enum element e = widens ? F64 : t->element;
        if (!from->has[slot])
            continue;
        make(wide, (enum slot)slot, e, t->dl.ndim, t->shape, 0);
        tensor_convert(&wide->tensor[slot], t);
    }
}

dlattn_tensors call_tensors(const struct call *c) {
    const DLTensor *slots[TENSOR_SLOTS];
    dlattn_tensors tensors = {.struct_size = sizeof tensors};
    for (int slot = 0; slot < TENSOR_SLOTS; slot++)
        slots[slot] = c->has[slot] ? &c->tensor[slot].dl : NULL;
    _Static_assert(sizeof slots + offsetof(dlattn_tensors, query) == sizeof tensors,
                   "a pointer for each slot");
    memcpy((char *)&tensors + offsetof(dlattn_tensors, query), slots, sizeof slots);
    return tensors;
}

dlattn_gradients call_gradients(const struct call *c) {
    const DLTensor *slots[SLOTS - TENSOR_SLOTS];
    dlattn_gradients gradients = {.struct_size = sizeof gradients};
    for (int slot = TENSOR_SLOTS; slot < SLOTS; slot++)
        slots[slot - TENSOR_SLOTS] = c->has[slot] ? &c->tensor[slot].dl : NULL;
    _Static_assert(sizeof slots + offsetof(dlattn_gradients, d_output) == sizeof gradients,
                   "a pointer for each slot");
    memcpy((char *)&gradients + offsetof(dlattn_gradients, d_output), slots, sizeof slots);
    return gradients;
}

void call_use_images(struct call *c) {
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &c->tensor[slot];
        if (!c->has[slot])
            continue;
        t->dl.device = (DLDevice){kDLCPU, 0};
        t->dl.data = t->image + t->first;
        t->dl.byte_offset = 0;
    }
}

/* Of a tensor whose axes may have extent 1 for all. */
static double broadcast_get(const struct tensor *t, int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t at[4] = {b, h, i, j};
    int64_t index[4];
    for (int axis = 0; axis < 4; axis++)
        index[axis] = t->shape[axis] > 1 ? at[axis] : 0;
    return tensor_get(t, index);
}

static double segment(const struct call *c, enum slot slot, int64_t b, int64_t start, int64_t l) {
    const struct tensor *t = &c->tensor[slot];
    return tensor_get(t, t->dl.ndim == 1 ? (int64_t[4]){start + l} : (int64_t[4]){b, l});
}

/* By segments, block mask and mask. */
static bool masks_leave(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j) {
    const struct features *f = &c->made_from.features;
    if (f->segments && segment(c, QUERY_SEGMENTS, b, c->span[b].q_start, i) !=
                           segment(c, KEY_SEGMENTS, b, c->span[b].k_start, j))
        return false;
    if (f->block_q) {
        const double block =
            broadcast_get(&c->tensor[BLOCK_MASK], b, h, i / f->block_q, j / f->block_k);
        if (block != 1)
            return block == 2;
    }
    return !c->has[MASK] || broadcast_get(&c->tensor[MASK], b, h, i, j) != 0;
}

bool call_sees(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j) {
    const struct features *f = &c->made_from.features;
    const struct span *s = &c->span[b];
    const int64_t key = i + s->diagonal;
    if (i >= s->q_len || j >= s->k_len || (f->causal && j > key))
        return false;
    if (f->window && ((f->window_left >= 0 && j < key - f->window_left) ||
                      (f->window_right >= 0 && j > key + f->window_right)))
        return false;
    return masks_leave(c, b, h, i, j);
}

double call_bias(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j) {
    return c->has[BIAS] ? broadcast_get(&c->tensor[BIAS], b, h, i, j) : 0;
}

double call_scale(const struct call *c, enum slot slot, int64_t b, int64_t h, int64_t j) {
    const struct tensor *t = &c->tensor[slot];
    int64_t entry = b;
    if (!c->has[slot])
        return 1;
    if (t->dl.ndim == 1)
        return tensor_get(t, (int64_t[4]){0});
    if (slot != QUERY_SCALE && c->has[BLOCK_TABLE])
        entry = (int64_t)tensor_get(&c->tensor[BLOCK_TABLE],
                                    (int64_t[4]){b, j / c->made_from.features.page_size});
    return tensor_get(t, (int64_t[4]){t->shape[0] > 1 ? entry : 0, h});
}

double call_keeps(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j) {
    const dlattn_forward_desc *d = &c->desc;
    if (d->dropout_probability == 0)
        return 1;
    uint32_t x[4] = {(uint32_t)(j / 4), (uint32_t)i, (uint32_t)(b * c->made_from.shape.heads_q + h),
                     (uint32_t)d->dropout_offset};
    philox(x, (uint32_t)d->dropout_seed,
           (uint32_t)(d->dropout_seed >> 32 ^ d->dropout_offset >> 32));
    return x[j % 4] < d->dropout_probability * 0x1p32 ? 0 : 1 / (1 - d->dropout_probability);
}

void call_row(const struct call *c, enum slot slot, int64_t b, int64_t h, int64_t l,
              int64_t index[4]) {
    const struct span *s = &c->span[b];
    slot = slot_of(slot);
    const bool of_query = slot == QUERY || slot == OUTPUT || slot == LSE;
    memset(index, 0, 4 * sizeof *index);
    index[0] = b;
    index[1] = h;
    index[2] = l;
    if (slot == LSE && c->made_from.features.varlen_q) {
        index[0] = h;
        index[1] = s->q_start + l;
    } else if (slot != LSE && c->tensor[slot].dl.ndim == 3) {
        index[0] = (of_query ? s->q_start : s->k_start) + l;
        index[2] = 0;
    } else if (!of_query && c->has[BLOCK_TABLE]) {
        const int64_t size = c->made_from.features.page_size;
        index[0] = (int64_t)tensor_get(&c->tensor[BLOCK_TABLE], (int64_t[4]){b, l / size});
        index[2] = l % size;
    }
}

/* ---- Names and combinations ------------------------------------------------------------------------------- */

void case_print(const struct test_case *c, char *text, size_t size) {
    const struct shape *s = &c->shape;
    snprintf(text, size, "%s%s B%lld H%lld/%lld Lq%lld Lk%lld D%lld/%lld %s %s seed %llu",
             c->features.backward ? "backward " : "", element_name(c->element), (long long)s->batch,
             (long long)s->heads_q, (long long)s->heads_kv, (long long)s->len_q,
             (long long)s->len_k, (long long)s->dim_qk, (long long)s->dim_v, c->features.name,
             layout_name(c->features.layout), (unsigned long long)c->seed);
}

bool features_have_8_bits(const struct features *f) {
    return f->scales || f->query || f->key || f->value;
}

bool features_are_forward_only(const struct features *f) {
    return f->view || f->page_size || features_have_8_bits(f);
}

struct features features_random(uint64_t seed) {
    uint64_t n = 0;
#define ONE_IN(k) (random_below(seed, n++, k) == 0)
    struct features f = {.name = "random"};
    f.causal = ONE_IN(2);
    f.bottom_right = ONE_IN(2);
    f.window = ONE_IN(3);
    f.window_left = random_below(seed, n++, 60) - 1;
    f.window_right = random_below(seed, n++, 60) - 1;
    f.softcap = ONE_IN(4) ? 1 + (double)random_below(seed, n++, 20) : 0;
    f.lse = random_below(seed, n++, 3);
    f.empty_lse_inf = ONE_IN(3);
    f.layout = (enum layout)random_below(seed, n++, LAYOUTS);
    f.broadcast_heads = ONE_IN(6);
    f.query_lengths = ONE_IN(5);
    f.key_lengths = ONE_IN(3);
    if (ONE_IN(3))
        return f; /* what nearly every row has */
    f.bias = ONE_IN(3) ? 1 + (unsigned)random_below(seed, n++, 16) : 0;
    f.mask = ONE_IN(3) ? 1 + (unsigned)random_below(seed, n++, 16) : 0;
    f.bias_element = ONE_IN(2);
    f.bias_holes = ONE_IN(3);
    f.expanded = ONE_IN(4);
    f.mask_rows = ONE_IN(3);
    f.alibi = ONE_IN(4) ? 1 + (int)random_below(seed, n++, 2) : 0;
    f.sinks = ONE_IN(4);
    f.varlen_q = ONE_IN(4);
    f.page_size = ONE_IN(5) ? 1 + random_below(seed, n++, 20) : 0;
    f.varlen_k = !f.page_size && ONE_IN(4);
    if (!ONE_IN(4))
        return f;
    f.diagonal_offset = ONE_IN(2) ? random_below(seed, n++, 60) - 30 : 0;
    f.segments = ONE_IN(2);
    f.block_q = ONE_IN(2) ? 1 + random_below(seed, n++, 20) : 0;
    f.block_k = f.block_q ? 1 + random_below(seed, n++, 20) : 0;
    f.scales = (int)random_below(seed, n++, 4);
    f.dropout = ONE_IN(3) ? (double)random_below(seed, n++, 90) / 100 : 0;
#undef ONE_IN
    return f;
}
