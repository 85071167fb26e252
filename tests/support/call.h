/*
 * Cases: a shape, a set of features, an element type and a seed make one call of the ABI, with random tensors. Everything
 * that no row may read (keys that no row sees, pages that nothing points to, gaps between rows) holds NaN or infinity.
 */
#ifndef DLATTN_TESTS_CALL_H_
#define DLATTN_TESTS_CALL_H_

#include "tests/support/tensor.h"

struct shape {
    int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
};

/* Axes that a bias or mask spans; the others have extent 1. AXIS_NONE is one number for all. */
enum { AXIS_B = 1, AXIS_H = 2, AXIS_Q = 4, AXIS_K = 8, EVERY_AXIS = 15, AXIS_NONE = 16 };

/* What a case asks for beyond its shape; all zero: plain attention. Rows of features.inc. */
struct features {
    const char *name;
    bool causal, bottom_right;
    bool window;
    int64_t window_left, window_right;
    double softcap, scale;
    bool exact_scale;
    unsigned bias, mask; /* AXIS_* */
    bool bias_element;   /* the bias has the query's type, not f32 */
    bool bias_holes;     /* one in seven of it is -infinity */
    bool expanded;       /* bias and mask have full extents with stride 0 */
    bool mask_rows;      /* the mask also hides whole rows */
    int alibi;           /* 1: [H], 2: [B, H] */
    bool sinks;
    bool query_lengths, key_lengths;
    bool varlen_q, varlen_k;
    int64_t page_size;
    enum { NO_LSE, LSE_F32, LSE_ELEMENT } lse;
    bool empty_lse_inf;
    enum layout layout;
    bool broadcast_heads; /* key and value have stride 0 over their heads */
    bool view; /* value is the first columns of key, where it is no wider and of the same type */
    enum { NO_NAN, NAN_QUERY, NAN_KEY, NAN_VALUE } nan; /* in one element that some rows see */
    double planted;                                     /* there, instead of the NaN; 0 = NaN */
    double logits;                                      /* multiplies the query; 0 = 1 */
    int64_t diagonal_offset;
    bool segments;
    int64_t segment_rows;           /* not 0: segments are sorted, each has so many rows or keys */
    int64_t block_q, block_k;       /* not 0: a block mask */
    int scales;                     /* 1: [1], 2: [B, heads] or [pages, heads], 3: [1, heads] */
    double dropout;                 /* its probability */
    enum element query, key, value; /* E4M3, E5M2; 0 = the case's */
    bool backward;                  /* the gradients are computed, not the output */
};

struct test_case {
    struct shape shape;
    struct features features;
    enum element element;
    uint64_t seed;
};

enum slot {
    QUERY,
    KEY,
    VALUE,
    OUTPUT,
    LSE,
    BIAS,
    MASK,
    ALIBI_SLOPES,
    SINKS,
    QUERY_LENGTHS,
    KEY_LENGTHS,
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    BLOCK_TABLE,
    QUERY_SEGMENTS,
    KEY_SEGMENTS,
    BLOCK_MASK,
    QUERY_SCALE,
    KEY_SCALE,
    VALUE_SCALE,
    D_OUTPUT,
    D_LSE,
    D_QUERY,
    D_KEY,
    D_VALUE,
    D_BIAS,
    D_ALIBI_SLOPES,
    D_SINKS,
    SLOTS
};
enum { TENSOR_SLOTS = D_OUTPUT };
const char *slot_name(enum slot slot);

enum { MAX_BATCH = 8 };

/* The rows and keys that a batch entry owns, and how many of them take part. Row i meets key i + diagonal. */
struct span {
    int64_t q_start, q_rows, q_len;
    int64_t k_start, k_rows, k_len;
    int64_t diagonal;
};

/* Do not copy: the tensors point into it. */
struct call {
    struct test_case made_from;
    dlattn_forward_desc desc;
    struct tensor tensor[SLOTS];
    bool has[SLOTS];
    struct span span[MAX_BATCH];
    int64_t extent_q, extent_k; /* of a bias or mask that spans rows or keys */
    bool
        has_e4m3_weights; /* of bounds: the row multiplies values with weights of e4m3, in the tensor cores' sums */
};

/* Byte of untouched output storage, and of gaps between the elements of inputs (NaN in every float type). */
enum { OUTPUT_FILL = 0xf7, GAP_FILL = 0xff };

/* Of a call of backward, OUTPUT and LSE are inputs, which are left to whoever runs forward. It has some of its gradients, each in
 * the tensor's type or f32. */
void call_make(struct call *c, const struct test_case *from);
void call_free(struct call *c);
/* The same call in memory of its own, to the byte. */
void call_copy(struct call *c, const struct call *from);
/* The same call in compact double tensors: what the reference gets. */
void call_upcast(struct call *wide, const struct call *from);

/* The slots as the ABI takes them. */
dlattn_tensors call_tensors(const struct call *c);
dlattn_gradients call_gradients(const struct call *c);
/* Whether value lies in the memory of key. */
bool call_has_view(const struct call *c);
/* Whether the call writes the tensor, which it has. */
bool call_writes(const struct call *c, enum slot slot);
/* The type of D_OUTPUT or a later slot before the call was upcast. */
enum element call_gradient_element(const struct call *c, enum slot slot);
/* Points every tensor at its own image. */
void call_use_images(struct call *c);

/* Whether query row i of head h may look at key j, by causal, window, lengths, segments and masks. */
bool call_sees(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j);
/* The bias of that row and key; 0 where there is none. */
double call_bias(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j);
/* The factor of query row or key j of head h, of the query's heads or the key's; 1 without a scale. */
double call_scale(const struct call *c, enum slot slot, int64_t b, int64_t h, int64_t j);
/* What dropout makes of that weight: 0, or 1 / (1 - probability). */
double call_keeps(const struct call *c, int64_t b, int64_t h, int64_t i, int64_t j);
/* Indices of row l of head h of batch b in a query, output, key, value or lse, also packed and paged, or in their gradients. */
void call_row(const struct call *c, enum slot slot, int64_t b, int64_t h, int64_t l,
              int64_t index[4]);

/* The case in one line: "f16 B2 H4/2 Lq33 Lk65 D64/64 causal seed 7". */
void case_print(const struct test_case *c, char *text, size_t size);

/* Random numbers that depend on their arguments alone: uniform bits, integers in [0, below), standard normal. */
uint64_t random_bits(uint64_t seed, uint64_t n);
int64_t random_below(uint64_t seed, uint64_t n, int64_t below);
double random_normal(uint64_t seed, uint64_t n);

extern const struct shape check_shapes[];
extern const int check_shape_count;
extern const struct features feature_sets[];
extern const int feature_set_count;
/* The set of that name, which there is. */
const struct features *features_named(const char *name);
/* Whether a tensor may be of 8 bits, or has a scale. */
bool features_have_8_bits(const struct features *f);
/* Whether backward refuses them. */
bool features_are_forward_only(const struct features *f);
/* A sensible combination drawn by chance. */
struct features features_random(uint64_t seed);

#endif /* DLATTN_TESTS_CALL_H_ */
