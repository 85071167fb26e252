package dlattn;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import java.util.Arrays;

/**
 * Attention by libdlattn.so.1, through Java's foreign functions: no JNI, no C compiler. Needs JDK 22 and
 * {@code --enable-native-access}. The library is searched where DLATTN_LIBRARY says and nowhere else, or where the system looks.
 *
 * <pre>
 * try (Arena arena = Arena.ofConfined()) {
 *     Tensor query = Tensor.of(arena, numbers, 1, 8, 128, 64);
 *     float[] output = Attention.run(arena, query, key, value, new Options().withCausal()).output().floats();
 * }
 * </pre>
 */
public final class Attention {
    private Attention() {}

    /** Output [B, H, Lq, D_v], and [B, H, Lq] or null. */
    public record Result(Tensor output, Tensor lse) {}

    /** Version of the library that is in use. */
    public static String version() { return Library.get().version(); }

    /**
     * softmax(scale * query key^T) value over the keys that are visible. query is [B, H, Lq, D], key [B, H_kv, Lk, D], value
     * [B, H_kv, Lk, D_v], and H a multiple of H_kv. They are of one type, or of float8, each its own. The output is of the query's
     * type, or FLOAT32 if that is float8. The results are made in the arena, and are there on return.
     */
    public static Result run(Arena arena, Tensor query, Tensor key, Tensor value, Options options) {
        final long[] rows = query.shape(), shape = rows.clone();
        if (rows.length != 4 || value.shape().length != 4)
            throw new IllegalArgumentException("query, value: must have 4 axes");
        shape[3] = value.shape()[3];
        final Tensor output = Tensor.zeros(arena, query.type().bits == 8 ? Tensor.Type.FLOAT32 : query.type(), shape);
        final Tensor lse = options.lse() ? Tensor.zeros(arena, Tensor.Type.FLOAT32, Arrays.copyOf(rows, 3)) : null;
        try (Arena call = Arena.ofConfined()) {
            final Tensor[] tensors = Arrays.copyOf(new Tensor[] {query, key, value, output, lse}, Library.SLOTS);
            final Options.Tensors optional = options.tensors();
            tensors[Library.KEY_LENGTHS] = optional.keyLengths();
            tensors[Library.BLOCK_TABLE] = optional.blockTable();
            tensors[Library.QUERY_SCALE] = optional.queryScale();
            tensors[Library.KEY_SCALE] = optional.keyScale();
            tensors[Library.VALUE_SCALE] = optional.valueScale();
            Library.get().forward(call, described(call, options), slots(call, tensors));
        }
        return new Result(output, lse);
    }

    /** A dlattn_tensors. */
    private static MemorySegment slots(Arena arena, Tensor[] tensors) {
        final long bytes = 8 + 8 * tensors.length;
        final MemorySegment slots = arena.allocate(bytes, 8);
        slots.set(ValueLayout.JAVA_LONG, 0, bytes);
        for (int i = 0; i < tensors.length; i++)
            if (tensors[i] != null)
                slots.set(ValueLayout.ADDRESS, 8 + 8 * i, described(arena, tensors[i]));
        return slots;
    }

    /** A DLTensor; without strides it is row-major. */
    private static MemorySegment described(Arena arena, Tensor tensor) {
        final MemorySegment t = arena.allocate(48, 8);
        t.set(ValueLayout.ADDRESS, 0, tensor.data());
        t.set(ValueLayout.JAVA_INT, 8, Library.CPU);
        t.set(ValueLayout.JAVA_INT, 16, tensor.shape().length);
        t.set(ValueLayout.JAVA_BYTE, 20, tensor.type().code);
        t.set(ValueLayout.JAVA_BYTE, 21, tensor.type().bits);
        t.set(ValueLayout.JAVA_SHORT, 22, (short) 1);
        t.set(ValueLayout.ADDRESS, 24, arena.allocateFrom(ValueLayout.JAVA_LONG, tensor.shape()));
        return t;
    }

    /** A dlattn_forward_desc as it was in ABI 1.0. */
    private static MemorySegment described(Arena arena, Options options) {
        final MemorySegment d = arena.allocate(88, 8);
        d.set(ValueLayout.JAVA_LONG, 0, 88);
        d.set(ValueLayout.JAVA_DOUBLE, 16, options.scale());
        d.set(ValueLayout.JAVA_DOUBLE, 24, options.softcap());
        if (options.window() != null) {
            d.set(ValueLayout.JAVA_LONG, 8, Library.WINDOW);
            d.set(ValueLayout.JAVA_LONG, 32, options.window()[0]);
            d.set(ValueLayout.JAVA_LONG, 40, options.window()[1]);
        }
        d.set(ValueLayout.JAVA_INT, 48, options.causal() ? 1 : 0);
        d.set(ValueLayout.JAVA_INT, 52, options.bottomRight() ? 1 : 0);
        if (options.kernel() != null)
            d.set(ValueLayout.ADDRESS, 72, arena.allocateFrom(options.kernel()));
        d.set(ValueLayout.JAVA_INT, 80, options.numThreads());
        return d;
    }
}
