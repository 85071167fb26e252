#define _GNU_SOURCE /* sigaction() */
#include "dlattn_loader.h"

#include "tests/support/check.h"

#include <assert.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <unistd.h>

const dlattn_api *test_api(void) {
    char why[4096];
    const dlattn_api *api = dlattn_open(why, sizeof why);
    if (!api) {
        fprintf(stderr, "%s", why);
        exit(1);
    }
    return api;
}

__attribute__((format(printf, 3, 4))) static void say(struct verdict *v, enum outcome outcome,
                                                      const char *format, ...) {
    const size_t used = strlen(v->text);
    va_list args;
    v->outcome = outcome;
    va_start(args, format);
    vsnprintf(v->text + used, sizeof v->text - used, format, args);
    va_end(args);
}

/* ---- Crashes ---------------------------------------------------------------------------------- */

/* The case that runs, for a kernel that dies in it. */
static char running[512];
static struct sigaction old_action[NSIG];

/* Names the case, then lets the fault happen again under whatever handled it before. */
static void crashed(int signal_number) {
    static const char head[] = "crashed in: ";
    (void)!write(STDERR_FILENO, head, sizeof head - 1);
    (void)!write(STDERR_FILENO, running, strlen(running));
    (void)!write(STDERR_FILENO, "\n", 1);
    sigaction(signal_number, &old_action[signal_number], NULL);
}

static void report_crashes(void) {
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    static bool installed;
    const struct sigaction action = {.sa_handler = crashed};
    for (size_t i = 0; i < sizeof signals / sizeof signals[0] && !installed; i++)
        sigaction(signals[i], &action, &old_action[signals[i]]);
    installed = true;
}

/* ---- Running ---------------------------------------------------------------------------------------------- */

/* A run of the subject: what it starts from, and what came back. */
struct run {
    unsigned char fill; /* of outputs before the call */
    enum side side;
    int32_t threads;
    bool planned;                  /* through a plan */
    struct block block[SLOTS + 1]; /* the last is the workspace */
};

static void put(struct call *c, const struct place *place, struct run *run) {
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &c->tensor[slot];
        if (!c->has[slot])
            continue;
        if (call_writes(c, (enum slot)slot))
            tensor_fill(t, run->fill);
        if (slot == VALUE && call_has_view(c)) {
            run->block[slot] = run->block[KEY];
        } else {
            run->block[slot] = place->take(t->bytes, t->alignment, run->side);
            place->store(&run->block[slot], t->image);
        }
        /* byte_offset must be added before anything is read: `data` itself points outside. */
        t->dl.device = place->device;
        t->dl.byte_offset = 4096 + t->first;
        t->dl.data = run->block[slot].data - 4096;
    }
}

/* Brings everything back; false, with a text, if a byte changed that had to stay. */
static bool take_back(struct verdict *v, struct call *c, const struct place *place,
                      struct run *run) {
    bool good = true;
    for (int slot = 0; slot < SLOTS; slot++) {
        struct tensor *t = &c->tensor[slot];
        const bool written = call_writes(c, (enum slot)slot);
        size_t at = 0;
        if (!c->has[slot] || (slot == VALUE && call_has_view(c)))
            continue;
        unsigned char *before = malloc(t->bytes + 1);
        assert(before);
        memcpy(before, t->image, t->bytes);
        if (!place->fetch(&run->block[slot], t->image)) {
            say(v, FAILED, "; %s: memory around it was written", slot_name((enum slot)slot));
            good = false;
        }
        if (!written && memcmp(before, t->image, t->bytes) != 0) {
            say(v, FAILED, "; %s: an input was written", slot_name((enum slot)slot));
            good = false;
        }
        if (written && !tensor_gaps_hold(t, run->fill, &at)) {
            say(v, FAILED, "; %s: byte %zu, between its elements, was written",
                slot_name((enum slot)slot), at);
            good = false;
        }
        free(before);
        place->give(&run->block[slot]);
    }
    return good;
}

/* What a call hands over. */
struct arguments {
    dlattn_forward_desc desc;
    dlattn_tensors tensors;
    dlattn_gradients gradients;
    dlattn_exec exec;
};

