/*
 * Every function of the C library with arguments as they should be, and then with each of them
 * wrong in every way: null, misaligned, overlapping, zero, huge, no such number, no such size of a
 * struct. What is refused must say why and leave all outputs as they were. .ci/capi compiles and
 * runs it, under AddressSanitizer and UBSan, and under valgrind.
 *
 *     capi cpu     a library without CUDA: the _cuda functions say so
 *     capi cuda    one with CUDA, on a machine without a device: they say so
 *     capi simt    one with the stand-in for tests: they run, on the process's memory
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ppo_kernels.h"

enum { ROWS = 3, VOCAB = 40, BATCH = 2, SEQ_LEN = 6, TOKENS = BATCH * SEQ_LEN };

static int checks, failures;
static const char *device;

#define CHECK(condition, ...)                              \
    do {                                                   \
        checks++;                                          \
        if (!(condition)) {                                \
            failures++;                                    \
            printf("%s:%d: ", __FILE__, __LINE__);         \
            printf(__VA_ARGS__);                           \
            printf(" [%s]\n", ppok_last_error());          \
        }                                                  \
    } while (0)

/* One argument of the function under test: where it is kept, and what is known of it. */
typedef struct {
    const char *name;
    void **at;
    size_t bytes; /* of the memory it leads to */
    size_t align;
    enum { NEEDED, OPTIONAL, PAIRED } null;
    enum { READ, WRITTEN } use;
} pointer;

typedef struct {
    const char *name;
    size_t *at;
    int32_t status_of_zero;
} size;

typedef struct {
    const char *name;
    int32_t *at;
    int32_t most;
    int32_t status;
} number;

typedef struct {
    const char *name;
    double *at;
    double wrong;
    int unbounded; /* above */
} option;

/* A struct that begins with its size. */
typedef struct {
    const char *name;
    void **at;
    size_t bytes;
} growing;

enum { MOST = 24 };

typedef struct {
    const char *name;
    int32_t (*run)(void);
    pointer pointers[MOST];
    size sizes[MOST];
    number numbers[MOST];
    option options[MOST];
    growing structs[MOST];
} function;

static void *allocated[256];
static size_t allocations;

/* Memory that ends where it ends, so that who goes on is seen. */
static void *memory(size_t bytes) {
    unsigned char *p = malloc(bytes);
    if (!p || allocations == sizeof allocated / sizeof *allocated) abort();
    allocated[allocations++] = p;
    memset(p, 0x5a, bytes);
    return p;
}

static void free_all(void) {
    while (allocations > 0) free(allocated[--allocations]);
}

static void *floats(size_t count, float first, float step) {
    float *p = memory(count * sizeof *p);
    for (size_t i = 0; i < count; i++) p[i] = first + step * (float)((i * 7) % 11);
    return p;
}

/* Runs the function with something wrong, which it must refuse without writing anything. */
static void refuses(const function *f, const char *what, const char *how, int32_t expected) {
    unsigned char *before[MOST] = {0};
    for (int i = 0; i < MOST && f->pointers[i].name; i++) {
        const pointer *p = &f->pointers[i];
        /* Only where the pointer still leads to memory of its own. */
        if (p->use == WRITTEN && strcmp(what, p->name) != 0) {
            before[i] = malloc(p->bytes);
            memcpy(before[i], *p->at, p->bytes);
        }
    }
    int32_t status = f->run();
    CHECK(status == expected, "%s(%s %s): %s, expected %s", f->name, what, how,
          ppok_status_string(status), ppok_status_string(expected));
    CHECK(strlen(ppok_last_error()) > 10, "%s(%s %s): no message", f->name, what, how);
    for (int i = 0; i < MOST && f->pointers[i].name; i++) {
        if (!before[i]) continue;
        const pointer *p = &f->pointers[i];
        CHECK(memcmp(before[i], *p->at, p->bytes) == 0, "%s(%s %s): `%s` was written", f->name,
              what, how, p->name);
        free(before[i]);
    }
}

static void accepts(const function *f, const char *what, const char *how) {
    int32_t status = f->run();
    CHECK(status == PPOK_STATUS_OK, "%s(%s %s): %s", f->name, what, how,
          ppok_status_string(status));
}

static void check_pointers(const function *f) {
    for (int i = 0; i < MOST && f->pointers[i].name; i++) {
        const pointer *p = &f->pointers[i];
        void *right = *p->at;
        *p->at = NULL;
        if (p->null == OPTIONAL) accepts(f, p->name, "null");
        else refuses(f, p->name, "null", PPOK_STATUS_NULL_POINTER);
        if (p->align > 1) {
            *p->at = (char *)right + 1;
            refuses(f, p->name, "misaligned", PPOK_STATUS_MISALIGNED);
            *p->at = (void *)(SIZE_MAX - p->align + 1);
            if (p->bytes > p->align) refuses(f, p->name, "at the end of memory", PPOK_STATUS_SHAPE);
        }
        if (p->use == WRITTEN) {
            for (int j = 0; j < MOST && f->pointers[j].name; j++) {
                const pointer *other = &f->pointers[j];
                if (i == j || other->bytes <= p->align) continue;
                /* Shifted, so that it is not in place. */
                *p->at = (char *)*other->at + p->align;
                refuses(f, p->name, other->name, PPOK_STATUS_OVERLAP);
            }
        }
        *p->at = right;
    }
}

/* Where the last arguments of the _cuda functions are kept. */
static void *workspace;
static size_t workspace_size;
static void *stream;
static size_t needed;

static void check_sizes(const function *f) {
    for (int i = 0; i < MOST && f->sizes[i].name; i++) {
        const size *s = &f->sizes[i];
        size_t right = *s->at;
        *s->at = 0;
        if (s->status_of_zero == PPOK_STATUS_OK) accepts(f, s->name, "zero");
        else refuses(f, s->name, "zero", s->status_of_zero);
        const size_t huge[] = {SIZE_MAX, SIZE_MAX - 1, SIZE_MAX / 2, SIZE_MAX / 2 + 1,
                               SIZE_MAX / 3};
        for (size_t j = 0; j < sizeof huge / sizeof *huge; j++) {
            *s->at = huge[j];
            refuses(f, s->name, "huge", PPOK_STATUS_SHAPE);
        }
        *s->at = right;
    }
}

static void check_values(const function *f) {
    for (int i = 0; i < MOST && f->numbers[i].name; i++) {
        const number *n = &f->numbers[i];
        int32_t right = *n->at;
        const int32_t wrong[] = {-1, n->most + 1, INT32_MIN, INT32_MAX};
        for (size_t j = 0; j < sizeof wrong / sizeof *wrong; j++) {
            *n->at = wrong[j];
            refuses(f, n->name, "no such number", n->status);
        }
        *n->at = right;
    }
    for (int i = 0; i < MOST && f->options[i].name; i++) {
        const option *o = &f->options[i];
        double right = *o->at;
        const double wrong[] = {o->wrong, NAN, INFINITY, -INFINITY, 1e300};
        for (size_t j = 0; j < sizeof wrong / sizeof *wrong; j++) {
            if (o->unbounded && wrong[j] > 0.0) continue;
            *o->at = wrong[j];
            refuses(f, o->name, "out of range", PPOK_STATUS_OPTION);
        }
        *o->at = right;
    }
}

/* Of scores, which may have any but those that leave nothing between them. */
static void check_score_bounds(const function *f, double *min, double *max) {
    *min = INFINITY;
    refuses(f, "score_min", "infinite", PPOK_STATUS_OPTION);
    *min = 2.0;
    *max = 1.0;
    refuses(f, "score_max", "below score_min", PPOK_STATUS_OPTION);
    *max = NAN;
    refuses(f, "score_max", "not a number", PPOK_STATUS_OPTION);
    *max = INFINITY;
    accepts(f, "score_max", "infinite");
    *min = -INFINITY;
}

static void check_structs(const function *f) {
    for (int i = 0; i < MOST && f->structs[i].name; i++) {
        const growing *g = &f->structs[i];
        void *right = *g->at;
        unsigned char *copy = calloc(1, 8192);
        *g->at = copy;
        memcpy(copy, right, g->bytes);
        const size_t wrong[] = {0, 1, sizeof(size_t), g->bytes - 1, 4097, SIZE_MAX};
        for (size_t j = 0; j < sizeof wrong / sizeof *wrong; j++) {
            memcpy(copy, &wrong[j], sizeof(size_t));
            refuses(f, g->name, "of a wrong size", PPOK_STATUS_STRUCT_SIZE);
        }
        /* Of a later version, which may not ask for what this one does not know. */
        size_t later = g->bytes + 24;
        memcpy(copy, &later, sizeof later);
        accepts(f, g->name, "of a later version");
        copy[g->bytes + 9] = 1;
        refuses(f, g->name, "with unknown fields", PPOK_STATUS_STRUCT_SIZE);
        *g->at = (char *)right + 1;
        refuses(f, g->name, "misaligned", PPOK_STATUS_MISALIGNED);
        *g->at = right;
        free(copy);
    }
}

static void check(const function *f) {
    accepts(f, "all", "right");
    check_pointers(f);
    check_sizes(f);
    check_values(f);
    check_structs(f);
    accepts(f, "all", "right again");
}

/* A function of CUDA, and the one that says how much workspace it needs, which writes `needed`. */
static void check_cuda(function f, int32_t (*size_of_workspace)(void)) {
    if (strcmp(device, "simt") != 0) {
        const int32_t statuses[] = {f.run(), size_of_workspace()};
        for (int i = 0; i < 2; i++) {
            int32_t status = statuses[i];
            int without = status == PPOK_STATUS_UNSUPPORTED;
            int none = status == PPOK_STATUS_CUDA_DRIVER || status == PPOK_STATUS_CUDA_DEVICE;
            CHECK(strcmp(device, "cpu") == 0 ? without : none, "%s: %s", f.name,
                  ppok_status_string(status));
            CHECK(strlen(ppok_last_error()) > 10, "%s: no message", f.name);
        }
        return;
    }
    needed = 12345;
    CHECK(size_of_workspace() == PPOK_STATUS_OK, "%s: workspace", f.name);
    CHECK(needed < 12345, "%s: %zu bytes of workspace", f.name, needed);
    workspace_size = needed;
    workspace = needed > 0 ? memory(needed) : NULL;
    check(&f);
    if (needed > 0) {
        workspace_size = needed - 1;
        refuses(&f, "workspace_size", "too small", PPOK_STATUS_WORKSPACE);
        workspace_size = 0;
        refuses(&f, "workspace_size", "zero", PPOK_STATUS_WORKSPACE);
        workspace_size = needed;
        void *right = workspace;
        workspace = NULL;
        refuses(&f, "workspace", "null", PPOK_STATUS_NULL_POINTER);
        workspace = (char *)right + 8;
        refuses(&f, "workspace", "misaligned", PPOK_STATUS_MISALIGNED);
    }
    workspace = NULL;
    workspace_size = 0;
}

