package dlattn;

import java.lang.foreign.AddressLayout;
import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.foreign.ValueLayout;
import java.lang.invoke.MethodHandle;
import java.nio.file.Path;

/** The table of functions of abi/dlattn.h, of which this needs the first; it is append-only. Offsets are in bytes. */
final class Library {
    static final int CPU = 1;                 // kDLCPU
    static final long WINDOW = 1;             // DLATTN_WINDOW
    static final int SLOTS = 20;              // of dlattn_tensors in ABI 1.1; older libraries take zeros behind what they know
    static final int KEY_LENGTHS = 10, BLOCK_TABLE = 13, QUERY_SCALE = 17, KEY_SCALE = 18, VALUE_SCALE = 19; // among these
    private static final long SKU = 104, EXEC = 56, TABLE = 56;
    private static final String SONAME = "libdlattn.so.1";
    private static final AddressLayout TEXT =
        ValueLayout.ADDRESS.withTargetLayout(MemoryLayout.sequenceLayout(1 << 16, ValueLayout.JAVA_BYTE));

    private final MethodHandle version, lastError, forwardQuery, forward;

    private static final class Holder {
        static final Library INSTANCE = new Library();
    }

    /** Found when it is first asked for, and never closed: its threads outlive every caller. */
    static Library get() { return Holder.INSTANCE; }

    private Library() {
        final Linker linker = Linker.nativeLinker();
        final FunctionDescriptor getApi = FunctionDescriptor.of(
            ValueLayout.ADDRESS.withTargetLayout(MemoryLayout.sequenceLayout(TABLE, ValueLayout.JAVA_BYTE)), ValueLayout.JAVA_INT);
        final MemorySegment table = (MemorySegment) call(linker.downcallHandle(symbol(), getApi), 1);
        if (table.address() == 0 || table.get(ValueLayout.JAVA_LONG, 0) < TABLE)
            throw new UnsatisfiedLinkError(SONAME + " does not serve ABI 1");
        final FunctionDescriptor text = FunctionDescriptor.of(TEXT);
        final FunctionDescriptor run = FunctionDescriptor.of(
            ValueLayout.JAVA_INT, ValueLayout.ADDRESS, ValueLayout.ADDRESS, ValueLayout.ADDRESS);
        version = linker.downcallHandle(table.get(ValueLayout.ADDRESS, 16), text);
        lastError = linker.downcallHandle(table.get(ValueLayout.ADDRESS, 24), text);
        forwardQuery = linker.downcallHandle(table.get(ValueLayout.ADDRESS, 40), run);
        forward = linker.downcallHandle(table.get(ValueLayout.ADDRESS, 48), run);
    }

    private static MemorySegment symbol() {
        final String named = System.getenv("DLATTN_LIBRARY");
        final boolean isNamed = named != null && !named.isEmpty();
        try {
            final SymbolLookup library = isNamed ? SymbolLookup.libraryLookup(Path.of(named), Arena.global())
                                                 : SymbolLookup.libraryLookup(SONAME, Arena.global());
            return library.find("dlattn_get_api").orElseThrow(() -> new UnsatisfiedLinkError("has no dlattn_get_api"));
        } catch (IllegalArgumentException error) {
            throw new UnsatisfiedLinkError(SONAME + " was not found: " + error.getMessage()
                + (isNamed ? "" : "; DLATTN_LIBRARY may name it"));
        }
    }

    String version() { return ((MemorySegment) call(version)).getString(0); }

    /** Asks for the workspace and runs; all memory is the arena's. */
    void forward(Arena arena, MemorySegment desc, MemorySegment tensors) {
        final MemorySegment sku = arena.allocate(SKU, 8), exec = arena.allocate(EXEC, 8);
        sku.set(ValueLayout.JAVA_LONG, 0, SKU);
        check((int) call(forwardQuery, desc, tensors, sku));
        final long bytes = sku.get(ValueLayout.JAVA_LONG, 56), alignment = sku.get(ValueLayout.JAVA_LONG, 64);
        exec.set(ValueLayout.JAVA_LONG, 0, EXEC);
        if (bytes > 0)
            exec.set(ValueLayout.ADDRESS, 24, arena.allocate(bytes, Math.max(alignment, 1)));
        exec.set(ValueLayout.JAVA_LONG, 32, bytes);
        check((int) call(forward, desc, tensors, exec));
    }

    private void check(int status) {
        if (status != 0)
            throw new DlattnException(status, ((MemorySegment) call(lastError)).getString(0));
    }

    private static Object call(MethodHandle function, Object... arguments) {
        try {
            return function.invokeWithArguments(arguments);
        } catch (RuntimeException | Error error) {
            throw error;
        } catch (Throwable error) {
            throw new IllegalStateException(error);
        }
    }
}