static struct arguments arguments_of(const struct call *c, const char *kernel, int32_t threads) {
    struct arguments a = {
        c->desc, call_tensors(c), call_gradients(c), {.struct_size = sizeof a.exec}};
    a.desc.kernel = kernel;
    a.desc.num_threads = threads;
    return a;
}

static int32_t query(const dlattn_api *api, const struct call *c, const struct arguments *a,
                     dlattn_sku *sku) {
    sku->struct_size = sizeof *sku;
    return c->made_from.features.backward
               ? api->backward_query(&a->desc, &a->tensors, &a->gradients, sku)
               : api->forward_query(&a->desc, &a->tensors, sku);
}

static int32_t launch_planned(const dlattn_api *api, bool backward, const struct arguments *a) {
    dlattn_plan *plan;
    int32_t status = backward
                         ? api->backward_plan_create(&a->desc, &a->tensors, &a->gradients, &plan)
                         : api->plan_create(&a->desc, &a->tensors, &plan);
    if (status != DLATTN_OK)
        return status;
    status = backward ? api->backward_plan_can_run(plan, &a->tensors, &a->gradients)
                      : api->plan_can_run(plan, &a->tensors);
    if (status == DLATTN_OK)
        status = backward ? api->backward_plan_run(plan, &a->tensors, &a->gradients, &a->exec)
                          : api->plan_run(plan, &a->tensors, &a->exec);
    api->plan_destroy(plan);
    return status;
}

static int32_t launch(const struct subject *s, const struct call *c, const struct arguments *a,
                      bool planned) {
    const bool backward = c->made_from.features.backward;
    if (!backward && s->forward)
        return s->forward(&a->desc, &a->tensors, &a->exec);
    if (backward && s->backward)
        return s->backward(&a->desc, &a->tensors, &a->gradients, &a->exec);
    if (planned)
        return launch_planned(s->api, backward, a);
    return backward ? s->api->backward(&a->desc, &a->tensors, &a->gradients, &a->exec)
                    : s->api->forward(&a->desc, &a->tensors, &a->exec);
}

/* The bits may vary only where the caller allows it. */
static void expect_stable(struct verdict *v, const struct call *c) {
    if (!v->sku.bit_stable && !(c->desc.flags & DLATTN_ANY_ORDER))
        say(v, FAILED, "; %s says that its bits vary", v->sku.kernel);
}

/* Runs the subject on placed tensors; the images hold the results. */
static void run_subject(struct verdict *v, const struct subject *s, struct call *c,
                        struct run *run) {
    put(c, s->place, run);
    struct arguments a = arguments_of(c, s->kernel, run->threads);
    int32_t status = query(s->api, c, &a, &v->sku);
    struct block workspace = {0};
    if (status == DLATTN_OK) {
        workspace = s->place->take(v->sku.workspace_bytes, v->sku.workspace_alignment, run->side);
        a.exec.workspace = workspace.data;
        a.exec.workspace_bytes = v->sku.workspace_bytes;
        status = launch(s, c, &a, run->planned);
        expect_stable(v, c);
    }
    if (status == DLATTN_UNSUPPORTED && s->kernel)
        say(v, DECLINED, ": %s", s->api->last_error());
    else if (status != DLATTN_OK)
        say(v, FAILED, ": %s: %s", s->api->status_name(status), s->api->last_error());
    if (status == DLATTN_OK && s->place->wait)
        s->place->wait();
    take_back(v, c, s->place, run);
    if (!workspace.data)
        return;
    void *scratch = malloc(workspace.bytes + 1);
    assert(scratch);
    if (!s->place->fetch(&workspace, scratch))
        say(v, FAILED, "; memory around the workspace was written");
    free(scratch);
    s->place->give(&workspace);
}

/* ---- Comparing -------------------------------------------------------------------------------------------- */

static bool alike(double got, double want) {
    return isnan(want) ? isnan(got) : isinf(want) ? got == want : isfinite(got);
}

/* How far `got` is from what it must be, in units of its bound; more than 1 is wrong. */
static double excess(double got, double want, double bound) {
    if (!alike(got, want))
        return INFINITY;
    if (!isfinite(want) || got == want)
        return 0;
    return isfinite(bound) ? fabs(got - want) / bound : INFINITY;
}

