/* One query row of an upcast call by plain loops: what the bounds of forward and of backward are made of. */
#ifndef DLATTN_TESTS_PLAIN_H_
#define DLATTN_TESTS_PLAIN_H_

#include "tests/support/check.h"

static inline double square(double x) { return x * x; }

/* Sums of squares that the errors of one element of a row's output come from. */
struct squares {
    long double values;  /* weighted values */
    long double rounded; /* what they lose when the weights are rounded to the element type */
    long double scored;  /* what they move by for a score that is off by its size */
};

/* Of a row, arrays of dim_v. */
struct sums {
    double *output;
    double *tiny; /* what those values have whose weights may count as 0 */
    /* As in struct squares: a double holds them of all types but f64, whose weights may be below the root of its least number. */
    double *values, *rounded, *scored;
    struct squares *squares; /* of f64 */
};

/* What the rows of a head have in common. */
struct key {
    const double *key, *value;
    double scale, value_scale;
};

/* The row, and room for what is computed of it. */
struct row {
    struct call *call;
    int64_t b, h, i;
    int64_t keys;    /* that take part in this batch entry */
    struct key *key; /* [keys] */
    double scale;    /* of the logits, but for that of each key */
    double *product; /* [keys]; query and key, scaled, before the cap */
    double
        *size; /* [keys]; of the terms that make a score, each of which is rounded; 1 is for exp */
    double *score, *weight; /* [keys] */
    const double *
        *value; /* [keys]; NULL: the row does not see the key, which has no product and no size */
    double *factor;     /* [keys]; of the value: its scale, and what dropout makes of the weight */
    double most, total; /* the largest score, and the sum of weights relative to it */
    struct sums sums;
    void *context; /* of who asked for each row */
};

/* Calls put() with every row of the call. */
void each_row(struct call *wide, void (*put)(struct row *), void *context);

/* Scores, weights, and the output in sums; the weights add up to 1 with the sink's. */
void attend(struct row *r);

/* The row itself of QUERY and what is shaped like it. */
const double *query_row(const struct row *r, enum slot slot);

double sink_of(const struct row *r); /* -infinity without one */
double distance_of(const struct row *r, int64_t j);

/* Independent errors add up like a random walk. Each is taken at its largest, 1.7 times its root mean square or more, so
 * that one sum in 10^11 goes further than this. */
static const double WALK = 4;

/* Below it a type's steps stop shrinking. */
double least_normal(enum element e);
/* What rounding x to the type costs at most. */
double rounding(enum element e, double x);
/* The same for the types in which factors of a product may be rounded; 0 for the others. */
double factor_rounding(enum element e, double x);
enum element type_of_sums(enum element e);

#endif /* DLATTN_TESTS_PLAIN_H_ */
