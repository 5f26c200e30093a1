/*
 * Log-probabilities and entropies from hidden states and a head's weight, with the gradients of both, on
 * the CPU: a tile of logits at a time, never all of them. The products are BLAS's or, without
 * -DWITH_CBLAS, plain loops; what is between them is the library's. Everything is compared with the same
 * computed in plain loops of double.
 *
 *     cc -std=c11 -Iinclude examples/c/linear_logprob.c -Ltarget/release -lppo_kernels -lm
 *     cc -std=c11 -DWITH_CBLAS .. -lopenblas
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "ppo_kernels.h"

#ifdef WITH_CBLAS
#include <cblas.h>
#endif

enum { ROWS = 40, HIDDEN = 24, VOCAB = 1003, TILE = 256 };

static const double TEMPERATURE = 0.8;

static float hidden[ROWS][HIDDEN], weight[VOCAB][HIDDEN];
static int64_t targets[ROWS];
static float grad_logp[ROWS], grad_entropy[ROWS]; /* from whatever the loss is */

static float tile[ROWS * TILE]; /* the only logits that there are */
static float max[ROWS], rest[ROWS], logit[ROWS], weighted[ROWS];
static float logp[ROWS], entropy[ROWS], log_sum[ROWS];
static float grad_hidden[ROWS][HIDDEN], grad_weight[VOCAB][HIDDEN];

static void check(int32_t status) {
    if (status == PPOK_STATUS_OK) return;
    fprintf(stderr, "%s: %s\n", ppok_status_string(status), ppok_last_error());
    exit(1);
}

static float uniform(void) {
    static uint64_t state = 42;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / (float)(1 << 23) - 1.0f;
}

/* c[m][n] = a b, or a b added to it, of a[m][k], or a[k][m] if it is transposed, and b[k][n] or b[n][k]. */
static void product(int transposed_a, int transposed_b, int m, int n, int k, const float *a,
                    const float *b, int adds, float *c) {
#ifdef WITH_CBLAS
    cblas_sgemm(CblasRowMajor, transposed_a ? CblasTrans : CblasNoTrans,
                transposed_b ? CblasTrans : CblasNoTrans, m, n, k, 1.0f, a, transposed_a ? m : k, b,
                transposed_b ? k : n, adds ? 1.0f : 0.0f, c, n);
#else
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) {
            float sum = adds ? c[i * n + j] : 0.0f;
            for (int l = 0; l < k; l++) {
                sum += (transposed_a ? a[l * m + i] : a[i * k + l]) *
                       (transposed_b ? b[j * k + l] : b[l * n + j]);
            }
            c[i * n + j] = sum;
        }
    }
#endif
}

static int columns_from(int first) { return VOCAB - first < TILE ? VOCAB - first : TILE; }

static void forward(const ppok_logprob_options *options) {
    for (int first = 0; first < VOCAB; first += TILE) {
        int columns = columns_from(first);
        product(0, 1, ROWS, columns, HIDDEN, hidden[0], weight[first], 0, tile);
        ppok_logprob_partial_args args = {
            .struct_size = sizeof args,
            .rows = ROWS,
            .columns = (size_t)columns,
            .first_column = (size_t)first,
            .vocab = VOCAB,
            .logits_type = PPOK_F32,
            .targets_type = PPOK_I64,
            .begins = first == 0,
            .logits = tile,
            .targets = targets,
            .options = options,
            .max = max,
            .rest = rest,
            .logit = logit,
            .weighted = weighted,
        };
        check(ppok_logprob_partial_cpu(&args));
    }
    /* Another process's columns would come in here, by ppok_logprob_merge_cpu(). */
    ppok_logprob_finish_args args = {
        .struct_size = sizeof args,
        .rows = ROWS,
        .vocab = VOCAB,
        .targets_type = PPOK_I64,
        .targets = targets,
        .max = max,
        .rest = rest,
        .logit = logit,
        .weighted = weighted,
        .options = options,
        .logp = logp,
        .log_sum = log_sum,
        .entropy = entropy,
    };
    check(ppok_logprob_finish_cpu(&args));
}

