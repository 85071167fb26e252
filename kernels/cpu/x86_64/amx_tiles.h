/* The tile registers of AMX, as every row with tiles has them. Included after vec_avx512.h. */
#ifndef DLATTN_CPU_AMX_TILES_H_
#define DLATTN_CPU_AMX_TILES_H_

enum {
    ROWS = 16, /* of a tile */
    STEP = 32, /* elements of a tile along the summed axis */
    PAIRS = STEP / 2,
    TILE = ROWS * PAIRS /* words */
};

/* Every tile 16 rows of 64 bytes (Intel SDM, LDTILECFG). */
VEC_FN static void enter(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = ROWS;
    }
    _tile_loadconfig(&config);
}

VEC_FN static void leave(void) { _tile_release(); }

#endif /* DLATTN_CPU_AMX_TILES_H_ */
