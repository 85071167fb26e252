"""Stand-ins for the libraries of glibc 2.17: README.md."""

load("@rules_cc//cc:defs.bzl", "cc_binary")

# All that shipped C code may ask of glibc, by library and version of x86-64; Arm's have one version. Data of a pointer's size has a *. What ends
# in _chk is asked for where _FORTIFY_SOURCE is on, as it is by `-c opt`.
_SYMBOLS = {
    "libdl.so.2": {
        "GLIBC_2.2.5": "dladdr dlclose dlerror dlopen dlsym",
    },
    "libpthread.so.0": {
        "GLIBC_2.2.5": """
            pthread_attr_destroy pthread_attr_init pthread_attr_setdetachstate pthread_create pthread_detach pthread_getspecific
            pthread_join pthread_key_create pthread_mutex_lock pthread_mutex_unlock pthread_once pthread_setspecific
            pthread_sigmask
        """,
    },
    "libm.so.6": {
        "GLIBC_2.2.5": "ceil exp exp2 exp2f expf frexp ldexp ldexpf log log2 log2f logf pow powf rint tanh",
    },
    "libc.so.6": {
        "GLIBC_2.2.5": """
            __cxa_finalize __libc_start_main bcmp calloc fprintf fputs free fwrite getenv malloc memcmp memmove memset printf putc puts
            sched_yield sigfillset snprintf stderr* stdout* strcmp strcpy strcspn strlen strrchr strspn strtol syscall sysconf
            vsnprintf
        """,
        "GLIBC_2.3.2": "__register_atfork",
        "GLIBC_2.3.4": """
            __fprintf_chk __memcpy_chk __memmove_chk __memset_chk __printf_chk __snprintf_chk __sprintf_chk __strcpy_chk __vsnprintf_chk
            sched_getaffinity
        """,
        "GLIBC_2.4": "__stack_chk_fail",
        "GLIBC_2.6": "__sched_cpucount",
        "GLIBC_2.14": "memcpy",
        "GLIBC_2.16": "aligned_alloc",
        "GLIBC_2.17": "clock_gettime",
    },
}
_TARGETS = ["//third_party/glibc:" + name for name in _SYMBOLS]

# For additional_linker_inputs and linkopts of what is shipped; checkers bring some of these functions themselves.
OLD_GLIBC = select({
    "//third_party/glibc:checked": [],
    "//conditions:default": _TARGETS,
})
LINK_OLD_GLIBC = select({
    "//third_party/glibc:checked": [],
    "//conditions:default": ["$(location %s)" % target for target in _TARGETS] + [
        "-Wl,--allow-shlib-undefined",  # what the system's libmvec asks of libm
    ],
})

def _words(text):
    return [word for word in text.replace("\n", " ").split(" ") if word]

def _assembly(symbols):
    return [
        ".comm %s, 8, 8" % symbol[:-1] if symbol.endswith("*") else ".globl {0}; .type {0}, %function; {0}:".format(symbol)
        for symbol in _words(symbols)
    ]

def _version_script(versions):
    return [
        "%s { global: %s; local: *; };" % (version, "; ".join(_words(symbols.replace("*", ""))))
        for version, symbols in versions.items()
    ]

def _print(lines):
    return "printf '%%s\\n' %s > $@" % " ".join(["'%s'" % line for line in lines])

def old_glibc():
    """The libraries."""
    for soname, versions in _SYMBOLS.items():
        base = soname.partition(".")[0]
        symbols = " ".join(versions.values())
        native.genrule(
            name = base + "_source",
            outs = [base + ".S"],
            cmd = _print(_assembly(symbols)),
        )
        native.genrule(
            name = base + "_versions",
            outs = [base + ".map"],
            cmd = select({
                "//:aarch64": _print(_version_script({"GLIBC_2.17": symbols})),
                "//conditions:default": _print(_version_script(versions)),
            }),
        )
        cc_binary(
            name = soname,
            srcs = [base + ".S"],
            additional_linker_inputs = [base + ".map"],
            linkopts = [
                "-nostdlib",
                "-Wl,-soname," + soname,
                "-Wl,--version-script=$(location %s.map)" % base,
            ],
            linkshared = 1,
            visibility = ["//visibility:public"],
        )