static void backward(const ppok_logprob_options *options) {
    for (int first = 0; first < VOCAB; first += TILE) {
        int columns = columns_from(first);
        product(0, 1, ROWS, columns, HIDDEN, hidden[0], weight[first], 0, tile);
        ppok_logprob_backward_args args = {
            .struct_size = sizeof args,
            .rows = ROWS,
            .vocab = VOCAB,
            .columns = (size_t)columns,
            .first_column = (size_t)first,
            .logits_type = PPOK_F32,
            .targets_type = PPOK_I64,
            .logits = tile,
            .targets = targets,
            .max = max,
            .log_sum = log_sum,
            .entropy = entropy,
            .grad_logp = grad_logp,
            .grad_entropy = grad_entropy,
            .options = options,
            .grad_logits = tile, /* in the place of the logits */
        };
        check(ppok_logprob_backward_cpu(&args));
        product(0, 0, ROWS, HIDDEN, columns, tile, weight[first], first > 0, grad_hidden[0]);
        product(1, 0, columns, HIDDEN, ROWS, tile, hidden[0], 0, grad_weight[first]);
    }
}

static double worst;

static void compare(double got, double expected) {
    double error = fabs(got - expected) / (1.0 + fabs(expected));
    if (!(error <= worst)) worst = error;
}

static void compare_with_doubles(void) {
    static double z[ROWS][VOCAB], grad[ROWS][VOCAB];
    for (int n = 0; n < ROWS; n++) {
        double largest = -INFINITY, sum = 0.0, h = 0.0;
        for (int v = 0; v < VOCAB; v++) {
            z[n][v] = 0.0;
            for (int i = 0; i < HIDDEN; i++) z[n][v] += (double)hidden[n][i] * weight[v][i];
            z[n][v] /= TEMPERATURE;
            largest = fmax(largest, z[n][v]);
        }
        for (int v = 0; v < VOCAB; v++) sum += exp(z[n][v] - largest);
        for (int v = 0; v < VOCAB; v++) {
            z[n][v] -= largest + log(sum); /* ln p */
            h -= exp(z[n][v]) * z[n][v];
        }
        compare(logp[n], z[n][targets[n]]);
        compare(entropy[n], h);
        for (int v = 0; v < VOCAB; v++) {
            double p = exp(z[n][v]);
            grad[n][v] = grad_logp[n] * ((v == targets[n]) - p) - grad_entropy[n] * p * (z[n][v] + h);
            grad[n][v] /= TEMPERATURE;
        }
    }
    for (int i = 0; i < HIDDEN; i++) {
        for (int n = 0; n < ROWS; n++) {
            double sum = 0.0;
            for (int v = 0; v < VOCAB; v++) sum += grad[n][v] * weight[v][i];
            compare(grad_hidden[n][i], sum);
        }
        for (int v = 0; v < VOCAB; v++) {
            double sum = 0.0;
            for (int n = 0; n < ROWS; n++) sum += grad[n][v] * hidden[n][i];
            compare(grad_weight[v][i], sum);
        }
    }
}

int main(void) {
    for (int n = 0; n < ROWS; n++) {
        for (int i = 0; i < HIDDEN; i++) hidden[n][i] = 2.0f * uniform();
        targets[n] = (int64_t)((uniform() + 1.0f) * 0.49f * VOCAB);
        grad_logp[n] = uniform();
        grad_entropy[n] = 0.1f * uniform();
    }
    for (int v = 0; v < VOCAB; v++) {
        for (int i = 0; i < HIDDEN; i++) weight[v][i] = uniform();
    }
    ppok_logprob_options options;
    check(ppok_logprob_options_init(&options, sizeof options));
    options.temperature = TEMPERATURE;

    forward(&options);
    backward(&options);
    compare_with_doubles();
    printf("first log-probability %.4f, entropy %.4f; off by %.1e at worst\n", logp[0], entropy[0],
           worst);
    return worst < 1e-5 ? 0 : 1;
}
