"""The images of the CUDA rows: one for each FOLDER/NAME.cu, or several where it is compiled in parts."""

load("@rules_cc//cc:defs.bzl", "cc_library")
load("//third_party/cuda:image.bzl", "cuda_images")

def cuda_rows(name, different):
    """A cc_library of all rows in this package, and NAME_code, a filegroup of what the assembler made of them.

    FOLDER/NAME.cu becomes NAME_images, with the headers of its folder and of common/, for all GPUs that we serve.

    Args:
      name: of the library.
      different: for rows that are compiled otherwise, by name: `archs`, `later_archs`, `ptx` and `ptx_of` of their cuda_images;
        `folders` whose headers they have, too; `parts`, by name, the macros with which a part of the row is compiled into
        NAME_PART_images.
    """
    targets = []
    for src in native.glob(["*/*.cu"]):
        folder, row = src[:-len(".cu")].split("/")
        options = dict(different.get(row, {}))
        of_src = ["//src:philox.h"] + (["//src:tensor_map.h"] if folder == "sm90" else [])
        folders = ["common", folder] + options.pop("folders", [])
        headers = ["%s/%s" % (of, kind) for of in folders for kind in ["*.cuh", "*.inc", "*params.h", "*sizes.h"]]
        for part, defines in options.pop("parts", {"": []}).items():
            target = "_".join([row, part, "images"] if part else [row, "images"])
            targets.append(target)
            cuda_images(
                name = target,
                src = src,
                # Gradients may need what forward has, never the reverse.
                hdrs = native.glob(headers, exclude = [] if "_bwd_" in row else ["*/bwd*"]) + of_src,
                defines = defines,
                visibility = ["//tests:__subpackages__"],
                **options
            )
    cc_library(
        name = name,
        srcs = native.glob(["*/*.c"]),
        hdrs = native.glob(["*/*.h", "*/*.inc"]),
        visibility = ["//kernels:__pkg__"],
        deps = ["//src:kernel"] + targets,
    )
    native.filegroup(
        name = name + "_code",
        srcs = [target + ".embed" for target in targets],
        output_group = "code",
        visibility = ["//tests:__subpackages__"],
    )
