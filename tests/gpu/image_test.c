/*
 * What the plugin unpacks for which GPU and driver. The row of merge has code and PTX for all, cuda_fwd_sm90 code for one, and
 * cuda_fwd_sm80 code of two assemblers for one.
 */
#include "src/cuda_image.h"
#include "src/error.h"
#include "src/kernel.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <elf.h>
#include <stdlib.h>
#include <string.h>

extern const struct cuda_image cuda_merge_simt_images[], cuda_fwd_sm80_images[],
    cuda_fwd_sm90_64_images[];

enum { EM_CUDA_GPU = 190, NO_CODE = -1, PTX = 0, CUDA_12 = 12000, CUDA_13 = 13000 };

/* The architecture whose code is unpacked for a GPU and a driver: a number, PTX or NO_CODE. */
static int unpacked_for(const struct cuda_image *images, int32_t sm, int32_t driver) {
    void *code;
    const int32_t status = cuda_image_unpack(images, sm, driver, &code);
    if (status != DLATTN_OK) {
        cr_assert(eq(i32, status, DLATTN_UNSUPPORTED));
        return NO_CODE;
    }
    Elf64_Ehdr header;
    memcpy(&header, code, sizeof header);
    int arch = PTX;
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) == 0) {
        cr_assert(eq(int, header.e_machine, EM_CUDA_GPU));
        /* Where code of CUDA 12.8 and later, ABI version 8, has it: in the second byte. */
        const bool second = header.e_ident[EI_ABIVERSION] >= 8;
        arch = (int)(header.e_flags >> (second ? 8 : 0) & 0xff);
    } else {
        char *const end = strrchr(code, '}');
        cr_assert(ne(ptr, strstr(code, ".target sm_80"), NULL));
        cr_assert(ne(ptr, end, NULL));
        cr_assert(lt(sz, strlen(end), 8), "the text is whole");
    }
    free(code);
    return arch;
}

Test(image, the_best_for_each_gpu) {
    static const int all[][2] = {{75, NO_CODE}, {80, 80},   {86, 80},   {87, 80},
                                 {89, 89},      {90, 90},   {100, 100}, {103, 100},
                                 {110, PTX},    {120, 120}, {121, 120}};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        for (int32_t driver = CUDA_12; driver <= CUDA_13; driver += CUDA_13 - CUDA_12)
            cr_expect(eq(int, unpacked_for(cuda_merge_simt_images, all[i][0], driver), all[i][1]),
                      "sm_%d", all[i][0]);
    for (int32_t sm = 75; sm <= 121; sm++)
        cr_expect(
            eq(int, unpacked_for(cuda_fwd_sm90_64_images, sm, CUDA_12), sm == 90 ? 90 : NO_CODE),
            "sm_%d", sm);
}

/* The version of the ELF's ABI: 7 is CUDA 12's, 8 that of CUDA 13. */
static int abi_for(int32_t sm, int32_t driver) {
    unsigned char *code;
    cr_assert(
        eq(i32, cuda_image_unpack(cuda_fwd_sm80_images, sm, driver, (void **)&code), DLATTN_OK));
    const int abi = code[EI_ABIVERSION];
    free(code);
    return abi;
}

Test(image, later_code_for_later_drivers) {
    cr_expect(eq(int, abi_for(90, CUDA_12), 7));
    cr_expect(eq(int, abi_for(90, CUDA_13 - 10), 7));
    cr_expect(eq(int, abi_for(90, CUDA_13), 8));
    cr_expect(eq(int, abi_for(80, CUDA_13), 7), "none was measured there");
}

/* A copy of one image whose data lie at an offset of their own. */
struct one_image {
    struct cuda_image images[2];
    unsigned char data[];
};

static struct one_image *copy_of(const struct cuda_image *image, const struct cuda_image *images) {
    struct one_image *const copy = calloc(1, sizeof *copy + image->packed_bytes);
    cr_assert(ne(ptr, copy, NULL));
    copy->images[0] = *image;
    copy->images[0].offset = sizeof *copy;
    memcpy(copy->data, (const unsigned char *)images + image->offset, image->packed_bytes);
    return copy;
}

Test(image, damage_is_seen) {
    void *code = NULL;
    struct one_image *const copy = copy_of(&cuda_merge_simt_images[0], cuda_merge_simt_images);
    const int32_t sm = copy->images[0].sm;
    cr_assert(eq(i32, cuda_image_unpack(copy->images, sm, CUDA_12, &code), DLATTN_OK));
    free(code);
    code = NULL;
    copy->images[0].bytes++;
    cr_expect(eq(i32, cuda_image_unpack(copy->images, sm, CUDA_12, &code), DLATTN_INTERNAL));
    copy->images[0].bytes -= 2;
    cr_expect(eq(i32, cuda_image_unpack(copy->images, sm, CUDA_12, &code), DLATTN_INTERNAL));
    copy->images[0].bytes++;
    copy->images[0].packed_bytes--;
    cr_expect(eq(i32, cuda_image_unpack(copy->images, sm, CUDA_12, &code), DLATTN_INTERNAL));
    copy->images[0].packed_bytes++;
    copy->data[0] ^= 0x7f; /* LZMA2 has no such chunk */
    cr_expect(eq(i32, cuda_image_unpack(copy->images, sm, CUDA_12, &code), DLATTN_INTERNAL));
    cr_expect(eq(ptr, code, NULL));
    cr_expect(ne(ptr, strstr(error_last(), "damaged"), NULL));
    free(copy);
}