/* Elements of a result against the reference, each within its own bound. */
static void compare(struct verdict *v, const struct call *c, const struct call *ref,
                    const struct call *bounds, enum slot slot) {
    const enum element e = c->tensor[slot].element;
    double *const got = tensor_values(&c->tensor[slot]),
                  *const exact = tensor_values(&ref->tensor[slot]),
                  *const bound = tensor_values(&bounds->tensor[slot]);
    double worst = 1, worst_want = 0;
    int64_t at = 0, index[4] = {0};
    for (int64_t n = 0, count = tensor_count(&c->tensor[slot]); n < count; n++) {
        const bool overflows = isfinite(exact[n]) && !isfinite(element_round(e, exact[n]));
        const double want = overflows ? element_round(e, exact[n]) : exact[n],
                     by = excess(got[n], want, bound[n]);
        if (by > worst) {
            worst = by;
            worst_want = want;
            at = n;
        }
    }
    if (worst > 1) {
        tensor_index(&c->tensor[slot], at, index);
        say(v, FAILED,
            "; %s[%lld, %lld, %lld, %lld] is %.9g, must be %.9g within %.3g (seen: %.3g)",
            slot_name(slot), (long long)index[0], (long long)index[1], (long long)index[2],
            (long long)index[3], got[at], worst_want, bound[at], fabs(got[at] - worst_want));
    }
    free(got);
    free(exact);
    free(bound);
}

/* An output of the first run against the one that the image holds now. */
static void compare_runs_of(struct verdict *v, const struct tensor *now, const struct tensor *first,
                            enum slot slot, int32_t threads) {
    double *const x = tensor_values(first), *const y = tensor_values(now);
    int64_t n = 0, index[4] = {0};
    const int64_t count = tensor_count(now);
    while (n < count && memcmp(&x[n], &y[n], sizeof x[n]) == 0)
        n++;
    if (n < count) {
        tensor_index(now, n, index);
        say(v, FAILED,
            "; %s[%lld, %lld, %lld, %lld] was %.9g, is %.9g in a second run with %d threads",
            slot_name(slot), (long long)index[0], (long long)index[1], (long long)index[2],
            (long long)index[3], x[n], y[n], threads);
    }
    free(x);
    free(y);
}

static void compare_runs(struct verdict *v, const struct call *c, const struct call *first,
                         int32_t threads) {
    for (enum slot slot = 0; slot < SLOTS; slot++) {
        if (c->has[slot] && call_writes(c, slot))
            compare_runs_of(v, &c->tensor[slot], &first->tensor[slot], slot, threads);
    }
}

/* Of a call in its images. */
static bool run_reference(struct verdict *v, const dlattn_api *api, struct call *c) {
    const struct subject reference = {.api = api};
    dlattn_sku sku;
    call_use_images(c);
    struct arguments a =
        arguments_of(c, c->made_from.features.backward ? "cpu_bwd_ref" : "cpu_fwd_ref", 0);
    int32_t status = query(api, c, &a, &sku);
    if (status == DLATTN_OK) {
        a.exec.workspace_bytes = sku.workspace_bytes + 64;
        a.exec.workspace = aligned_alloc(64, (a.exec.workspace_bytes + 63) / 64 * 64);
        status = launch(&reference, c, &a, false);
        free(a.exec.workspace);
    }
    if (status != DLATTN_OK)
        say(v, FAILED, "; the reference failed: %s", api->last_error());
    return status == DLATTN_OK;
}

static void compare_all(struct verdict *v, const struct call *c, const struct call *ref,
                        const struct call *bounds) {
    for (int slot = 0; slot < SLOTS; slot++) {
        if (c->has[slot] && call_writes(c, (enum slot)slot))
            compare(v, c, ref, bounds, (enum slot)slot);
    }
}

/* What a case must give, found once for all that are tested on it: the reference's results, and how far rows may be from them, which for
 * weights of e4m3 is further. In f64, where no reference is better than another, the plain loops confirm it. */
struct truth {
    struct call ref, plain, bounds[2];
    bool has_ref, has_plain, has_bounds[2];
    struct verdict reference; /* FAILED if there is none */
};

