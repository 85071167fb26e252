#include <criterion/criterion.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
typedef const void *(*get_t)(uint32_t);
static get_t get(void) {
    void *h = dlopen("./libdlattn.so.1", RTLD_NOW | RTLD_LOCAL);
    cr_assert_not_null(h, "%s", dlerror());
    get_t f;
    *(void **)&f = dlsym(h, "dlattn_get_api");
    cr_assert_not_null(*(void **)&f);
    return f;
}
static get_t shared;
static void *body(void *arg) { (void)arg; for (int i = 0; i < 1000; i++) shared(8); return NULL; }
Test(open, works) { cr_assert_not_null(get()(1)); }
Test(open, refuses) { cr_assert_null(get()(2)); }
Test(open, overflow) { if (getenv("BREAK")) cr_assert_not_null(get()(7)); }
Test(open, leak) { if (getenv("BREAK")) { char *volatile p = malloc(100); p = NULL; (void)p; } }
Test(open, race) { shared = get(); pthread_t t[2]; for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, body, NULL); for (int i = 0; i < 2; i++) pthread_join(t[i], NULL); }
Test(open, skipped) { cr_skip_test("no GPU"); }