/* A query must not write to null. */
#define CHECK_QUERY(...)                                                                          \
    do {                                                                                          \
        if (strcmp(device, "simt") == 0)                                                          \
            CHECK((__VA_ARGS__) == PPOK_STATUS_NULL_POINTER, "%s to null", #__VA_ARGS__);         \
    } while (0)

/* logprob */

static struct {
    ppok_logprob_forward_args forward;
    ppok_logprob_backward_args backward;
    ppok_logprob_options settings;
    void *forward_args, *backward_args;
} lp;

static int32_t logprob_forward_cpu(void) { return ppok_logprob_forward_cpu(lp.forward_args); }

static int32_t logprob_forward_cuda(void) {
    return ppok_logprob_forward_cuda(lp.forward_args, workspace, workspace_size, stream);
}

static int32_t logprob_forward_workspace(void) {
    return ppok_logprob_forward_cuda_workspace_size(lp.forward_args, stream, &needed);
}

static int32_t logprob_backward_cpu(void) { return ppok_logprob_backward_cpu(lp.backward_args); }

static int32_t logprob_backward_cuda(void) {
    return ppok_logprob_backward_cuda(lp.backward_args, workspace, workspace_size, stream);
}

static int32_t logprob_backward_workspace(void) {
    return ppok_logprob_backward_cuda_workspace_size(lp.backward_args, stream, &needed);
}

#define LOGPROB_POINTERS(args)                                                   \
    {"logits", (void **)&(args).logits, ROWS * VOCAB * 4, 4, NEEDED, READ},      \
    {"targets", (void **)&(args).targets, ROWS * 8, 8, NEEDED, READ}
#define LOGPROB_REST(args, address)                                                             \
    .sizes = {{"rows", &(args).rows, PPOK_STATUS_OK}, {"vocab", &(args).vocab, PPOK_STATUS_SHAPE}}, \
    .numbers = {{"logits_type", &(args).logits_type, PPOK_BF16, PPOK_STATUS_DTYPE},             \
                {"targets_type", &(args).targets_type, PPOK_I64, PPOK_STATUS_DTYPE},            \
                {"has_ignore_index", &lp.settings.has_ignore_index, 1, PPOK_STATUS_OPTION},     \
                {"reserved", &lp.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},               \
    .options = {{"temperature", &lp.settings.temperature, 0.0}},                                \
    .structs = {{"args", &(address), sizeof(args)},                                             \
                {"options", (void **)&(args).options, sizeof lp.settings}}

static void check_logprob(void) {
    int64_t *targets = memory(ROWS * sizeof *targets);
    for (int i = 0; i < ROWS; i++) targets[i] = 7 * i;
    CHECK(ppok_logprob_options_init(&lp.settings, sizeof lp.settings) == PPOK_STATUS_OK, "init");
    lp.forward = (ppok_logprob_forward_args){
        .struct_size = sizeof lp.forward,
        .rows = ROWS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .targets_type = PPOK_I64,
        .logits = floats(ROWS * VOCAB, -3.0f, 0.5f),
        .targets = targets,
        .options = &lp.settings,
        .logp = memory(ROWS * 4),
        .entropy = memory(ROWS * 4),
        .max = memory(ROWS * 4),
        .log_sum = memory(ROWS * 4),
    };
    lp.forward_args = &lp.forward;
    function forward = {
        .name = "ppok_logprob_forward_cpu",
        .run = logprob_forward_cpu,
        .pointers = {LOGPROB_POINTERS(lp.forward),
                     {"logp", (void **)&lp.forward.logp, ROWS * 4, 4, NEEDED, WRITTEN},
                     {"entropy", (void **)&lp.forward.entropy, ROWS * 4, 4, OPTIONAL, WRITTEN},
                     {"max", (void **)&lp.forward.max, ROWS * 4, 4, PAIRED, WRITTEN},
                     {"log_sum", (void **)&lp.forward.log_sum, ROWS * 4, 4, PAIRED, WRITTEN}},
        LOGPROB_REST(lp.forward, lp.forward_args),
    };
    check(&forward);

    targets[1] = VOCAB;
    refuses(&forward, "targets", "outside", PPOK_STATUS_TARGET);
    targets[1] = -100;
    refuses(&forward, "targets", "negative", PPOK_STATUS_TARGET);
    lp.settings.has_ignore_index = 1;
    lp.settings.ignore_index = -100;
    accepts(&forward, "targets", "ignored");
    CHECK(lp.forward.logp[1] == 0.0f, "an ignored row");
    targets[1] = 7;
    lp.forward.options = NULL;
    accepts(&forward, "options", "null");
    lp.forward.options = &lp.settings;
    lp.forward_args = NULL;
    refuses(&forward, "args", "null", PPOK_STATUS_NULL_POINTER);
    lp.forward_args = &lp.forward;

    lp.backward = (ppok_logprob_backward_args){
        .struct_size = sizeof lp.backward,
        .rows = ROWS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .targets_type = PPOK_I64,
        .logits = lp.forward.logits,
        .targets = targets,
        .max = lp.forward.max,
        .log_sum = lp.forward.log_sum,
        .entropy = lp.forward.entropy,
        .grad_logp = floats(ROWS, 0.5f, 0.1f),
        .grad_entropy = floats(ROWS, -0.5f, 0.1f),
        .options = &lp.settings,
        .grad_logits = memory(ROWS * VOCAB * 4),
    };
    lp.backward_args = &lp.backward;
    function backward = {
        .name = "ppok_logprob_backward_cpu",
        .run = logprob_backward_cpu,
        .pointers = {LOGPROB_POINTERS(lp.backward),
                     {"max", (void **)&lp.backward.max, ROWS * 4, 4, NEEDED, READ},
                     {"log_sum", (void **)&lp.backward.log_sum, ROWS * 4, 4, NEEDED, READ},
                     {"entropy", (void **)&lp.backward.entropy, ROWS * 4, 4, NEEDED, READ},
                     {"grad_logp", (void **)&lp.backward.grad_logp, ROWS * 4, 4, OPTIONAL, READ},
                     {"grad_entropy", (void **)&lp.backward.grad_entropy, ROWS * 4, 4, OPTIONAL,
                      READ},
                     {"grad_logits", (void **)&lp.backward.grad_logits, ROWS * VOCAB * 4, 4, NEEDED,
                      WRITTEN}},
        LOGPROB_REST(lp.backward, lp.backward_args),
    };
    check(&backward);
    const float *entropy = lp.backward.entropy, *grad_entropy = lp.backward.grad_entropy;
    lp.backward.entropy = lp.backward.grad_entropy = NULL;
    accepts(&backward, "entropy and grad_entropy", "null");
    lp.backward.entropy = entropy;
    lp.backward.grad_entropy = grad_entropy;

    forward.name = "ppok_logprob_forward_cuda";
    forward.run = logprob_forward_cuda;
    check_cuda(forward, logprob_forward_workspace);
    CHECK_QUERY(ppok_logprob_forward_cuda_workspace_size(&lp.forward, stream, NULL));
    backward.name = "ppok_logprob_backward_cuda";
    backward.run = logprob_backward_cuda;
    check_cuda(backward, logprob_backward_workspace);
    CHECK_QUERY(ppok_logprob_backward_cuda_workspace_size(&lp.backward, stream, NULL));

    free_all();
}

/* kl */

static struct {
    ppok_kl_token_forward_args forward;
    ppok_kl_token_backward_args backward;
    ppok_kl_token_options settings;
    void *forward_args, *backward_args;
} kt;

static int32_t kl_token_forward_cpu(void) { return ppok_kl_token_forward_cpu(kt.forward_args); }

static int32_t kl_token_forward_cuda(void) {
    return ppok_kl_token_forward_cuda(kt.forward_args, workspace, workspace_size, stream);
}

static int32_t kl_token_forward_workspace(void) {
    return ppok_kl_token_forward_cuda_workspace_size(kt.forward_args, stream, &needed);
}

static int32_t kl_token_backward_cpu(void) { return ppok_kl_token_backward_cpu(kt.backward_args); }

static int32_t kl_token_backward_cuda(void) {
    return ppok_kl_token_backward_cuda(kt.backward_args, workspace, workspace_size, stream);
}

static int32_t kl_token_backward_workspace(void) {
    return ppok_kl_token_backward_cuda_workspace_size(kt.backward_args, stream, &needed);
}

#define KL_TOKEN_POINTERS(args)                                             \
    {"logp", (void **)&(args).logp, TOKENS * 4, 4, NEEDED, READ},           \
    {"ref_logp", (void **)&(args).ref_logp, TOKENS * 4, 4, NEEDED, READ},   \
    {"mask", (void **)&(args).mask, TOKENS, 1, OPTIONAL, READ}
#define KL_TOKEN_REST(args, address)                                                         \
    .sizes = {{"tokens", &(args).tokens, PPOK_STATUS_OK}},                                   \
    .numbers = {{"estimator", &kt.settings.estimator, PPOK_KL_K3_STRAIGHT_THROUGH,           \
                 PPOK_STATUS_OPTION},                                                        \
                {"reserved", &kt.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},            \
    .options = {{"log_ratio_clamp", &kt.settings.log_ratio_clamp, 0.0},                      \
                {"output_clamp", &kt.settings.output_clamp, -2.0}},                          \
    .structs = {{"args", &(address), sizeof(args)},                                          \
                {"options", (void **)&(args).options, sizeof kt.settings}}

static void check_kl_token(void) {
    unsigned char *mask = memory(TOKENS);
    mask[3] = 0;
    CHECK(ppok_kl_token_options_init(&kt.settings, sizeof kt.settings) == PPOK_STATUS_OK, "init");
    CHECK(kt.settings.log_ratio_clamp == PPOK_NONE, "default");
    kt.forward = (ppok_kl_token_forward_args){
        .struct_size = sizeof kt.forward,
        .tokens = TOKENS,
        .logp = floats(TOKENS, -2.0f, 0.1f),
        .ref_logp = floats(TOKENS, -1.8f, 0.08f),
        .mask = mask,
        .options = &kt.settings,
        .kl = memory(TOKENS * 4),
    };
    kt.forward_args = &kt.forward;
    function forward = {
        .name = "ppok_kl_token_forward_cpu",
        .run = kl_token_forward_cpu,
        .pointers = {KL_TOKEN_POINTERS(kt.forward),
                     {"kl", (void **)&kt.forward.kl, TOKENS * 4, 4, NEEDED, WRITTEN}},
        KL_TOKEN_REST(kt.forward, kt.forward_args),
    };
    check(&forward);
    CHECK(kt.forward.kl[3] == 0.0f, "a masked token");

    kt.backward = (ppok_kl_token_backward_args){
        .struct_size = sizeof kt.backward,
        .tokens = TOKENS,
        .logp = kt.forward.logp,
        .ref_logp = kt.forward.ref_logp,
        .mask = mask,
        .grad_kl = floats(TOKENS, 1.0f, 0.1f),
        .options = &kt.settings,
        .grad_logp = memory(TOKENS * 4),
        .grad_ref_logp = memory(TOKENS * 4),
    };
    kt.backward_args = &kt.backward;
    function backward = {
        .name = "ppok_kl_token_backward_cpu",
        .run = kl_token_backward_cpu,
        .pointers = {KL_TOKEN_POINTERS(kt.backward),
                     {"grad_kl", (void **)&kt.backward.grad_kl, TOKENS * 4, 4, NEEDED, READ},
                     {"grad_logp", (void **)&kt.backward.grad_logp, TOKENS * 4, 4, OPTIONAL,
                      WRITTEN},
                     {"grad_ref_logp", (void **)&kt.backward.grad_ref_logp, TOKENS * 4, 4, OPTIONAL,
                      WRITTEN}},
        KL_TOKEN_REST(kt.backward, kt.backward_args),
    };
    check(&backward);

    forward.name = "ppok_kl_token_forward_cuda";
    forward.run = kl_token_forward_cuda;
    check_cuda(forward, kl_token_forward_workspace);
    CHECK_QUERY(ppok_kl_token_forward_cuda_workspace_size(&kt.forward, stream, NULL));
    backward.name = "ppok_kl_token_backward_cuda";
    backward.run = kl_token_backward_cuda;
    check_cuda(backward, kl_token_backward_workspace);
    CHECK_QUERY(ppok_kl_token_backward_cuda_workspace_size(&kt.backward, stream, NULL));

    free_all();
}

static struct {
    ppok_kl_full_forward_args forward;
    ppok_kl_full_backward_args backward;
    ppok_kl_full_options settings;
    void *forward_args, *backward_args;
} kf;

static int32_t kl_full_forward_cpu(void) { return ppok_kl_full_forward_cpu(kf.forward_args); }

static int32_t kl_full_forward_cuda(void) {
    return ppok_kl_full_forward_cuda(kf.forward_args, workspace, workspace_size, stream);
}

static int32_t kl_full_forward_workspace(void) {
    return ppok_kl_full_forward_cuda_workspace_size(kf.forward_args, stream, &needed);
}

static int32_t kl_full_backward_cpu(void) { return ppok_kl_full_backward_cpu(kf.backward_args); }

static int32_t kl_full_backward_cuda(void) {
    return ppok_kl_full_backward_cuda(kf.backward_args, workspace, workspace_size, stream);
}

static int32_t kl_full_backward_workspace(void) {
    return ppok_kl_full_backward_cuda_workspace_size(kf.backward_args, stream, &needed);
}

#define KL_FULL_POINTERS(args)                                                      \
    {"logits", (void **)&(args).logits, ROWS * VOCAB * 4, 4, NEEDED, READ},         \
    {"ref_logits", (void **)&(args).ref_logits, ROWS * VOCAB * 4, 4, NEEDED, READ}, \
    {"mask", (void **)&(args).mask, ROWS, 1, OPTIONAL, READ}
#define KL_FULL_REST(args, address)                                                         \
    .sizes = {{"rows", &(args).rows, PPOK_STATUS_OK}, {"vocab", &(args).vocab, PPOK_STATUS_SHAPE}}, \
    .numbers = {{"logits_type", &(args).logits_type, PPOK_BF16, PPOK_STATUS_DTYPE},         \
                {"reserved", &(args).reserved, 0, PPOK_STATUS_STRUCT_SIZE},                 \
                {"divergence", &kf.settings.divergence, PPOK_KL_TOTAL_VARIATION, PPOK_STATUS_OPTION}, \
                {"reserved", &kf.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},           \
    .options = {{"temperature", &kf.settings.temperature, -1.0},                            \
                {"beta", &kf.settings.beta, 1.0},                                           \
                {"skew", &kf.settings.skew, 0.0}},                                          \
    .structs = {{"args", &(address), sizeof(args)},                                         \
                {"options", (void **)&(args).options, sizeof kf.settings}}

static void check_kl_full(void) {
    unsigned char *mask = memory(ROWS);
    mask[1] = 0;
    CHECK(ppok_kl_full_options_init(&kf.settings, sizeof kf.settings) == PPOK_STATUS_OK, "init");
    kf.forward = (ppok_kl_full_forward_args){
        .struct_size = sizeof kf.forward,
        .rows = ROWS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .logits = floats(ROWS * VOCAB, -2.0f, 0.4f),
        .ref_logits = floats(ROWS * VOCAB, 1.0f, -0.3f),
        .mask = mask,
        .options = &kf.settings,
        .stats = memory(PPOK_KL_FULL_STATS * ROWS * 4),
    };
    kf.forward_args = &kf.forward;
    function forward = {
        .name = "ppok_kl_full_forward_cpu",
        .run = kl_full_forward_cpu,
        .pointers = {KL_FULL_POINTERS(kf.forward),
                     {"stats", (void **)&kf.forward.stats, PPOK_KL_FULL_STATS * ROWS * 4, 4, NEEDED,
                      WRITTEN}},
        KL_FULL_REST(kf.forward, kf.forward_args),
    };
    check(&forward);
    CHECK(kf.forward.stats[1] == 0.0f && kf.forward.stats[0] > 0.0f, "KL of the rows");

    kf.backward = (ppok_kl_full_backward_args){
        .struct_size = sizeof kf.backward,
        .rows = ROWS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .logits = kf.forward.logits,
        .ref_logits = kf.forward.ref_logits,
        .mask = mask,
        .stats = kf.forward.stats,
        .grad_kl = floats(ROWS, 1.0f, 0.1f),
        .options = &kf.settings,
        .grad_logits = memory(ROWS * VOCAB * 4),
        .grad_ref_logits = memory(ROWS * VOCAB * 4),
    };
    kf.backward_args = &kf.backward;
    function backward = {
        .name = "ppok_kl_full_backward_cpu",
        .run = kl_full_backward_cpu,
        .pointers = {KL_FULL_POINTERS(kf.backward),
                     {"stats", (void **)&kf.backward.stats, PPOK_KL_FULL_STATS * ROWS * 4, 4,
                      NEEDED, READ},
                     {"grad_kl", (void **)&kf.backward.grad_kl, ROWS * 4, 4, NEEDED, READ},
                     {"grad_logits", (void **)&kf.backward.grad_logits, ROWS * VOCAB * 4, 4,
                      OPTIONAL, WRITTEN},
                     {"grad_ref_logits", (void **)&kf.backward.grad_ref_logits, ROWS * VOCAB * 4, 4,
                      OPTIONAL, WRITTEN}},
        KL_FULL_REST(kf.backward, kf.backward_args),
    };
    check(&backward);

    forward.name = "ppok_kl_full_forward_cuda";
    forward.run = kl_full_forward_cuda;
    check_cuda(forward, kl_full_forward_workspace);
    CHECK_QUERY(ppok_kl_full_forward_cuda_workspace_size(&kf.forward, stream, NULL));
    backward.name = "ppok_kl_full_backward_cuda";
    backward.run = kl_full_backward_cuda;
    check_cuda(backward, kl_full_backward_workspace);
    CHECK_QUERY(ppok_kl_full_backward_cuda_workspace_size(&kf.backward, stream, NULL));

    free_all();
}

/* gae */

static void *gae_args;
static ppok_gae_args ga;
static ppok_gae_options gae_options;

static int32_t gae_cpu(void) { return ppok_gae_cpu(gae_args); }

static int32_t gae_cuda(void) {
    return ppok_gae_cuda(gae_args, workspace, workspace_size, stream);
}

static int32_t gae_workspace(void) {
    return ppok_gae_cuda_workspace_size(gae_args, stream, &needed);
}

static void check_gae(void) {
    ga = (ppok_gae_args){.struct_size = sizeof ga, .batch = BATCH, .seq_len = SEQ_LEN};
    unsigned char *has_eos = memory(BATCH), *mask = memory(TOKENS), *dones = memory(TOKENS);
    has_eos[1] = 0;
    mask[0] = 0;
    memset(dones, 0, TOKENS);
    dones[4] = 1;
    ga.values = floats(TOKENS, 0.1f, 0.05f);
    ga.rewards = floats(TOKENS, 0.0f, 0.02f);
    ga.kl = floats(TOKENS, 0.0f, 0.01f);
    ga.scores = floats(BATCH, 1.0f, 0.3f);
    ga.has_eos = has_eos;
    ga.mask = mask;
    ga.dones = dones;
    ga.bootstrap = floats(BATCH, 0.2f, 0.1f);
    ga.lambda_per_row = floats(BATCH, 0.5f, 0.01f);
    ga.advantages = memory(TOKENS * 4);
    ga.returns = memory(TOKENS * 4);
    ga.shaped_rewards = memory(TOKENS * 4);
    ga.moments = memory(sizeof *ga.moments);
    CHECK(ppok_gae_options_init(&gae_options, sizeof gae_options) == PPOK_STATUS_OK, "init");
    ga.options = &gae_options;
    gae_args = &ga;
    function f = {
        .name = "ppok_gae_cpu",
        .run = gae_cpu,
        .pointers = {{"values", (void **)&ga.values, TOKENS * 4, 4, NEEDED, READ},
                     {"rewards", (void **)&ga.rewards, TOKENS * 4, 4, OPTIONAL, READ},
                     {"kl", (void **)&ga.kl, TOKENS * 4, 4, OPTIONAL, READ},
                     {"scores", (void **)&ga.scores, BATCH * 4, 4, OPTIONAL, READ},
                     {"has_eos", (void **)&ga.has_eos, BATCH, 1, OPTIONAL, READ},
                     {"mask", (void **)&ga.mask, TOKENS, 1, OPTIONAL, READ},
                     {"dones", (void **)&ga.dones, TOKENS, 1, OPTIONAL, READ},
                     {"bootstrap", (void **)&ga.bootstrap, BATCH * 4, 4, OPTIONAL, READ},
                     {"lambda_per_row", (void **)&ga.lambda_per_row, BATCH * 4, 4, OPTIONAL, READ},
                     {"advantages", (void **)&ga.advantages, TOKENS * 4, 4, NEEDED, WRITTEN},
                     {"returns", (void **)&ga.returns, TOKENS * 4, 4, NEEDED, WRITTEN},
                     {"shaped_rewards", (void **)&ga.shaped_rewards, TOKENS * 4, 4, OPTIONAL, WRITTEN},
                     {"moments", (void **)&ga.moments, sizeof(ppok_moments), 8, OPTIONAL,
                      WRITTEN}},
        .sizes = {{"batch", &ga.batch, PPOK_STATUS_OK}, {"seq_len", &ga.seq_len, PPOK_STATUS_OK}},
        .numbers = {{"mask_mode", &gae_options.mask_mode, 1, PPOK_STATUS_OPTION},
                    {"score_placement", &gae_options.score_placement, 1, PPOK_STATUS_OPTION},
                    {"score_order", &gae_options.score_order, 1, PPOK_STATUS_OPTION},
                    {"missing_eos", &gae_options.missing_eos, 2, PPOK_STATUS_OPTION}},
        .options = {{"gamma", &gae_options.gamma, 1.5},
                    {"lambda", &gae_options.lambda, -1.0},
                    {"value_lambda", &gae_options.value_lambda, -0.5},
                    {"kl_coef", &gae_options.kl_coef, -1.0},
                    {"score_std", &gae_options.score_std, 0.0}},
        .structs = {{"args", &gae_args, sizeof ga},
                    {"options", (void **)&ga.options, sizeof gae_options}},
    };
    check(&f);
    check_score_bounds(&f, &gae_options.score_min, &gae_options.score_max);
    CHECK(ga.moments->count == TOKENS - 1, "moments of %g", ga.moments->count);
    CHECK(ga.advantages[0] == 0.0f && ga.returns[0] == 0.0f, "a masked token");

    gae_options.missing_eos = PPOK_GAE_MISSING_EOS_SUBTRACT;
    gae_options.missing_eos_value = 1.0;
    accepts(&f, "missing_eos", "with scores");
    ga.scores = NULL;
    refuses(&f, "missing_eos", "without scores", PPOK_STATUS_OPTION);
    ga.scores = floats(BATCH, 1.0f, 0.3f);
    gae_options.missing_eos = PPOK_GAE_MISSING_EOS_KEEP;
    /* A pack of as many tokens. */
    long long *offsets = memory((BATCH + 1) * sizeof *offsets);
    for (int row = 0; row <= BATCH; row++) offsets[row] = row * SEQ_LEN;
    offsets[1]--;
    ga.offsets = (const int64_t *)offsets;
    ga.seq_len = TOKENS;
    accepts(&f, "offsets", "of a pack");
    offsets[BATCH]++;
    refuses(&f, "offsets", "past the tokens", PPOK_STATUS_OPTION);
    ga.offsets = NULL;
    ga.seq_len = SEQ_LEN;
    gae_args = NULL;
    refuses(&f, "args", "null", PPOK_STATUS_NULL_POINTER);
    gae_args = &ga;

    f.name = "ppok_gae_cuda";
    f.run = gae_cuda;
    check_cuda(f, gae_workspace);
    CHECK_QUERY(ppok_gae_cuda_workspace_size(gae_args, stream, NULL));
    free_all();
}

/* The functions of a pass, with the arguments that `at` leads to. */
#define PASS(name, at)                                                                            \
    static int32_t name##_cpu(void) { return ppok_##name##_cpu(at); }                             \
    static int32_t name##_cuda(void) {                                                            \
        return ppok_##name##_cuda(at, workspace, workspace_size, stream);                         \
    }                                                                                             \
    static int32_t name##_workspace(void) {                                                       \
        return ppok_##name##_cuda_workspace_size(at, stream, &needed);                            \
    }

/* Without arguments there is nothing to do. */
static void refuses_no_args(const function *f, void **at) {
    void *right = *at;
    *at = NULL;
    refuses(f, "args", "null", PPOK_STATUS_NULL_POINTER);
    *at = right;
}

/* advantages */

static struct {
    ppok_advantages_args args;
    void *at; /* where those are */
    ppok_advantages_options settings;
} ad;

PASS(advantages, ad.at)

static void check_advantages(void) {
    unsigned char *mask = memory(TOKENS);
    mask[1] = 0;
    ppok_advantages_args *args = &ad.args;
    *args = (ppok_advantages_args){
        .struct_size = sizeof *args,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .group_size = BATCH,
        .scores = floats(BATCH, 1.0f, 0.5f),
        .lengths = floats(BATCH, 2.0f, 1.0f),
        .score_baselines = floats(BATCH, 0.1f, 0.0f),
        .mask = mask,
        .options = &ad.settings,
        .advantages = memory(BATCH * 4),
        .token_advantages = memory(TOKENS * 4),
        .stats = memory(sizeof *args->stats),
    };
    ad.at = args;
    CHECK(ppok_advantages_options_init(&ad.settings, sizeof ad.settings) == PPOK_STATUS_OK, "init");
    CHECK(ad.settings.score_min == -INFINITY && ad.settings.score_max == INFINITY, "default");
    function f = {
        .name = "ppok_advantages_cpu",
        .run = advantages_cpu,
        .pointers = {{"scores", (void **)&args->scores, BATCH * 4, 4, NEEDED, READ},
                     {"lengths", (void **)&args->lengths, BATCH * 4, 4, OPTIONAL, READ},
                     {"score_baselines", (void **)&args->score_baselines, BATCH * 4, 4, OPTIONAL,
                      READ},
                     {"mask", (void **)&args->mask, TOKENS, 1, OPTIONAL, READ},
                     {"advantages", (void **)&args->advantages, BATCH * 4, 4, NEEDED, WRITTEN},
                     {"token_advantages", (void **)&args->token_advantages, TOKENS * 4, 4, OPTIONAL,
                      WRITTEN},
                     {"stats", (void **)&args->stats, sizeof *args->stats, 8, OPTIONAL, WRITTEN}},
        .sizes = {{"batch", &args->batch, PPOK_STATUS_OK},
                  {"seq_len", &args->seq_len, PPOK_STATUS_OK},
                  {"group_size", &args->group_size, PPOK_STATUS_NULL_POINTER}},
        .numbers = {{"baseline", &ad.settings.baseline, 5, PPOK_STATUS_OPTION},
                    {"scale", &ad.settings.scale, 5, PPOK_STATUS_OPTION},
                    {"singleton", &ad.settings.singleton, 1, PPOK_STATUS_OPTION},
                    {"eps_placement", &ad.settings.eps_placement, 1, PPOK_STATUS_OPTION},
                    {"unbiased", &ad.settings.unbiased, 1, PPOK_STATUS_OPTION},
                    {"reserved", &ad.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},
        .options = {{"eps", &ad.settings.eps, -1.0}},
        .structs = {{"args", &ad.at, sizeof *args},
                    {"options", (void **)&args->options, sizeof ad.settings}},
    };
    check(&f);
    refuses_no_args(&f, &ad.at);
    CHECK(args->advantages[0] == -args->advantages[1], "two of a group");
    CHECK(args->token_advantages[1] == 0.0f, "a masked token");
    CHECK(args->token_advantages[2] == args->advantages[0], "a token");
    CHECK(args->stats->zero_std_fraction == 0.0, "groups of equal scores");

    check_score_bounds(&f, &ad.settings.score_min, &ad.settings.score_max);
    ad.settings.baseline = PPOK_ADVANTAGES_BASELINE_RUNNER_UP;
    args->group_size = 1;
    refuses(&f, "baseline", "the runner-up of one", PPOK_STATUS_OPTION);
    ad.settings.baseline = PPOK_ADVANTAGES_BASELINE_LENGTH_WEIGHTED;
    const float *lengths = args->lengths;
    args->lengths = NULL;
    refuses(&f, "lengths", "missing", PPOK_STATUS_NULL_POINTER);
    args->lengths = lengths;
    ad.settings.baseline = PPOK_ADVANTAGES_BASELINE_GROUP;

    /* By ids. */
    int64_t *groups = memory(BATCH * sizeof *groups);
    groups[0] = groups[1] = -7;
    args->groups = groups;
    refuses(&f, "group_size", "with ids", PPOK_STATUS_OPTION);
    args->group_size = 0;
    function by_ids = f;
    pointer ids = {"groups", (void **)&args->groups, BATCH * 8, 8, NEEDED, READ};
    by_ids.pointers[1] = ids;
    by_ids.sizes[2].name = NULL;
    check(&by_ids);

    by_ids.name = "ppok_advantages_cuda";
    by_ids.run = advantages_cuda;
    check_cuda(by_ids, advantages_workspace);
    args->groups = NULL;
    args->group_size = BATCH;
    f.name = "ppok_advantages_cuda";
    f.run = advantages_cuda;
    check_cuda(f, advantages_workspace);
    CHECK_QUERY(ppok_advantages_cuda_workspace_size(args, stream, NULL));
    free_all();
}

/* the optimal token baseline */

static struct {
    ppok_optimal_token_baseline_args args;
    void *at; /* where those are */
    ppok_optimal_token_baseline_options settings;
} tb;

PASS(optimal_token_baseline, tb.at)

static void check_optimal_token_baseline(void) {
    unsigned char *mask = memory(TOKENS);
    mask[1] = 0;
    ppok_optimal_token_baseline_args *args = &tb.args;
    *args = (ppok_optimal_token_baseline_args){
        .struct_size = sizeof *args,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .group_size = BATCH,
        .rewards = floats(TOKENS, 1.0f, 0.5f),
        .logp = floats(TOKENS, -0.7f, 0.0f),
        .log_sum_sq_probs = floats(TOKENS, -0.7f, 0.0f),
        .weights = floats(TOKENS, 1.0f, 0.5f),
        .mask = mask,
        .options = &tb.settings,
        .advantages = memory(TOKENS * 4),
        .returns = memory(TOKENS * 4),
    };
    tb.at = args;
    CHECK(ppok_optimal_token_baseline_options_init(&tb.settings, sizeof tb.settings) == PPOK_STATUS_OK,
          "init");
    CHECK(tb.settings.eps == 1e-8 && tb.settings.lone_tail == 1, "default");
    function f = {
        .name = "ppok_optimal_token_baseline_cpu",
        .run = optimal_token_baseline_cpu,
        .pointers = {{"rewards", (void **)&args->rewards, TOKENS * 4, 4, NEEDED, READ},
                     {"logp", (void **)&args->logp, TOKENS * 4, 4, NEEDED, READ},
                     {"log_sum_sq_probs", (void **)&args->log_sum_sq_probs, TOKENS * 4, 4, NEEDED,
                      READ},
                     {"weights", (void **)&args->weights, TOKENS * 4, 4, OPTIONAL, READ},
                     {"mask", (void **)&args->mask, TOKENS, 1, OPTIONAL, READ},
                     {"advantages", (void **)&args->advantages, TOKENS * 4, 4, NEEDED, WRITTEN},
                     {"returns", (void **)&args->returns, TOKENS * 4, 4, OPTIONAL, WRITTEN}},
        .sizes = {{"batch", &args->batch, PPOK_STATUS_OK},
                  {"seq_len", &args->seq_len, PPOK_STATUS_OK},
                  {"group_size", &args->group_size, PPOK_STATUS_NULL_POINTER}},
        .numbers = {{"step", &tb.settings.step, 1, PPOK_STATUS_OPTION},
                    {"lone_tail", &tb.settings.lone_tail, 1, PPOK_STATUS_OPTION}},
        .options = {{"eps", &tb.settings.eps, -1.0}},
        .structs = {{"args", &tb.at, sizeof *args},
                    {"options", (void **)&args->options, sizeof tb.settings}},
    };
    check(&f);
    refuses_no_args(&f, &tb.at);
    CHECK(args->advantages[1] == 0.0f && args->returns[1] == 0.0f, "a masked token");
    CHECK(args->returns[SEQ_LEN] >= args->returns[SEQ_LEN + 1], "rewards from a token on");

    f.name = "ppok_optimal_token_baseline_cuda";
    f.run = optimal_token_baseline_cuda;
    check_cuda(f, optimal_token_baseline_workspace);
    CHECK_QUERY(ppok_optimal_token_baseline_cuda_workspace_size(args, stream, NULL));
    free_all();
}

/* whiten */

static struct {
    ppok_whiten_moments_args take;
    ppok_whiten_forward_args forward;
    ppok_whiten_backward_args backward;
    ppok_whiten_with_backward_args with_backward;
    /* Where those are. */
    void *take_at, *forward_at, *backward_at, *with_backward_at;
    ppok_moments *merged;
    ppok_whiten_options settings;
} wh;

PASS(whiten_moments, wh.take_at)
PASS(whiten_forward, wh.forward_at)
PASS(whiten_backward, wh.backward_at)
PASS(whiten_with_backward, wh.with_backward_at)

static int32_t moments_merge(void) {
    return ppok_moments_merge(wh.forward.moments, wh.forward.moments, wh.merged);
}

#define WHITEN_X(args) {"x", (void **)&args.x, TOKENS * 4, 4, NEEDED, READ}
#define WHITEN_MASK(args) {"mask", (void **)&args.mask, TOKENS, 1, OPTIONAL, READ}
#define WHITEN_MOMENTS(args) \
    {"moments", (void **)&args.moments, sizeof(ppok_moments), 8, NEEDED, READ}
#define WHITEN_GRADIENTS(args)                                           \
    {"grad_y", (void **)&args.grad_y, TOKENS * 4, 4, NEEDED, READ},      \
    {"grad_x", (void **)&args.grad_x, TOKENS * 4, 4, NEEDED, WRITTEN}
#define WHITEN_REST(args)                                                                       \
    .sizes = {{"elements", &args.elements, PPOK_STATUS_OK}},                                    \
    .numbers = {{"eps_placement", &wh.settings.eps_placement, PPOK_WHITEN_EPS_IN_STD,           \
                 PPOK_STATUS_OPTION},                                                           \
                {"unbiased", &wh.settings.unbiased, 1, PPOK_STATUS_OPTION},                     \
                {"shift_mean", &wh.settings.shift_mean, 1, PPOK_STATUS_OPTION},                 \
                {"reserved", &wh.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},               \
    .options = {{"eps", &wh.settings.eps, -1.0}},                                               \
    .structs = {{"args", &args##_at, sizeof args},                                              \
                {"options", (void **)&args.options, sizeof wh.settings}}

static void check_whiten(void) {
    float *x = floats(TOKENS, -1.0f, 0.3f), *grad_y = floats(TOKENS, -1.0f, 0.25f);
    float *grad_x = memory(TOKENS * 4);
    unsigned char *mask = memory(TOKENS);
    mask[5] = 0;
    CHECK(ppok_whiten_options_init(&wh.settings, sizeof wh.settings) == PPOK_STATUS_OK, "init");
    ppok_moments *moments = memory(sizeof *moments);
    wh.merged = memory(sizeof *wh.merged);
    wh.take = (ppok_whiten_moments_args){
        .struct_size = sizeof wh.take, .elements = TOKENS, .x = x, .mask = mask,
        .moments = moments};
    wh.forward = (ppok_whiten_forward_args){
        .struct_size = sizeof wh.forward, .elements = TOKENS, .x = x, .mask = mask,
        .moments = moments, .options = &wh.settings, .y = memory(TOKENS * 4)};
    wh.backward = (ppok_whiten_backward_args){
        .struct_size = sizeof wh.backward, .elements = TOKENS, .x = x, .mask = mask,
        .moments = moments, .grad_y = grad_y, .options = &wh.settings, .grad_x = grad_x};
    wh.with_backward = (ppok_whiten_with_backward_args){
        .struct_size = sizeof wh.with_backward, .elements = TOKENS, .mask = mask,
        .moments = moments, .grad_y = grad_y, .options = &wh.settings, .grad_x = grad_x};
    wh.take_at = &wh.take;
    wh.forward_at = &wh.forward;
    wh.backward_at = &wh.backward;
    wh.with_backward_at = &wh.with_backward;
    function take = {
        .name = "ppok_whiten_moments_cpu",
        .run = whiten_moments_cpu,
        .pointers = {WHITEN_X(wh.take), WHITEN_MASK(wh.take),
                     {"moments", (void **)&wh.take.moments, sizeof *moments, 8, NEEDED, WRITTEN}},
        .sizes = {{"elements", &wh.take.elements, PPOK_STATUS_OK}},
        .structs = {{"args", &wh.take_at, sizeof wh.take}},
    };
    function forward = {
        .name = "ppok_whiten_forward_cpu",
        .run = whiten_forward_cpu,
        .pointers = {WHITEN_X(wh.forward), WHITEN_MASK(wh.forward), WHITEN_MOMENTS(wh.forward),
                     {"y", (void **)&wh.forward.y, TOKENS * 4, 4, NEEDED, WRITTEN}},
        WHITEN_REST(wh.forward),
    };
    function backward = {
        .name = "ppok_whiten_backward_cpu",
        .run = whiten_backward_cpu,
        .pointers = {WHITEN_X(wh.backward), WHITEN_MASK(wh.backward), WHITEN_MOMENTS(wh.backward),
                     WHITEN_GRADIENTS(wh.backward)},
        WHITEN_REST(wh.backward),
    };
    function with_backward = {
        .name = "ppok_whiten_with_backward_cpu",
        .run = whiten_with_backward_cpu,
        .pointers = {WHITEN_MASK(wh.with_backward), WHITEN_MOMENTS(wh.with_backward),
                     WHITEN_GRADIENTS(wh.with_backward)},
        WHITEN_REST(wh.with_backward),
    };
    function merge = {
        .name = "ppok_moments_merge",
        .run = moments_merge,
        .pointers = {WHITEN_MOMENTS(wh.forward),
                     {"merged", (void **)&wh.merged, sizeof *wh.merged, 8, NEEDED, WRITTEN}},
    };
    check(&take);
    refuses_no_args(&take, &wh.take_at);
    CHECK(moments->count == TOKENS - 1, "moments of %g", moments->count);
    check(&forward);
    refuses_no_args(&forward, &wh.forward_at);
    check(&backward);
    refuses_no_args(&backward, &wh.backward_at);
    check(&with_backward);
    refuses_no_args(&with_backward, &wh.with_backward_at);
    accepts(&merge, "all", "right");
    CHECK(wh.merged->count == 2.0 * moments->count, "merged moments");
    CHECK(ppok_moments_merge(moments, moments, NULL) == PPOK_STATUS_NULL_POINTER, "merge");
    CHECK(ppok_moments_merge(NULL, moments, wh.merged) == PPOK_STATUS_NULL_POINTER, "merge");
    CHECK(ppok_moments_merge(moments, NULL, wh.merged) == PPOK_STATUS_NULL_POINTER, "merge");
    ppok_moments right = *moments;
    CHECK(ppok_moments_merge(moments, moments, moments) == PPOK_STATUS_OK, "merge in place");
    CHECK(moments->count == 2.0 * right.count, "merged in place");
    const double counts[] = {-1.0, 0.5, NAN, INFINITY, 1e300};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        moments->count = counts[i];
        refuses(&forward, "moments", "of a wrong count", PPOK_STATUS_OPTION);
        refuses(&backward, "moments", "of a wrong count", PPOK_STATUS_OPTION);
        refuses(&with_backward, "moments", "of a wrong count", PPOK_STATUS_OPTION);
        refuses(&merge, "moments", "of a wrong count", PPOK_STATUS_OPTION);
    }
    moments->count = 1.0;
    refuses(&forward, "moments", "of one element", PPOK_STATUS_MASK);
    *moments = right;

    take.name = "ppok_whiten_moments_cuda";
    take.run = whiten_moments_cuda;
    check_cuda(take, whiten_moments_workspace);
    CHECK_QUERY(ppok_whiten_moments_cuda_workspace_size(&wh.take, stream, NULL));
    *moments = right;
    forward.name = "ppok_whiten_forward_cuda";
    forward.run = whiten_forward_cuda;
    check_cuda(forward, whiten_forward_workspace);
    CHECK_QUERY(ppok_whiten_forward_cuda_workspace_size(&wh.forward, stream, NULL));
    backward.name = "ppok_whiten_backward_cuda";
    backward.run = whiten_backward_cuda;
    check_cuda(backward, whiten_backward_workspace);
    CHECK_QUERY(ppok_whiten_backward_cuda_workspace_size(&wh.backward, stream, NULL));
    with_backward.name = "ppok_whiten_with_backward_cuda";
    with_backward.run = whiten_with_backward_cuda;
    check_cuda(with_backward, whiten_with_backward_workspace);
    CHECK_QUERY(ppok_whiten_with_backward_cuda_workspace_size(&wh.with_backward, stream, NULL));

    free_all();
}

/* correction */

static struct {
    ppok_correction_args args;
    void *at; /* where those are */
    ppok_correction_options settings;
} co;

PASS(correction, co.at)

static void check_correction(void) {
    unsigned char *mask = memory(TOKENS);
    mask[1] = 0;
    ppok_correction_args *args = &co.args;
    *args = (ppok_correction_args){
        .struct_size = sizeof *args,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .old_logp = floats(TOKENS, -2.0f, 0.1f),
        .rollout_logp = floats(TOKENS, -2.1f, 0.13f),
        .mask = mask,
        .options = &co.settings,
        .weights = memory(TOKENS * 4),
        .stats = memory(sizeof *args->stats),
        .kept = memory(TOKENS),
    };
    co.at = args;
    CHECK(ppok_correction_options_init(&co.settings, sizeof co.settings) == PPOK_STATUS_OK, "init");
    CHECK(co.settings.high == 2.0 && co.settings.low == PPOK_NONE, "default");
    co.settings.rejection_metric = PPOK_REJECTION_METRIC_RATIO;
    co.settings.rejection_high = 1.09;
    co.settings.second_rejection_metric = PPOK_REJECTION_METRIC_K3;
    co.settings.second_rejection_high = 9.0;
    function f = {
        .name = "ppok_correction_cpu",
        .run = correction_cpu,
        .pointers = {{"old_logp", (void **)&args->old_logp, TOKENS * 4, 4, NEEDED, READ},
                     {"rollout_logp", (void **)&args->rollout_logp, TOKENS * 4, 4, NEEDED, READ},
                     {"mask", (void **)&args->mask, TOKENS, 1, OPTIONAL, READ},
                     {"weights", (void **)&args->weights, TOKENS * 4, 4, NEEDED, WRITTEN},
                     {"stats", (void **)&args->stats, sizeof *args->stats, 8, NEEDED, WRITTEN},
                     {"kept", (void **)&args->kept, TOKENS, 1, OPTIONAL, WRITTEN}},
        .sizes = {{"batch", &args->batch, PPOK_STATUS_OK},
                  {"seq_len", &args->seq_len, PPOK_STATUS_OK}},
        .numbers = {{"level", &co.settings.level, 3, PPOK_STATUS_OPTION},
                    {"outside", &co.settings.outside, 1, PPOK_STATUS_OPTION},
                    {"normalise", &co.settings.normalise, 1, PPOK_STATUS_OPTION},
                    {"rejection_level", &co.settings.rejection_level, 3, PPOK_STATUS_OPTION},
                    {"second_rejection_level", &co.settings.second_rejection_level, 3,
                     PPOK_STATUS_OPTION},
                    {"reserved", &co.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},
        .options = {{"log_ratio_clamp", &co.settings.log_ratio_clamp, 0.0},
                    {"low", &co.settings.low, -0.5},
                    {"high", &co.settings.high, -0.5},
                    {"rejection_low", &co.settings.rejection_low, 0.0},
                    {"rejection_high", &co.settings.rejection_high, 0.0},
                    {"second_rejection_low", &co.settings.second_rejection_low, -0.5},
                    {"second_rejection_high", &co.settings.second_rejection_high, -0.5}},
        .structs = {{"args", &co.at, sizeof *args},
                    {"options", (void **)&args->options, sizeof co.settings}},
    };
    check(&f);
    refuses_no_args(&f, &co.at);
    CHECK(args->stats->tokens == TOKENS - 1, "%g tokens", args->stats->tokens);
    CHECK(args->weights[1] == 0.0f && args->kept[1] == 0, "a masked token");
    CHECK(args->weights[0] == 0.0f && args->kept[0] == 0, "a rejected token");
    CHECK(args->weights[2] != 0.0f && args->kept[2] == 1, "a token");
    CHECK(args->stats->rejected_tokens > 0 && args->stats->ess > 0, "statistics");

    co.settings.rejection_metric = 8;
    refuses(&f, "rejection_metric", "unknown", PPOK_STATUS_OPTION);
    co.settings.rejection_metric = PPOK_REJECTION_METRIC_NONE;
    refuses(&f, "rejection_high", "without a metric", PPOK_STATUS_OPTION);
    co.settings.rejection_high = PPOK_NONE;
    accepts(&f, "rejection", "none");
    co.settings.second_rejection_high = PPOK_NONE;
    refuses(&f, "second_rejection_metric", "without bounds", PPOK_STATUS_OPTION);
    co.settings.second_rejection_low = 0.5;
    co.settings.second_rejection_high = 0.25;
    refuses(&f, "second_rejection_high", "below the lower bound", PPOK_STATUS_OPTION);
    co.settings.second_rejection_high = 0.5;
    accepts(&f, "second_rejection_high", "the lower bound");

    ppok_correction_options named;
    CHECK(ppok_correction_options_named(&named, sizeof named, "sequence_mask") == PPOK_STATUS_OK,
          "sequence_mask");
    CHECK(named.level == PPOK_CORRECTION_LEVEL_SEQUENCE_SUM && named.high == 3.0, "sequence_mask");
    CHECK(ppok_correction_options_named(&named, sizeof named, "mask") == PPOK_STATUS_OPTION, "mask");

    f.name = "ppok_correction_cuda";
    f.run = correction_cuda;
    check_cuda(f, correction_workspace);
    CHECK_QUERY(ppok_correction_cuda_workspace_size(args, stream, NULL));
    free_all();
}

/* ppo_loss */

static struct {
    ppok_ppo_loss_args args;
    void *at; /* where those are */
    ppok_ppo_loss_options settings;
} pl;

PASS(ppo_loss, pl.at)

static void check_ppo_loss(void) {
    unsigned char *mask = memory(TOKENS);
    mask[1] = 0;
    ppok_ppo_loss_args *args = &pl.args;
    *args = (ppok_ppo_loss_args){
        .struct_size = sizeof *args,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .logp = floats(TOKENS, -2.0f, 0.1f),
        .old_logp = floats(TOKENS, -1.9f, 0.09f),
        .advantages = floats(TOKENS, -1.0f, 0.2f),
        .values = floats(TOKENS, 0.0f, 0.1f),
        .old_values = floats(TOKENS, 0.1f, 0.08f),
        .returns = floats(TOKENS, 0.2f, 0.12f),
        .entropy = floats(TOKENS, 1.0f, 0.1f),
        .ref_logp = floats(TOKENS, -2.1f, 0.11f),
        .rollout_logp = floats(TOKENS, -2.0f, 0.09f),
        .weights = floats(TOKENS, 1.0f, 0.1f),
        .mask = mask,
        .options = &pl.settings,
        .stats = memory(sizeof *args->stats),
        .loss = memory(sizeof *args->loss),
        .grad_logp = memory(TOKENS * 4),
        .grad_values = memory(TOKENS * 4),
        .grad_entropy = memory(TOKENS * 4),
    };
    pl.at = args;
    CHECK(ppok_ppo_loss_options_init(&pl.settings, sizeof pl.settings) == PPOK_STATUS_OK, "init");
    CHECK(pl.settings.log_ratio_clamp == 20.0, "default");
    CHECK(pl.settings.clip_range_high == PPOK_NONE, "default");
    pl.settings.value_clip_range = PPOK_NONE;
    function f = {
        .name = "ppok_ppo_loss_cpu",
        .run = ppo_loss_cpu,
        .pointers = {{"logp", (void **)&args->logp, TOKENS * 4, 4, NEEDED, READ},
                     {"old_logp", (void **)&args->old_logp, TOKENS * 4, 4, NEEDED, READ},
                     {"advantages", (void **)&args->advantages, TOKENS * 4, 4, NEEDED, READ},
                     {"values", (void **)&args->values, TOKENS * 4, 4, PAIRED, READ},
                     {"old_values", (void **)&args->old_values, TOKENS * 4, 4, OPTIONAL, READ},
                     {"returns", (void **)&args->returns, TOKENS * 4, 4, PAIRED, READ},
                     {"ref_logp", (void **)&args->ref_logp, TOKENS * 4, 4, OPTIONAL, READ},
                     {"rollout_logp", (void **)&args->rollout_logp, TOKENS * 4, 4, OPTIONAL, READ},
                     {"weights", (void **)&args->weights, TOKENS * 4, 4, OPTIONAL, READ},
                     {"mask", (void **)&args->mask, TOKENS, 1, OPTIONAL, READ},
                     {"stats", (void **)&args->stats, sizeof *args->stats, 8, NEEDED, WRITTEN},
                     {"loss", (void **)&args->loss, 4, 4, OPTIONAL, WRITTEN},
                     {"grad_logp", (void **)&args->grad_logp, TOKENS * 4, 4, OPTIONAL, WRITTEN},
                     {"grad_values", (void **)&args->grad_values, TOKENS * 4, 4, OPTIONAL, WRITTEN},
                     {"grad_entropy", (void **)&args->grad_entropy, TOKENS * 4, 4, OPTIONAL,
                      WRITTEN}},
        .sizes = {{"batch", &args->batch, PPOK_STATUS_MASK},
                  {"seq_len", &args->seq_len, PPOK_STATUS_MASK}},
        .numbers = {{"aggregation", &pl.settings.aggregation, 7, PPOK_STATUS_OPTION},
                    {"clip_fraction", &pl.settings.clip_fraction, 1, PPOK_STATUS_OPTION},
                    {"kl_estimator", &pl.settings.kl_estimator, 4, PPOK_STATUS_OPTION},
                    {"surrogate", &pl.settings.surrogate, 5, PPOK_STATUS_OPTION},
                    {"ratio", &pl.settings.ratio, 2, PPOK_STATUS_OPTION},
                    {"ratio_gradient", &pl.settings.ratio_gradient, 1, PPOK_STATUS_OPTION},
                    {"trust_region", &pl.settings.trust_region, 3, PPOK_STATUS_OPTION},
                    {"trust_region_sides", &pl.settings.trust_region_sides, 1, PPOK_STATUS_OPTION},
                    {"kl_against", &pl.settings.kl_against, 2, PPOK_STATUS_OPTION},
                    {"kl_gradient", &pl.settings.kl_gradient, 1, PPOK_STATUS_OPTION},
                    {"kl_ratio", &pl.settings.kl_ratio, 2, PPOK_STATUS_OPTION},
                    {"kl_weighted", &pl.settings.kl_weighted, 1, PPOK_STATUS_OPTION},
                    {"entropy_own_mean", &pl.settings.entropy_own_mean, 1, PPOK_STATUS_OPTION},
                    {"advantages_per_row", &pl.settings.advantages_per_row, 1, PPOK_STATUS_OPTION},
                    {"weights_per_row", &pl.settings.weights_per_row, 1, PPOK_STATUS_OPTION},
                    {"row_extremes", &pl.settings.row_extremes, 1, PPOK_STATUS_OPTION}},
        .options = {{"clip_range", &pl.settings.clip_range, -1.0, 1},
                    {"clip_range_high", &pl.settings.clip_range_high, -0.1, 1},
                    {"dual_clip", &pl.settings.dual_clip, 1.0},
                    {"log_ratio_clamp", &pl.settings.log_ratio_clamp, 0.0},
                    {"value_clip_range", &pl.settings.value_clip_range, -2.0},
                    {"kl_log_ratio_clamp", &pl.settings.kl_log_ratio_clamp, 0.0},
                    {"kl_output_clamp", &pl.settings.kl_output_clamp, 0.0},
                    {"denominator", &pl.settings.denominator, 0.0},
                    {"ratio_cap", &pl.settings.ratio_cap, 0.0},
                    {"soft_gate_tau_pos", &pl.settings.soft_gate_tau_pos, 0.0},
                    {"soft_gate_tau_neg", &pl.settings.soft_gate_tau_neg, -1.0},
                    {"gamma_k_pos", &pl.settings.gamma_k_pos, -1.0},
                    {"gamma_lambda_pos", &pl.settings.gamma_lambda_pos, -1.0},
                    {"gamma_k_neg", &pl.settings.gamma_k_neg, -1.0},
                    {"gamma_lambda_neg", &pl.settings.gamma_lambda_neg, -1.0},
                    {"trust_region_low", &pl.settings.trust_region_low, -0.1},
                    {"trust_region_high", &pl.settings.trust_region_high, -0.1}},
        .structs = {{"args", &pl.at, sizeof *args},
                    {"options", (void **)&args->options, sizeof pl.settings}},
    };
    check(&f);
    refuses_no_args(&f, &pl.at);
    CHECK(args->stats->tokens == TOKENS - 1, "%g tokens", args->stats->tokens);
    CHECK(isfinite(args->stats->loss), "loss %g", args->stats->loss);
    CHECK(*args->loss == (float)args->stats->loss, "loss %g", *args->loss);
    CHECK(args->grad_logp[1] == 0.0f, "a masked token");

    ppok_ppo_loss_options gspo;
    CHECK(ppok_ppo_loss_options_named(&gspo, sizeof gspo, "gspo") == PPOK_STATUS_OK, "gspo");
    CHECK(gspo.ratio == PPOK_RATIO_SEQUENCE_MEAN && gspo.clip_range == 3e-4, "gspo");
    CHECK(gspo.struct_size == sizeof gspo, "gspo");
    CHECK(ppok_ppo_loss_options_named(&gspo, sizeof gspo, "gpso") == PPOK_STATUS_OPTION, "gpso");
    CHECK(strstr(ppok_last_error(), "sapo") != NULL, "%s", ppok_last_error());
    CHECK(ppok_ppo_loss_options_named(&gspo, sizeof gspo, NULL) == PPOK_STATUS_NULL_POINTER, "no name");

    pl.settings.entropy_coef = 0.01;
    const float *entropy = args->entropy;
    args->entropy = NULL;
    refuses(&f, "entropy_coef", "without entropy", PPOK_STATUS_OPTION);
    pl.settings.entropy_coef = 0.0;
    refuses(&f, "grad_entropy", "without entropy", PPOK_STATUS_SHAPE);
    args->entropy = entropy;
    pl.settings.aggregation = PPOK_PPO_LOSS_CONSTANT;
    refuses(&f, "aggregation_divisor", "zero", PPOK_STATUS_OPTION);
    pl.settings.aggregation_divisor = 4.0;
    accepts(&f, "aggregation_divisor", "given");
    pl.settings.aggregation = PPOK_PPO_LOSS_TOKEN_MEAN;
    args->mask = memset(memory(TOKENS), 0, TOKENS);
    refuses(&f, "mask", "of nothing", PPOK_STATUS_MASK);
    args->mask = mask;
    const float *values = args->values, *returns = args->returns;
    args->values = args->returns = NULL;
    refuses(&f, "old_values", "without values", PPOK_STATUS_NULL_POINTER);
    args->values = values;
    args->returns = returns;
    ppok_ppo_loss_args all = *args;
    args->loss = args->grad_logp = args->grad_values = args->grad_entropy = NULL;
    accepts(&f, "loss and gradients", "null");
    *args = all;

    f.name = "ppok_ppo_loss_cuda";
    f.run = ppo_loss_cuda;
    check_cuda(f, ppo_loss_workspace);
    CHECK_QUERY(ppok_ppo_loss_cuda_workspace_size(args, stream, NULL));
    free_all();
}

static struct {
    ppok_ppo_loss_scale_args args;
    void *at; /* where those are */
} sc;

PASS(ppo_loss_scale, sc.at)

/* In place and not. */
static void check_scaled(const function *f) {
    float upstream = -2.0f, *stored = (float *)sc.args.stored_logp, *scaled = sc.args.grad_logp;
    const float *given = sc.args.upstream;
    sc.args.upstream = &upstream;
    stored[0] = 0.0f;
    accepts(f, "gradients", "apart");
    CHECK(scaled[0] == 0.0f && scaled[1] == -2.0f * stored[1], "%s: scaled", f->name);
    float before = stored[1];
    sc.args.grad_logp = stored;
    accepts(f, "grad_logp", "in place");
    CHECK(stored[1] == -2.0f * before, "%s: scaled in place", f->name);
    sc.args.grad_logp = scaled;
    sc.args.upstream = given;
}

static void check_ppo_loss_scale(void) {
    sc.args = (ppok_ppo_loss_scale_args){
        .struct_size = sizeof sc.args,
        .tokens = TOKENS,
        .upstream = floats(1, 0.5f, 0.0f),
        .stored_logp = floats(TOKENS, 1.0f, 0.1f),
        .stored_values = floats(TOKENS, 2.0f, 0.1f),
        .stored_entropy = floats(TOKENS, 3.0f, 0.1f),
        .grad_logp = memory(TOKENS * 4),
        .grad_values = memory(TOKENS * 4),
        .grad_entropy = memory(TOKENS * 4),
    };
    sc.at = &sc.args;
    ppok_ppo_loss_scale_args *args = &sc.args;
    function f = {
        .name = "ppok_ppo_loss_scale_cpu",
        .run = ppo_loss_scale_cpu,
        .pointers = {{"upstream", (void **)&args->upstream, 4, 4, NEEDED, READ},
                     {"stored_logp", (void **)&args->stored_logp, TOKENS * 4, 4, PAIRED, READ},
                     {"stored_values", (void **)&args->stored_values, TOKENS * 4, 4, PAIRED, READ},
                     {"stored_entropy", (void **)&args->stored_entropy, TOKENS * 4, 4, PAIRED,
                      READ},
                     {"grad_logp", (void **)&args->grad_logp, TOKENS * 4, 4, PAIRED, WRITTEN},
                     {"grad_values", (void **)&args->grad_values, TOKENS * 4, 4, PAIRED, WRITTEN},
                     {"grad_entropy", (void **)&args->grad_entropy, TOKENS * 4, 4, PAIRED,
                      WRITTEN}},
        .sizes = {{"tokens", &args->tokens, PPOK_STATUS_OK}},
        .structs = {{"args", &sc.at, sizeof *args}},
    };
    check(&f);
    refuses_no_args(&f, &sc.at);
    check_scaled(&f);
    f.name = "ppok_ppo_loss_scale_cuda";
    f.run = ppo_loss_scale_cuda;
    check_cuda(f, ppo_loss_scale_workspace);
    if (strcmp(device, "simt") == 0) check_scaled(&f);
    CHECK_QUERY(ppok_ppo_loss_scale_cuda_workspace_size(args, stream, NULL));
    free_all();
}

/* preference */

static struct {
    ppok_preference_loss_args args;
    ppok_reward_model_loss_args rewards;
    void *at, *rewards_at; /* where those are */
    ppok_preference_options settings;
    ppok_reward_model_options reward_settings;
} pr;

PASS(preference_loss, pr.at)
PASS(reward_model_loss, pr.rewards_at)

/* Two pairs. */
enum { RESPONSES = 4, UNITS = 2, ALL_TOKENS = RESPONSES * SEQ_LEN };

static void check_preference(void) {
    unsigned char *mask = memory(ALL_TOKENS);
    mask[1] = 0;
    int64_t *lengths = memory(RESPONSES * sizeof *lengths);
    for (int i = 0; i < RESPONSES; i++) lengths[i] = 3 + i;
    ppok_preference_loss_args *args = &pr.args;
    *args = (ppok_preference_loss_args){
        .struct_size = sizeof *args,
        .rows = RESPONSES,
        .seq_len = SEQ_LEN,
        .logp = floats(ALL_TOKENS, -2.0f, 0.1f),
        .ref_logp = floats(ALL_TOKENS, -1.9f, 0.09f),
        .mask = mask,
        .lengths = lengths,
        .weights = floats(UNITS, 0.5f, 0.1f),
        .margin = floats(UNITS, 0.1f, 0.1f),
        .options = &pr.settings,
        .stats = memory(sizeof *args->stats),
        .loss = memory(sizeof *args->loss),
        .losses = memory(UNITS * 4),
        .rewards = memory(RESPONSES * 4),
        .grad_logp = memory(ALL_TOKENS * 4),
    };
    pr.at = args;
    int32_t status = ppok_preference_options_init(&pr.settings, sizeof pr.settings);
    CHECK(status == PPOK_STATUS_OK, "init");
    CHECK(pr.settings.beta == 0.1, "default");
    CHECK(pr.settings.ld_alpha == PPOK_NONE, "default");
    function f = {
        .name = "ppok_preference_loss_cpu",
        .run = preference_loss_cpu,
        .pointers = {{"logp", (void **)&args->logp, ALL_TOKENS * 4, 4, NEEDED, READ},
                     {"ref_logp", (void **)&args->ref_logp, ALL_TOKENS * 4, 4, OPTIONAL, READ},
                     {"mask", (void **)&args->mask, ALL_TOKENS, 1, OPTIONAL, READ},
                     {"lengths", (void **)&args->lengths, RESPONSES * 8, 8, OPTIONAL, READ},
                     {"weights", (void **)&args->weights, UNITS * 4, 4, OPTIONAL, READ},
                     {"margin", (void **)&args->margin, UNITS * 4, 4, OPTIONAL, READ},
                     {"stats", (void **)&args->stats, sizeof *args->stats, 8, NEEDED, WRITTEN},
                     {"loss", (void **)&args->loss, 4, 4, OPTIONAL, WRITTEN},
                     {"losses", (void **)&args->losses, UNITS * 4, 4, OPTIONAL, WRITTEN},
                     {"rewards", (void **)&args->rewards, RESPONSES * 4, 4, OPTIONAL, WRITTEN},
                     {"grad_logp", (void **)&args->grad_logp, ALL_TOKENS * 4, 4, OPTIONAL,
                      WRITTEN}},
        .sizes = {{"rows", &args->rows, PPOK_STATUS_MASK}, {"seq_len", &args->seq_len, PPOK_STATUS_OK}},
        .numbers = {{"loss", &pr.settings.loss, PPOK_PREFERENCE_KTO, PPOK_STATUS_OPTION},
                    {"f_divergence", &pr.settings.f_divergence, 3, PPOK_STATUS_OPTION},
                    {"average_log_prob", &pr.settings.average_log_prob, 1, PPOK_STATUS_OPTION},
                    {"reserved", &pr.settings.reserved, 0, PPOK_STATUS_STRUCT_SIZE}},
        .options = {{"beta", &pr.settings.beta, 0.0},
                    {"label_smoothing", &pr.settings.label_smoothing, 0.7},
                    {"gamma", &pr.settings.gamma, NAN},
                    {"alpha", &pr.settings.alpha, 1.0},
                    {"discopop_tau", &pr.settings.discopop_tau, 0.0},
                    {"ld_alpha", &pr.settings.ld_alpha, 2.0},
                    {"desirable_weight", &pr.settings.desirable_weight, 2.0},
                    {"undesirable_weight", &pr.settings.undesirable_weight, -2.0},
                    {"sft_coef", &pr.settings.sft_coef, NAN},
                    {"denominator", &pr.settings.denominator, 0.0},
                    {"sft_denominator", &pr.settings.sft_denominator, 0.0}},
        .structs = {{"args", &pr.at, sizeof *args},
                    {"options", (void **)&args->options, sizeof pr.settings}},
    };
    check(&f);
    refuses_no_args(&f, &pr.at);
    CHECK(args->stats->chosen == UNITS, "%g pairs", args->stats->chosen);
    CHECK(isfinite(args->stats->loss), "loss %g", args->stats->loss);
    CHECK(*args->loss == (float)args->stats->loss, "loss %g", *args->loss);
    CHECK(args->grad_logp[1] == 0.0f && args->grad_logp[2] < 0.0f, "the gradient of a chosen row");

    args->rows = RESPONSES - 1;
    refuses(&f, "rows", "odd", PPOK_STATUS_SHAPE);
    args->rows = RESPONSES;
    args->ref_sums = floats(RESPONSES, -9.0f, 1.0f);
    refuses(&f, "ref_sums", "beside ref_logp", PPOK_STATUS_OPTION);
    const float *reference = args->ref_logp;
    args->ref_logp = NULL;
    accepts(&f, "ref_sums", "alone");
    pr.settings.loss = PPOK_PREFERENCE_CPO;
    refuses(&f, "ref_sums", "of a loss without a reference", PPOK_STATUS_OPTION);
    pr.settings.loss = PPOK_PREFERENCE_SIGMOID;
    args->ref_sums = NULL;
    args->ref_logp = reference;
    unsigned char *labels = memory(RESPONSES);
    memset(labels, 1, RESPONSES);
    args->labels = labels;
    refuses(&f, "labels", "of pairs", PPOK_STATUS_OPTION);
    args->labels = NULL;

    f.name = "ppok_preference_loss_cuda";
    f.run = preference_loss_cuda;
    check_cuda(f, preference_loss_workspace);
    CHECK_QUERY(ppok_preference_loss_cuda_workspace_size(args, stream, NULL));
    f.name = "ppok_preference_loss_cpu";
    f.run = preference_loss_cpu;

    /* KTO, of labelled rows, for each of which there are a loss and a weight. */
    pr.settings.loss = PPOK_PREFERENCE_KTO;
    args->weights = args->margin = NULL;
    args->losses = memory(RESPONSES * 4);
    refuses(&f, "labels", "null", PPOK_STATUS_NULL_POINTER);
    args->labels = labels;
    args->kl = floats(1, 0.5f, 0.0f);
    accepts(&f, "labels", "given");
    lengths[1] = -1;
    refuses(&f, "lengths", "below zero", PPOK_STATUS_OPTION);
    lengths[1] = 4;
    labels[2] = 2;
    refuses(&f, "labels", "of no class", PPOK_STATUS_OPTION);

    pr.rewards = (ppok_reward_model_loss_args){
        .struct_size = sizeof pr.rewards,
        .pairs = UNITS,
        .rewards = floats(2 * UNITS, -0.5f, 0.2f),
        .margin = floats(UNITS, 0.1f, 0.1f),
        .weights = floats(UNITS, 0.5f, 0.1f),
        .options = &pr.reward_settings,
        .stats = memory(sizeof *pr.rewards.stats),
        .loss = memory(4),
        .losses = memory(UNITS * 4),
        .grad_rewards = memory(2 * UNITS * 4),
    };
    ppok_reward_model_loss_args *of = &pr.rewards;
    pr.rewards_at = of;
    status = ppok_reward_model_options_init(&pr.reward_settings, sizeof pr.reward_settings);
    CHECK(status == PPOK_STATUS_OK, "init");
    function model = {
        .name = "ppok_reward_model_loss_cpu",
        .run = reward_model_loss_cpu,
        .pointers = {{"rewards", (void **)&of->rewards, 2 * UNITS * 4, 4, NEEDED, READ},
                     {"margin", (void **)&of->margin, UNITS * 4, 4, OPTIONAL, READ},
                     {"weights", (void **)&of->weights, UNITS * 4, 4, OPTIONAL, READ},
                     {"stats", (void **)&of->stats, sizeof *of->stats, 8, NEEDED, WRITTEN},
                     {"loss", (void **)&of->loss, 4, 4, OPTIONAL, WRITTEN},
                     {"losses", (void **)&of->losses, UNITS * 4, 4, OPTIONAL, WRITTEN},
                     {"grad_rewards", (void **)&of->grad_rewards, 2 * UNITS * 4, 4, OPTIONAL,
                      WRITTEN}},
        .sizes = {{"pairs", &of->pairs, PPOK_STATUS_MASK}},
        .options = {{"center_coef", &pr.reward_settings.center_coef, -1.0},
                    {"denominator", &pr.reward_settings.denominator, 0.0}},
        .structs = {{"args", &pr.rewards_at, sizeof *of},
                    {"options", (void **)&of->options, sizeof pr.reward_settings}},
    };
    check(&model);
    refuses_no_args(&model, &pr.rewards_at);
    CHECK(*of->loss == (float)of->stats->loss, "loss %g", *of->loss);
    model.name = "ppok_reward_model_loss_cuda";
    model.run = reward_model_loss_cuda;
    check_cuda(model, reward_model_loss_workspace);
    CHECK_QUERY(ppok_reward_model_loss_cuda_workspace_size(of, stream, NULL));
    free_all();
}

/* What is not about one op. */

/* The functions that set defaults, of a struct too small for them. */
#define CHECK_INIT(type)                                                                          \
    do {                                                                                          \
        struct {                                                                                  \
            type options;                                                                         \
            unsigned char later[16];                                                              \
        } room;                                                                                   \
        memset(&room, 0x77, sizeof room);                                                         \
        CHECK(type##_init(NULL, sizeof(type)) == PPOK_STATUS_NULL_POINTER, #type);                \
        CHECK(type##_init((type *)((char *)&room + 1), sizeof(type)) == PPOK_STATUS_MISALIGNED,   \
              #type);                                                                             \
        const size_t wrong[] = {0, 1, sizeof(type) - 1, 4097, SIZE_MAX};                          \
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)                                 \
            CHECK(type##_init(&room.options, wrong[i]) == PPOK_STATUS_STRUCT_SIZE, #type);        \
        CHECK(((unsigned char *)&room)[0] == 0x77, #type " was written");                         \
        CHECK(type##_init(&room.options, sizeof(type)) == PPOK_STATUS_OK, #type);                 \
        CHECK(room.options.struct_size == sizeof(type), #type);                                   \
        CHECK(room.later[0] == 0x77, #type " was written past its end");                          \
        CHECK(type##_init(&room.options, sizeof room) == PPOK_STATUS_OK, #type);                  \
        CHECK(room.options.struct_size == sizeof room && room.later[15] == 0, #type " later");    \
    } while (0)

static void *of_another_thread(void *arg) {
    CHECK(strcmp(ppok_last_error(), "") == 0, "a new thread has an error");
    ppok_logprob_options_init(NULL, 0);
    CHECK(strstr(ppok_last_error(), "options") != NULL, "the error of a thread");
    return arg;
}

static void check_library(void) {
    CHECK(ppok_version() == PPOK_VERSION, "version %d", ppok_version());
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", PPOK_VERSION / 10000, PPOK_VERSION / 100 % 100,
             PPOK_VERSION % 100);
    CHECK(strcmp(ppok_version_string(), version) == 0, "version %s", ppok_version_string());
    CHECK(strcmp(ppok_status_string(PPOK_STATUS_OK), "ok") == 0, "ok");
    CHECK(strcmp(ppok_status_string(-1), ppok_status_string(12345)) == 0, "unknown");
    CHECK_INIT(ppok_logprob_options);
    CHECK_INIT(ppok_kl_token_options);
    CHECK_INIT(ppok_kl_full_options);
    CHECK_INIT(ppok_gae_options);
    CHECK_INIT(ppok_advantages_options);
    CHECK_INIT(ppok_optimal_token_baseline_options);
    CHECK_INIT(ppok_whiten_options);
    CHECK_INIT(ppok_correction_options);
    CHECK_INIT(ppok_ppo_loss_options);
    CHECK_INIT(ppok_preference_options);
    CHECK_INIT(ppok_reward_model_options);

    ppok_moments_merge(NULL, NULL, NULL);
    char before[512];
    snprintf(before, sizeof before, "%s", ppok_last_error());
    pthread_t thread;
    pthread_create(&thread, NULL, of_another_thread, NULL);
    pthread_join(thread, NULL);
    CHECK(strcmp(ppok_last_error(), before) == 0, "another thread's error");
}

/* Enough for several threads. */
enum { MANY = 64, LONG = 2048, ALL = MANY * LONG, WIDE = 4096, CALLS = 9 };

/* What the header says that a thread needs. */
enum { STACK = 64 * 1024 };

static struct {
    float logp[ALL], old_logp[ALL], advantages[ALL], logits[MANY * WIDE];
    int64_t targets[MANY];
    uint8_t mask[ALL];
} many;

static struct {
    float advantages[ALL], returns[ALL], kl[ALL], whitened[ALL], grad_logp[ALL];
    float of_rows[4][MANY], full_kl[MANY], grad_logits[MANY * WIDE], stats[PPOK_KL_FULL_STATS * MANY];
    ppok_moments moments;
    ppok_ppo_loss_stats loss;
    ppok_preference_stats preference;
    float grad_preference[ALL];
    int32_t status[CALLS];
} results;

/* Every pass that is not much like another, with work for several threads. */
static void *large_calls(void *arg) {
    int32_t *status = results.status;
    memset(&results, 0, sizeof results);
    ppok_gae_args gae = {sizeof gae};
    gae.batch = MANY, gae.seq_len = LONG;
    gae.values = many.logp, gae.rewards = many.advantages, gae.mask = many.mask;
    gae.advantages = results.advantages, gae.returns = results.returns;
    gae.moments = &results.moments;
    *status++ = ppok_gae_cpu(&gae);
    ppok_whiten_forward_args whiten = {sizeof whiten};
    whiten.elements = ALL, whiten.x = many.logp, whiten.moments = &results.moments;
    whiten.y = results.whitened;
    *status++ = ppok_whiten_forward_cpu(&whiten);
    ppok_kl_token_forward_args kl = {sizeof kl};
    kl.tokens = ALL, kl.logp = many.logp, kl.ref_logp = many.old_logp, kl.kl = results.kl;
    *status++ = ppok_kl_token_forward_cpu(&kl);
    ppok_ppo_loss_args loss = {sizeof loss};
    loss.batch = MANY, loss.seq_len = LONG;
    loss.logp = many.logp, loss.old_logp = many.old_logp, loss.advantages = many.advantages;
    loss.mask = many.mask, loss.stats = &results.loss, loss.grad_logp = results.grad_logp;
    *status++ = ppok_ppo_loss_cpu(&loss);
    ppok_preference_loss_args preference = {sizeof preference};
    preference.rows = MANY, preference.seq_len = LONG, preference.mask = many.mask;
    preference.logp = many.logp, preference.ref_logp = many.old_logp;
    preference.stats = &results.preference, preference.grad_logp = results.grad_preference;
    *status++ = ppok_preference_loss_cpu(&preference);
    ppok_logprob_forward_args forward = {sizeof forward};
    forward.rows = MANY, forward.vocab = WIDE;
    forward.logits = many.logits, forward.targets = many.targets, forward.targets_type = PPOK_I64;
    forward.logp = results.of_rows[0], forward.entropy = results.of_rows[1];
    forward.max = results.of_rows[2], forward.log_sum = results.of_rows[3];
    *status++ = ppok_logprob_forward_cpu(&forward);
    ppok_logprob_backward_args backward = {sizeof backward};
    backward.rows = MANY, backward.vocab = WIDE;
    backward.logits = many.logits, backward.targets = many.targets;
    backward.targets_type = PPOK_I64;
    backward.max = results.of_rows[2], backward.log_sum = results.of_rows[3];
    backward.grad_logp = many.advantages, backward.grad_logits = results.grad_logits;
    *status++ = ppok_logprob_backward_cpu(&backward);
    ppok_kl_full_forward_args full = {sizeof full};
    full.rows = MANY, full.vocab = WIDE / 2;
    full.logits = many.logits, full.ref_logits = many.logits + ALL, full.stats = results.stats;
    *status++ = ppok_kl_full_forward_cpu(&full);
    /* One long row, shared out in pieces. */
    forward.rows = 1, forward.vocab = MANY * WIDE, forward.logp = results.full_kl;
    forward.entropy = forward.max = forward.log_sum = NULL;
    *status++ = ppok_logprob_forward_cpu(&forward);
    return arg;
}

enum { TEAM = 3 };

static int team_calls;

typedef struct {
    void (*work)(void *);
    void *state;
} shared_work;

static void *member(void *arg) {
    shared_work *shared = arg;
    shared->work(shared->state);
    return NULL;
}

static void team(void (*work)(void *), void *state, unsigned threads, unsigned flags) {
    shared_work shared = {work, state};
    pthread_t others[TEAM - 1];
    team_calls += threads == 0 && flags == 0;
    for (int i = 0; i < TEAM - 1; i++) pthread_create(&others[i], NULL, member, &shared);
    work(state);
    for (int i = 0; i < TEAM - 1; i++) pthread_join(others[i], NULL);
}

static void check_threads(void) {
    for (size_t i = 0; i < MANY * WIDE; i++) {
        many.logits[i] = sinf((float)i) * 5;
        if (i >= ALL) continue;
        many.logp[i] = -2 - sinf((float)i), many.old_logp[i] = -2 - cosf((float)i);
        many.advantages[i] = sinf(3 * (float)i), many.mask[i] = i % 5 != 0;
        if (i < MANY) many.targets[i] = (int64_t)i * 31;
    }
    CHECK(ppok_num_threads() > 0, "threads");
    const char *set = ppok_instruction_set();
    const int known = strcmp(set, "avx512") == 0 || strcmp(set, "avx2") == 0 ||
                      strcmp(set, "neon") == 0 || strcmp(set, "scalar") == 0;
    CHECK(known, "instruction set %s", set);
    large_calls(NULL);
    for (int i = 0; i < CALLS; i++) CHECK(results.status[i] == PPOK_STATUS_OK, "large call %d", i);
    static unsigned char expected[sizeof results];
    memcpy(expected, &results, sizeof results);

    CHECK(ppok_set_team(team) == NULL, "the library's own pool comes first");
    CHECK(ppok_num_threads() == TEAM, "%zu threads", ppok_num_threads());
    large_calls(NULL);
    CHECK(memcmp(expected, &results, sizeof results) == 0, "a team gives the same bits");
    CHECK(team_calls >= CALLS, "%d calls of the team", team_calls);
    CHECK(ppok_set_team(NULL) == team, "the team so far");
    team_calls = 0;

    pthread_attr_t attributes;
    pthread_t small;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    CHECK(pthread_create(&small, &attributes, large_calls, NULL) == 0, "a thread of %d bytes", STACK);
    pthread_join(small, NULL);
    pthread_attr_destroy(&attributes);
    CHECK(memcmp(expected, &results, sizeof results) == 0, "a small stack gives the same bits");
    CHECK(team_calls == 0, "the team is not used any more");
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: capi cpu|cuda|simt\n");
        return 2;
    }
    device = argv[1];
    check_library();
    check_logprob();
    check_kl_token();
    check_kl_full();
    check_gae();
    check_advantages();
    check_optimal_token_baseline();
    check_whiten();
    check_correction();
    check_ppo_loss();
    check_ppo_loss_scale();
    check_preference();
    check_threads();
    printf("%s: %d checks, %d failures\n", device, checks, failures);
    return failures != 0;
}