static void find_truth(struct truth *t, const dlattn_api *api, const struct call *made) {
    const bool backward = made->made_from.features.backward;
    call_upcast(&t->ref, made);
    run_reference(&t->reference, api, &t->ref);
    if (made->made_from.element == F64 && !backward) {
        call_upcast(&t->plain, made);
        plain_forward(&t->plain);
        t->has_plain = true;
    }
    t->has_ref = true;
}

static const struct call *bounds_of(struct truth *t, const struct call *made, bool e4m3) {
    struct call *const bounds = &t->bounds[e4m3];
    if (t->has_bounds[e4m3])
        return bounds;
    call_upcast(bounds, made);
    bounds->has_e4m3_weights = e4m3;
    if (made->made_from.features.backward) {
        if (!t->has_plain)
            call_upcast(&t->plain, made);
        plain_gradients(&t->plain, bounds);
        t->has_plain = true;
    } else {
        plain_bounds(bounds);
    }
    t->has_bounds[e4m3] = true;
    return bounds;
}

static void free_truth(struct truth *t) {
    if (t->has_ref)
        call_free(&t->ref);
    if (t->has_plain)
        call_free(&t->plain);
    for (int i = 0; i < 2; i++)
        if (t->has_bounds[i])
            call_free(&t->bounds[i]);
}

/* What no row writes is in the reference's tensors as the first row's run left it. */
static void compare_with_truth(struct verdict *v, const dlattn_api *api, const struct call *c,
                               struct truth *t) {
    if (!t->has_ref)
        find_truth(t, api, c);
    if (t->reference.outcome == FAILED) {
        say(v, FAILED, "%s", t->reference.text);
        return;
    }
    const struct call *const bounds = bounds_of(t, c, strcmp(v->sku.math, "e4m3") == 0);
    compare_all(v, c, &t->ref, bounds);
    if (c->made_from.element == F64)
        compare_all(v, &t->plain, &t->ref, bounds);
}

/* What forward makes of the others, rounded once, is an input of backward. */
static bool run_forward(struct verdict *v, const dlattn_api *api, struct call *c) {
    c->made_from.features.backward = false;
    const bool good = run_reference(v, api, c);
    c->made_from.features.backward = true;
    return good;
}

static void check_one(struct verdict *v, const struct subject *subject,
                      const struct test_case *which, const struct call *made, struct truth *truth) {
    struct call first, second;
    struct run one = {.fill = GAP_FILL, .side = which->seed & 1 ? AT_END : AT_BEGIN};
    struct run two = {.fill = 0x5a,
                      .side = which->seed & 1 ? AT_BEGIN : AT_END,
                      .threads = 1 + which->seed % 3,
                      .planned = true};
    snprintf(running, sizeof running, "%s %s", subject->kernel ? subject->kernel : "", v->text);
    call_copy(&first, made);
    run_subject(v, subject, &first, &one);
    if (v->outcome == PASSED) {
        const char *const row = v->sku.kernel;
        call_copy(&second, made);
        run_subject(v, subject, &second, &two);
        /* The library may choose by alignment, which depends on the side. */
        if (v->outcome == PASSED && v->sku.bit_stable && strcmp(v->sku.kernel, row) == 0)
            compare_runs(v, &second, &first, two.threads);
        call_free(&second);
        compare_with_truth(v, subject->api, &first, truth);
    }
    call_free(&first);
}

void check_subjects(struct verdict *v, const struct subject *subjects, int count,
                    const struct test_case *which) {
    struct truth truth = {.has_ref = false};
    struct call made;
    call_make(&made, which);
    report_crashes();
    for (int i = 0; i < count; i++) {
        v[i] = (struct verdict){.outcome = PASSED};
        case_print(which, v[i].text, sizeof v[i].text);
    }
    const bool good = !which->features.backward || run_forward(v, subjects->api, &made);
    for (int i = 0; i < count && good; i++)
        check_one(&v[i], &subjects[i], which, &made, &truth);
    for (int i = 1; i < count && !good; i++)
        v[i] = v[0];
    free_truth(&truth);
    call_free(&made);
}

void check_case(struct verdict *v, const struct subject *subject, const struct test_case *which) {
    check_subjects(v, subject, 1, which);
}
