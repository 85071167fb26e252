/* The reference, one query row at a time: for kernels that meet a row they cannot do exactly. */
#ifndef DLATTN_REF_H_
#define DLATTN_REF_H_

#include "src/kernel.h"

/* Bytes of scratch that cpu_fwd_ref_row needs, a multiple of 64. */
size_t cpu_fwd_ref_row_bytes(const struct problem *p);

/* Output and lse of query row i of head h of batch b, whose sequence is s. */
void cpu_fwd_ref_row(const struct problem *p, const struct sequence *s, int64_t b, int64_t h,
                     int64_t i, double *scratch);

/* The row, for kernels that meet a call they cannot do exactly. */
ROW_FUNCTIONS(cpu_bwd_ref);

#endif /* DLATTN_REF_H_ */
