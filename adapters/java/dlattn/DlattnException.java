package dlattn;

/** A refusal of the library, in its own words. */
public final class DlattnException extends RuntimeException {
    private static final long serialVersionUID = 1;

    private final int status;

    DlattnException(int status, String message) {
        super(message);
        this.status = status;
    }

    /** DLATTN_* of dlattn.h: 1 is an invalid argument, 2 what no kernel does. */
    public int status() { return status; }
}
