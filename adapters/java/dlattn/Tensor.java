package dlattn;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;

/**
 * A tensor in memory outside of Java's heap, row-major without gaps; for attention its axes are [batch, heads, length, head_dim].
 * Its memory lives as long as the arena that it came from.
 */
public record Tensor(MemorySegment data, Type type, long... shape) {
    /** What a tensor holds; of those of 16 and 8 bits Java has only the bits. */
    public enum Type {
        FLOAT16(2, 16), BFLOAT16(4, 16), FLOAT32(2, 32), FLOAT64(2, 64), FLOAT8_E4M3FN(10, 8), FLOAT8_E5M2(12, 8), INT32(0, 32);

        final byte code, bits; // of DLPack

        Type(int code, int bits) {
            this.code = (byte) code;
            this.bits = (byte) bits;
        }
    }

    public Tensor {
        final long bytes = count(shape) * type.bits / 8;
        if (data.byteSize() != bytes)
            throw new IllegalArgumentException("data: has " + data.byteSize() + " bytes, shape needs " + bytes);
        if (!data.isNative())
            throw new IllegalArgumentException("data: is in Java's heap, must be in native memory");
    }

    /** A copy of these numbers. */
    public static Tensor of(Arena arena, float[] numbers, long... shape) {
        return new Tensor(arena.allocateFrom(ValueLayout.JAVA_FLOAT, numbers), Type.FLOAT32, shape);
    }

    /** A copy of these numbers. */
    public static Tensor of(Arena arena, double[] numbers, long... shape) {
        return new Tensor(arena.allocateFrom(ValueLayout.JAVA_DOUBLE, numbers), Type.FLOAT64, shape);
    }

    /** A copy of these numbers. */
    public static Tensor of(Arena arena, int[] numbers, long... shape) {
        return new Tensor(arena.allocateFrom(ValueLayout.JAVA_INT, numbers), Type.INT32, shape);
    }

    /** A copy of these bytes, which hold numbers of that type: the codes of float8, one a byte. */
    public static Tensor of(Arena arena, byte[] bytes, Type type, long... shape) {
        return new Tensor(arena.allocate(bytes.length, 8).copyFrom(MemorySegment.ofArray(bytes)), type, shape);
    }

    /** Zeros. */
    public static Tensor zeros(Arena arena, Type type, long... shape) {
        return new Tensor(arena.allocate(Math.max(count(shape) * type.bits / 8, 0), 8), type, shape);
    }

    /** A copy of the numbers of a FLOAT32 tensor. */
    public float[] floats() { return data.toArray(ValueLayout.JAVA_FLOAT); }

    /** A copy of the numbers of a FLOAT64 tensor. */
    public double[] doubles() { return data.toArray(ValueLayout.JAVA_DOUBLE); }

    private static long count(long[] shape) {
        long n = 1;
        for (long extent : shape)
            n = Math.multiplyExact(n, extent);
        return n;
    }
}
