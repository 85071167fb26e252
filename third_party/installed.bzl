"""A repository that is a folder which `./dev` has put in place, or one line that says so."""

def _impl(ctx):
    folder = ctx.path(Label("//:WORKSPACE")).dirname.get_child(".deps").get_child(ctx.name)
    if not folder.exists:
        fail("there is no .deps/%s yet: run ./dev lib first, which installs what builds need" % ctx.name)
    for entry in folder.readdir():
        ctx.symlink(entry, entry.basename)
    ctx.symlink(ctx.attr.build_file, "BUILD")

installed = repository_rule(
    implementation = _impl,
    attrs = {"build_file": attr.label(mandatory = True)},
    local = True,
)
