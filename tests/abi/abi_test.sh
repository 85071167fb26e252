#!/usr/bin/env bash
# What the plugin is as a file, and how headers, clients and libraries of different times go together.
# Arguments: the files of BUILD, by name. Prints one line for each check, and totals in Criterion's words.
set -uo pipefail
declare -A file
for argument in "$@"; do
    file[${argument%%=*}]=$PWD/${argument#*=}
done
library=${file[library]} scratch=$TEST_TMPDIR good=0 bad=0
unset DLATTN_LIBRARY LD_LIBRARY_PATH

# check WHAT COMMAND...: counts the command; shows what it printed if it fails.
check() {
    if "${@:2}" >"$scratch/log" 2>&1; then
        good=$((good + 1))
        echo "[PASS] $1"
    else
        bad=$((bad + 1))
        echo "[FAIL] $1"
        sed 's/^/    /' "$scratch/log"
    fi
}

# same WANTED COMMAND...: the command prints exactly this.
same() { diff <(printf '%s\n' "$1") <("${@:2}"); }

# says PATTERN COMMAND...: the command prints a line with the pattern.
says() {
    "${@:2}" | tee "$scratch/said" | grep -qE -- "$1" || { cat "$scratch/said"; return 1; }
}

# ---- Headers: each compiles alone, in both languages, without a warning

include=(-I"$(dirname "${file[header]}")" -isystem "$(dirname "$(dirname "${file[dlpack]}")")")
strict=(-Wall -Wextra -pedantic -Wshadow -Wconversion -Werror -O2 -c -o /dev/null)
# A host that has included a system header before, which settles what those that follow declare.
cat >"$scratch/host.c" <<'END'
#include <stdio.h>
#include "dlattn_loader.h"
int main(void) {
    char why[1024];
    return puts(dlattn_open(why, sizeof why) ? "ok" : why);
}
END
compiles() { # WHAT FLAG... FILE, by both compilers in both languages
    local what=$1 compiler
    shift
    for compiler in "gcc-12 -Wformat-truncation=2" clang-19; do
        # shellcheck disable=SC2086 # a compiler with its own flag
        check "$what as C11 for ${compiler%% *}" $compiler -std=c11 "${strict[@]}" "${include[@]}" -x c "$@"
        # shellcheck disable=SC2086
        check "$what as C++17 for ${compiler%% *}" ${compiler/gcc/g++} -std=c++17 -Wold-style-cast \
            "${strict[@]}" "${include[@]}" -x c++ "$@"
    done
}
for header in header loader frozen; do
    compiles "$(basename "${file[$header]}")" -include "${file[$header]}" /dev/null
done
compiles "dlattn_loader.h after <stdio.h>" "$scratch/host.c"

# ---- The file

exported() { nm -D --defined-only "$library" | awk '{ print $2, $3 }'; }
dynamic() { readelf -dW "$library" | grep -oP "\($1\).*\[\K[^]]+" | sort; }
needed_only() { ! dynamic NEEDED | grep -vxE 'lib(c|m)\.so\.6|libdl\.so\.2|libpthread\.so\.0|ld-linux-x86-64\.so\.2'; }
# Of the versions of glibc's symbols that it asks for: see third_party/glibc.
old_glibc() { [ "$(readelf -VW "$library" | grep -oP 'GLIBC_2\.\K[0-9]+' | sort -n | tail -n 1)" -le 17 ]; }
no_textrel() { ! readelf -dW "$library" | grep TEXTREL; }
# crtbegin's frame_dummy is the one entry that every object has.
no_constructors() { readelf -dW "$library" | awk '/INIT_ARRAYSZ/ { n = $(NF - 1) } END { print n + 0; exit n > 8 }'; }
# What is loaded: debug information is not handed out.
small() {
    local bytes=0 size
    for size in $(readelf -lW "$library" | awk '$1 == "LOAD" { print $5 }'); do
        bytes=$((bytes + size))
    done
    echo "$bytes"
    [ "$bytes" -lt $((20 * 1024 * 1024)) ]
}

check "exports dlattn_get_api alone" same 'T dlattn_get_api@@DLATTN_1' exported
check "needs libc's libraries and the loader alone" needed_only
check "asks for no symbol of a glibc after 2.17" old_glibc
check "is called libdlattn.so.1" same libdlattn.so.1 dynamic SONAME
check "binds at once" says 'BIND_NOW|Flags:.* NOW' readelf -dW "$library"
check "is never unloaded" says NODELETE readelf -dW "$library"
check "has read-only relocations" says GNU_RELRO readelf -lW "$library"
check "has no executable stack" says 'GNU_STACK .* RW +0' readelf -lW "$library"
check "has no text relocations" no_textrel
check "runs nothing when it is loaded" no_constructors
check "is smaller than 20 MB" small

# abidiff says 8 for an incompatible change; a compatible one (4) asks for a new minor version.
unchanged() {
    abidiff "${file[stub]}" "$library"
    local status=$?
    [ $status -eq 0 ] || { [ $((status & 11)) -eq 0 ] && ! grep -q 'DLATTN_ABI_MINOR 0$' "${file[header]}"; }
}
check "has the types of ABI 1.0 (abidiff)" unchanged

# ---- Clients and libraries of three times

for client in frozen today future; do
    for library_of in stub library future_library; do
        check "client of $client, library: $library_of" \
            says '^ok' env DLATTN_LIBRARY="${file[$library_of]}" "${file[client_$client]}"
    done
done

# ---- The loader

client=${file[client_today]}
mkdir -p "$scratch"/{beside,system}
cp -L "$client" "$scratch/beside/client"
cp -L "$client" "$scratch/client"
cp -L "${file[stub]}" "$scratch/beside/libdlattn.so.1"
cp -L "$library" "$scratch/system/libdlattn.so.1"
fails_saying() {
    local pattern=$1 output
    shift
    output=$("$@") && { echo "succeeded: $output"; return 1; }
    grep -qE -- "$pattern" <<<"$output" || { echo "$output"; return 1; }
}
system=LD_LIBRARY_PATH=$scratch/system
check "loader: DLATTN_LIBRARY first" says '^ok [0-9]' env "$system" DLATTN_LIBRARY="$library" "$scratch/beside/client"
check "loader: then beside the program" says '^ok stub' env "$system" "$scratch/beside/client"
check "loader: then the system" says '^ok [0-9]' env "$system" "$scratch/client"
check "loader: an empty DLATTN_LIBRARY is none" says '^ok stub' env DLATTN_LIBRARY= "$scratch/beside/client"
check "loader: nowhere, with both places" fails_saying "libdlattn was not found:$" "$scratch/client"
check "loader: names the place beside" fails_saying "$scratch/libdlattn.so.1: .*cannot open" "$scratch/client"
check "loader: names the system's search" fails_saying "^  libdlattn.so.1: .*cannot open" "$scratch/client"
check "loader: DLATTN_LIBRARY and no other" \
    fails_saying "where DLATTN_LIBRARY says" env "$system" DLATTN_LIBRARY=/nowhere/x.so "$scratch/beside/client"
check "loader: not a plugin" fails_saying "has no dlattn_get_api" env DLATTN_LIBRARY="${file[broken_symbol]}" "$client"
check "loader: another major version" fails_saying "does not serve ABI 1" env DLATTN_LIBRARY="${file[broken_major]}" "$client"
check "loader: a table cut short" \
    fails_saying "serves ABI 1.0, this program needs 1\.[0-9]+" env DLATTN_LIBRARY="${file[broken_table]}" "$client"
check "the client links libc and libm alone" says '^ *0x.*NEEDED.*libc\.so\.6' readelf -dW "$client"
links() { ! readelf -dW "$client" | grep NEEDED | grep -vE 'libc\.so\.6|libm\.so\.6|ld-linux'; }
check "and nothing of dlattn" links

echo "[====] Synthesis: Tested: $((good + bad)) | Passing: $good | Failing: $bad | Crashing: 0"
[ $bad -eq 0 ]
