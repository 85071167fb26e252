/*
 * A main for Criterion's tests under ThreadSanitizer. Criterion's own runner maps shared memory at
 * random fixed addresses, most of which ThreadSanitizer keeps for itself, so there it dies before
 * the first test. This one forks for each test and reports in Criterion's words. The functions of
 * that library defined here are those through which a test talks to its runner.
 */
#include <criterion/criterion.h>
#include <criterion/event.h>
#include <criterion/parameterized.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SKIPPED = 77 };

#define EXPORTED __attribute__((visibility("default")))
#define PRINTF __attribute__((format(printf, 1, 2)))

extern struct criterion_test *__start_cr_tst[], *__stop_cr_tst[];
extern struct criterion_suite *__start_cr_sts[] __attribute__((weak)),
    *__stop_cr_sts[] __attribute__((weak));

/* The test of this process. */
static const struct criterion_test *test;
static void *parameter;
static bool failed;

static struct {
    int passing, failing, crashing; /* a crash is a failure too */
} total;

static const struct criterion_test_extra_data *suite_of_test(void) {
    for (struct criterion_suite **s = __start_cr_sts; s != __stop_cr_sts; s++)
        if (!strcmp((*s)->name, test->category))
            return (*s)->data;
    return NULL;
}

EXPORTED void criterion_internal_test_setup(void) {
    const struct criterion_test_extra_data *suite = suite_of_test();
    if (suite && suite->init)
        suite->init();
    if (test->data->init)
        test->data->init();
}

EXPORTED void criterion_internal_test_main(void (*body)(void)) {
    if (parameter)
        ((void (*)(void *))(void *)body)(parameter);
    else
        body();
}

EXPORTED void criterion_internal_test_teardown(void) {
    const struct criterion_test_extra_data *suite = suite_of_test();
    if (test->data->fini)
        test->data->fini();
    if (suite && suite->fini)
        suite->fini();
}

EXPORTED void criterion_send_assert(struct criterion_assert_stats *assertion) {
    if (assertion->passed)
        return;
    failed = true;
    printf("[----] %s:%u: Assertion Failed\n[----]   %s\n", assertion->file, assertion->line,
           assertion->message);
}

EXPORTED void criterion_continue_test(void) {}

EXPORTED void criterion_abort_test(void) { exit(EXIT_FAILURE); }

EXPORTED PRINTF void criterion_test_die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    exit(EXIT_FAILURE);
}

EXPORTED PRINTF void criterion_skip_test(const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("[SKIP] %s::%s: ", test->category, test->name);
    vprintf(format, args);
    putchar('\n');
    va_end(args);
    exit(SKIPPED);
}

static void run(void *param) {
    printf("[RUN ] %s::%s\n", test->category, test->name);
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        parameter = param;
        test->test();
        exit(failed ? EXIT_FAILURE : EXIT_SUCCESS);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0)
        abort();
    const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    if (code == SKIPPED)
        return;
    const bool good = signal == test->data->signal && code == test->data->exit_code;
    total.passing += good;
    total.failing += !good;
    total.crashing += !good && signal;
    printf("[%s] %s::%s: signal %d, exit code %d\n", good ? "PASS" : "FAIL", test->category,
           test->name, signal, code);
}

int main(void) {
    for (struct criterion_test **t = __start_cr_tst; t != __stop_cr_tst; t++) {
        if (!*t)
            continue;
        test = *t;
        if (test->data->disabled) {
            printf("[SKIP] %s::%s: disabled\n", test->category, test->name);
        } else if (test->data->kind_ == CR_TEST_PARAMETERIZED) {
            const struct criterion_test_params params = test->data->param_();
            for (size_t i = 0; i < params.length; i++)
                run((char *)params.params + i * params.size);
        } else {
            run(NULL);
        }
    }
    printf("[====] Synthesis: Tested: %d | Passing: %d | Failing: %d | Crashing: %d\n",
           total.passing + total.failing, total.passing, total.failing, total.crashing);
    return total.failing != 0;
}
