"""Stand-ins for the libraries of glibc 2.17: README.md."""

load("@rules_cc//cc:defs.bzl", "cc_binary")

# Functions whose version has changed since; all are of the first version for their machine. A linker knows one library of a name,
# so those of libm and libc, whose others are needed as well, stand beside libdl's: at run time a function is looked for
# in all libraries by its name and version alone.
_VERSIONS = {
    "//:aarch64": "GLIBC_2.17",
    "//conditions:default": "GLIBC_2.2.5",
}
_FUNCTIONS = {
    "libdl.so.2": [
        "__libc_start_main",
        "dladdr",
        "dlclose",
        "dlerror",
        "dlopen",
        "dlsym",
        "exp",
        "exp2",
        "exp2f",
        "expf",
        "log",
        "log2",
        "log2f",
        "logf",
        "pow",
        "powf",
    ],
    "libpthread.so.0": [
        "pthread_create",
        "pthread_detach",
        "pthread_getspecific",
        "pthread_join",
        "pthread_key_create",
        "pthread_once",
        "pthread_setspecific",
        "pthread_sigmask",
    ],
}
_TARGETS = ["//third_party/glibc:" + name for name in _FUNCTIONS]

# For additional_linker_inputs and linkopts of what is shipped; checkers bring some of these functions themselves.
OLD_GLIBC = select({
    "//third_party/glibc:checked": [],
    "//conditions:default": _TARGETS,
})
LINK_OLD_GLIBC = select({
    "//third_party/glibc:checked": [],
    "//conditions:default": ["$(location %s)" % target for target in _TARGETS],
})

def old_glibc():
    """The two libraries."""
    for soname, functions in _FUNCTIONS.items():
        base = soname.partition(".")[0]
        native.genrule(
            name = base + "_source",
            outs = [base + ".S"],
            cmd = "printf '.globl %%s\\n.type %%s, %%%%function\\n%%s:\\n' %s > $@" % (
                " ".join([" ".join([f] * 3) for f in functions])
            ),
        )
        native.genrule(
            name = base + "_versions",
            outs = [base + ".map"],
            cmd = select({
                machine: "echo '%s { global: %s; local: *; };' > $@" % (version, "; ".join(functions))
                for machine, version in _VERSIONS.items()
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
