"""Kernels compiled for every GPU that we serve, embedded in the plugin, compressed."""

load("@rules_cc//cc:defs.bzl", "cc_library")

# Code for the GPU itself; 86 runs that for 80. A suffix `a` (90a) is code for that one architecture, its PTX included.
_ARCHS = ["80", "89", "90", "100", "120"]

# PTX that a newer driver compiles for a GPU that we have no code for.
_PTX = ["80"]

# Architectures whose PTX is that of another but for its `.target`, unless a source asks for __CUDA_ARCH__ between the two:
# the compiler, which takes longer than the assembler, runs once for both.
_PTX_OF = {
    "89": "80",
    "120": "100",
}

# The oldest drivers, as cuDriverGetVersion counts, for code of third_party/ptxas and for that of the compiler's own assembler.
_DRIVER = 12000
_LATER_DRIVER = 13000

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ccbin=clang-19",
    "--Werror=all-warnings",
]

# PTX is rewritten as of the release before: what the compiler writes is known to that one, too.
_PTX_VERSION = "8.8"

def _ptx(ctx, arch):
    """One action for one architecture, so that they run side by side and are cached one by one."""
    out = ctx.actions.declare_file("%s.compute_%s.ptx" % (ctx.label.name, arch))
    arguments = ctx.actions.args()
    arguments.add(out)
    arguments.add(ctx.file._nvcc)
    arguments.add("-ptx")
    arguments.add("-arch=compute_" + arch)
    arguments.add_all(_FLAGS)

    # Which line code comes from is for profilers alone, and more than half of an image: `--define=lineinfo=on`.
    if ctx.var.get("lineinfo") == "on":
        arguments.add("-lineinfo")
    arguments.add_all(ctx.attr.copts)
    arguments.add_all(ctx.attr.defines, format_each = "-D%s")
    arguments.add("-I.")
    arguments.add(ctx.file.src)
    ctx.actions.run_shell(
        command = 'out=$1 && shift && "$@" -o "$out" && sed -i "s/^\\.version 9\\.0$/.version %s/" "$out"' % _PTX_VERSION,
        arguments = [arguments],
        inputs = [ctx.file.src] + ctx.files.hdrs,
        tools = [ctx.file._nvcc] + ctx.files._compiler,
        outputs = [out],
        mnemonic = "CudaCompile",
        progress_message = "Compiling %s for compute_%s" % (ctx.file.src.short_path, arch),
        use_default_shell_env = True,  # nvcc finds clang in PATH
    )
    return out

def _retarget(ctx, arch, of, ptx):
    """What _ptx() would make for `arch`, of what it made for `of`."""
    out = ctx.actions.declare_file("%s.compute_%s.ptx" % (ctx.label.name, arch))
    ctx.actions.run_shell(
        command = 'sed "s/^\\.target sm_%s$/.target sm_%s/" "$1" > "$2"' % (of, arch),
        arguments = [ptx.path, out.path],
        inputs = [ptx],
        outputs = [out],
        mnemonic = "CudaRetarget",
    )
    return out

def _all_ptx(ctx):
    """PTX by architecture: for each that is to be had as code or as PTX."""
    archs = depset(ctx.attr.archs + ctx.attr.ptx).to_list()
    made = {arch: _ptx(ctx, arch) for arch in archs if ctx.attr.ptx_of.get(arch) not in archs}
    for arch in archs:
        if arch not in made:
            of = ctx.attr.ptx_of[arch]
            made[arch] = _retarget(ctx, arch, of, made[of])
    return made

def _cubin(ctx, arch, ptx, name, ptxas):
    out = ctx.actions.declare_file("%s.%s.cubin" % (ctx.label.name, name))
    arguments = ctx.actions.args()
    arguments.add("-arch=sm_" + arch)
    if ctx.var.get("lineinfo") == "on":
        arguments.add("-lineinfo")
    arguments.add("-o", out)
    arguments.add(ptx)
    ctx.actions.run(
        executable = ptxas,
        arguments = [arguments],
        inputs = [ptx],
        outputs = [out],
        mnemonic = "CudaAssemble",
        progress_message = "Assembling %s for sm_%s" % (ctx.file.src.short_path, arch),
    )
    return out

def _packed(ctx, file, how):
    out = ctx.actions.declare_file(file.basename + ".xz")
    ctx.actions.run_shell(
        command = 'xz --format=raw --lzma2=preset=6,dict=8MiB,%s --stdout "$1" > "$2"' % how,
        arguments = [file.path, out.path],
        inputs = [file],
        outputs = [out],
        mnemonic = "CudaPack",
        use_default_shell_env = True,
    )
    return out

_Images = provider(fields = {"images": "a struct for each image: sm, driver and kind as in struct cuda_image, file, and that packed"})

def _images_impl(ctx):
    ptx = _all_ptx(ctx)
    code = [(arch, _DRIVER, _cubin(ctx, arch, ptx[arch], "sm_" + arch, ctx.file._ptxas)) for arch in ctx.attr.archs]
    code += [
        (arch, _LATER_DRIVER, _cubin(ctx, arch, ptx[arch], "later_sm_" + arch, ctx.file._later_ptxas))
        for arch in ctx.attr.later_archs
    ]
    images = []
    for arch, driver, cubin in code:
        exact = arch.endswith("a")

        # An instruction has 16 bytes: where a byte stands in one says most about it.
        packed = _packed(ctx, cubin, "lc=0,lp=4,pb=4")
        images.append(struct(
            driver = driver,
            file = cubin,
            kind = int(exact),
            packed = packed,
            sm = arch[:-1] if exact else arch,
        ))
    for arch in ctx.attr.ptx:
        packed = _packed(ctx, ptx[arch], "lc=3,lp=0,pb=0")
        images.append(struct(driver = _DRIVER, file = ptx[arch], kind = 2, packed = packed, sm = arch))
    return [_Images(images = images)]

