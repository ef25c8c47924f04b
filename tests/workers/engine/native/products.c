/* What the tests call of the kernels' inner parts; compiled together with them. */
#include <stdlib.h>

#include "tailrace.h"

int test_rounds_to_bf16(void) { return rounds_to_bf16(); }

void test_row(const Matrix *matrix, int row, float *out) { matrix_row(matrix, row, out); }

/* Round `x` (`[inputs]`) to codes. */
void test_round(const float *x, int inputs, int8_t *codes, float *scales, float *sums) {
    operand_row(FORMAT_Q8, x, inputs, NULL, codes, scales, sums);
}

/* Multiply `x` (`[rows, inputs]`) with all pairs of tiles of the matrix. */
void test_multiply(const Matrix *matrix, const float *x, int rows, int finish, float *out, int stride) {
    int inputs = matrix->inputs, groups = inputs / GROUP;
    size_t numbers = (size_t)rows * inputs;
    uint16_t *bf16 = malloc(numbers * 2);
    int8_t *codes = malloc(numbers);
    float *scales = malloc(((size_t)rows * groups + 1) * 4), *sums = malloc(((size_t)rows * groups + 1) * 4);
    for (int row = 0; row < rows; row++) {
        size_t at = (size_t)row * inputs, group = (size_t)row * groups;
        if (matrix->format != FORMAT_F32)
            operand_row(matrix->format, x + at, inputs, bf16 + at, codes + at, scales + group, sums + group);
    }
    Operand operand = {.inputs = inputs, .f32 = x, .bf16 = bf16, .codes = codes, .scales = scales, .sums = sums};
    linear_pairs(matrix, &operand, rows, 0, (matrix->outputs + PAIR - 1) / PAIR, (Finish)finish, out, stride);
    free(bf16);
    free(codes);
    free(scales);
    free(sums);
}
