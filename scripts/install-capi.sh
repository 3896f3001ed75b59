#!/usr/bin/env bash
# Builds the C library and installs it: `scripts/install-capi.sh PREFIX [cargo options]`, for example `scripts/install-capi.sh /usr/local --offline`.
#
#   PREFIX/include/moe_kernels.h
#   PREFIX/lib/libmoe_kernels.so (or .dylib), libmoe_kernels.a
#   PREFIX/lib/pkgconfig/moe-kernels.pc        cc $(pkg-config --cflags --libs moe-kernels) layer.c; add --static for the archive
#
# DESTDIR is put before PREFIX where files are written, as packagers want it. With `--features cuda` the functions moe_cuda_* work, too; the driver is looked for at run time.
set -euo pipefail
if (($# == 0)) || [[ $1 == -* ]]; then
    sed -n '2,8s/^# \?//p' "$0" >&2
    exit 2
fi
[[ $1 == /* ]] || { echo "error: PREFIX has to be an absolute path, got $1" >&2; exit 2; }
prefix=${1%/} to=${DESTDIR:-}${1%/}
shift
cd "$(dirname "$0")/.."

abi=$(sed -n 's/^pub const MOE_ABI_VERSION: u32 = \([0-9]*\);/\1/p' src/ffi.rs)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
case $(uname) in
    Darwin) shared=libmoe_kernels.dylib soname=$shared flag=-Wl,-install_name,$prefix/lib/$shared ;;
    *) shared=libmoe_kernels.so soname=libmoe_kernels.so.$abi flag=-Wl,-soname,libmoe_kernels.so.$abi ;;
esac

# The kinds of library are named here and not in Cargo.toml, where they would be linked for every user of the Rust crate.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo rustc --release --lib --features capi --crate-type cdylib,staticlib "$@" -- \
    -C "link-arg=$flag" --print native-static-libs 2>&1 | tee "$log"
libs=$(sed -n 's/.*native-static-libs: //p' "$log" | tail -1)
# Nothing is printed when cargo finds the library built already; these are what Linux needs.
libs=${libs:--lgcc_s -lutil -lrt -lpthread -lm -ldl -lc}
built=${CARGO_TARGET_DIR:-target}/release

mkdir -p "$to/include" "$to/lib/pkgconfig"
install -m 644 include/moe_kernels.h "$to/include/"
install -m 644 "$built/libmoe_kernels.a" "$to/lib/"
install -m 755 "$built/$shared" "$to/lib/$soname"
[[ $shared == "$soname" ]] || ln -sf "$soname" "$to/lib/$shared"
sed -e "s|@prefix@|$prefix|" -e "s|@version@|$version|" -e "s|@libs_private@|$libs|" scripts/moe-kernels.pc.in \
    >"$to/lib/pkgconfig/moe-kernels.pc"
echo "installed moe-kernels $version (ABI $abi) in $to"