_images = rule(
    implementation = _images_impl,
    attrs = {
        "archs": attr.string_list(),
        "copts": attr.string_list(),
        "defines": attr.string_list(),
        "hdrs": attr.label_list(allow_files = True),
        "later_archs": attr.string_list(),
        "ptx": attr.string_list(),
        "ptx_of": attr.string_dict(),
        "src": attr.label(allow_single_file = [".cu"], mandatory = True),
        "_compiler": attr.label(default = "@cuda//:compiler"),
        "_later_ptxas": attr.label(default = "@cuda//:bin/ptxas", allow_single_file = True),
        "_nvcc": attr.label(default = "@cuda//:bin/nvcc", allow_single_file = True),
        "_ptxas": attr.label(default = "@ptxas//:bin/ptxas", allow_single_file = True),
    },
)

# struct cuda_image of src/cuda_image.h, a label for each image's data, and the data.
_BEGIN = """\
    .section .rodata.{symbol}, "a"
    .balign 16
    .globl {symbol}
    .hidden {symbol}
    .type {symbol}, %object
{symbol}:
"""
_ENTRY = """\
    .long {sm}, {driver}, {kind}, .Ldata_{index} - {symbol}
    .quad $(stat -Lc %s {file}), .Lend_{index} - .Ldata_{index}
"""
_END_OF_ENTRIES = """\
    .zero 32
"""
_DATA = """\
.Ldata_{index}:
    .incbin "{packed}"
.Lend_{index}:
"""
_END = """\
    .size {symbol}, . - {symbol}
    .section .note.GNU-stack, "", %progbits
"""

def _embed_impl(ctx):
    images = ctx.attr.images[_Images].images
    out = ctx.actions.declare_file(ctx.label.name + ".o")
    values = [
        {
            "driver": i.driver,
            "file": i.file.path,
            "index": n,
            "kind": i.kind,
            "packed": i.packed.path,
            "sm": i.sm,
            "symbol": ctx.attr.symbol,
        }
        for n, i in enumerate(images)
    ]
    source = "".join(
        [_BEGIN.format(symbol = ctx.attr.symbol)] + [_ENTRY.format(**v) for v in values] + [_END_OF_ENTRIES] +
        [_DATA.format(**v) for v in values] + [_END.format(symbol = ctx.attr.symbol)],
    )

    # An action of our own: cc_library would not see that a new image changes what .incbin brings.
    ctx.actions.run_shell(
        command = 'clang-19 -c -x assembler -o "$1" - <<END\n%sEND' % source,
        arguments = [out.path],
        inputs = [i.file for i in images] + [i.packed for i in images],
        outputs = [out],
        mnemonic = "CudaEmbed",
        use_default_shell_env = True,
    )
    code = [i.file for i in images if i.kind != 2]
    return [DefaultInfo(files = depset([out])), OutputGroupInfo(code = depset(code))]

_embed = rule(
    implementation = _embed_impl,
    attrs = {
        # The host configuration keeps one copy for plain, sanitizer and release builds: kernels take minutes to compile.
        "images": attr.label(cfg = "host", mandatory = True, providers = [_Images]),
        "symbol": attr.string(mandatory = True),
    },
)

def cuda_images(
        name,
        src,
        hdrs = [],
        archs = _ARCHS,
        later_archs = [],
        ptx = _PTX,
        ptx_of = _PTX_OF,
        defines = [],
        copts = [],
        **kwargs):
    """A cc_library with the symbol `const struct cuda_image NAME[]`: one source, compiled for each GPU, packed.

    Of these the plugin loads the best for a GPU (src/cuda_image.h). Sources that are variants of one template give other
    `defines`; each is a target, and a module, of its own.

    Args:
      name: the target and the symbol; hidden, so that only the plugin itself sees it.
      src: the .cu file. Includes are relative to the root of the repository.
      hdrs: the headers that it includes.
      archs: the architectures to compile code for, such as ["90a"]; each is a compilation of its own.
      later_archs: of these, what is assembled again by CUDA 13's ptxas, for drivers that load that: where it is faster.
      ptx: the architectures to add PTX for. Give [] where the source works on its own archs alone.
      ptx_of: architectures whose PTX is that of another one. Leave out those between which the source asks for __CUDA_ARCH__.
      defines: macros, without -D.
      copts: more flags for nvcc.
      **kwargs: visibility, tags and the like for the cc_library.
    """
    _images(
        name = name + ".images",
        src = src,
        hdrs = hdrs,
        archs = archs,
        copts = copts,
        defines = defines,
        later_archs = later_archs,
        ptx = ptx,
        ptx_of = ptx_of,
        tags = ["manual"],  # built through _embed alone
        visibility = kwargs.get("visibility"),
    )
    _embed(
        name = name + ".embed",
        images = ":" + name + ".images",
        symbol = name,
    )
    cc_library(
        name = name,
        srcs = [name + ".embed"],
        **kwargs
    )
