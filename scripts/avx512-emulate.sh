#!/usr/bin/env bash
# Run x86-64 Linux executables on an emulated AVX-512 CPU.
#
# The host needs neither AVX-512 nor KVM: the executables run in a minimal Linux booted inside the
# Bochs emulator, whose CPU models implement AVX-512 in software. Results are bit-exact for the
# vector arithmetic; time is not modelled, so nothing measured in the guest is a benchmark.
#
#   avx512-emulate.sh [OPTION...] [VAR=VALUE...] EXE [ARG...] [-- [VAR=VALUE...] EXE [ARG...]]...
#
# Commands separated by a lone `--` run one after the other in one boot; a failing one does not stop
# those after it. Their stdout and stderr both appear on this script's stdout, in order; everything
# else (progress, diagnostics) goes to stderr. Each runs as root, in `/`, with an empty stdin and
# only the variables given plus PATH, HOME and TMPDIR. Static executables are copied as they are;
# for dynamic ones the shared libraries that ldd lists are copied too.
#
# Options (before the first command):
#   --timeout SECONDS    wall-clock limit for boot and all commands together (default 900)
#   --features[=A,B...]  names from /proc/cpuinfo that the guest must have (default avx512f); with no
#                        command, only boot, print the guest's AVX/FMA flags and check. The check is
#                        made before every run, because a test that silently takes its scalar
#                        fall-back proves nothing.
#   --add SRC[=DEST]     also copy the file or directory SRC into the guest, at DEST (default: the
#                        same absolute path); may be repeated
#   --cpu MODEL          Bochs CPU model (default sapphire_rapids, or corei7_skylake_x with
#                        AVX512_EMULATE_BOCHS=debian)
#   --memory MIB         guest memory (default 768 + 3 x the payload; 3072 at most)
#   --prepare            fetch and build what is missing, run nothing
#   -h, --help           this text
#
# Environment:
#   AVX512_EMULATE_CACHE  directory for the kernel, the boot files and Bochs
#                         (default target/avx512-emulate under the current directory)
#   AVX512_EMULATE_BOCHS  source (default): Bochs 3.0 compiled from Debian's source archive, once,
#                         into the cache (about 2 minutes); has AVX512_BF16, AVX512_FP16 and VNNI.
#                         debian: the distribution's bochs package. Version 2.7 in Debian 12, being a
#                         debugger build, is 4 to 5 times slower, and in our use only its
#                         corei7_skylake_x works (F, CD, BW, DQ, VL; no VNNI, BF16 or FP16).
#
# Known faults of Bochs 3.0: VCVTNE2PS2BF16 (_mm512_cvtne2ps_pbh) gives a wrong upper half, and from
# its source the merge-masked VCVTNEPS2BF16 looks wrong too. VDPBF16PS from memory with a short
# displacement reads 4 bytes on where it should read 64 ([r8 + r9 + 64] as [r8 + r9 + 4]), so tiles of
# native dot products are wrong there: run them on a --cpu without AVX512_BF16 (corei7_skylake_x), which
# widens. The unmasked _mm512_cvtneps_pbh, _mm512_dpbf16_ps on registers and _mm512_dpbusd_epi32 agreed
# with scalar code.
#
# Exit status: 0 if every command succeeded, else the status of the first that failed (128 + signal
# if it was killed); 2 usage; 124 timeout; 125 no result from the guest (boot failure, crash of the
# emulator); 126 a required CPU feature is missing. 124 to 126 always come with a message on stderr.
#
# Example:
#   RUSTFLAGS='-C target-feature=+crt-static' \
#     cargo test --no-run --release --target x86_64-unknown-linux-gnu
#   scripts/avx512-emulate.sh --timeout 600 RUST_BACKTRACE=1 \
#     target/x86_64-unknown-linux-gnu/release/deps/mycrate-0123 --test-threads=1

set -euo pipefail

readonly BOCHS_SOURCE_VERSION=3.0+dfsg
readonly BOCHS_SOURCE_SHA256=78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b
readonly DEBIAN_MIRROR=http://deb.debian.org/debian
# Seconds within which the guest's init must report; a healthy boot takes 7 to 30.
readonly BOOT_LIMIT=240

say() { printf 'avx512-emulate: %s\n' "$*" >&2; }
die() { local rc=$1; shift; say "ERROR: $*"; exit "$rc"; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# ---------------------------------------------------------------- command line

timeout_s=900 cpu='' memory='' prepare_only=0 features=avx512f features_asked=0
adds=()
while (($#)); do
    case $1 in
        --timeout|--cpu|--memory|--add)
            (($# >= 2)) || die 2 "$1 needs a value"
            set -- "$1=$2" "${@:3}"
            continue ;;
        --timeout=*) timeout_s=${1#*=} ;;
        --cpu=*) cpu=${1#*=} ;;
        --memory=*) memory=${1#*=} ;;
        --add=*) adds+=("${1#*=}") ;;
        --features) features_asked=1 ;;
        --features=*) features_asked=1 features=avx512f,${1#*=} ;;
        --prepare) prepare_only=1 ;;
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        -*) die 2 "unknown option $1 (see --help)" ;;
        *) break ;;
    esac
    shift
done
[[ $timeout_s =~ ^[1-9][0-9]*$ ]] || die 2 "--timeout wants a number of seconds"
[[ -z $memory || $memory =~ ^[1-9][0-9]*$ ]] || die 2 "--memory wants a number of MiB"
if ((! $# && ! features_asked && ! prepare_only)); then usage >&2; exit 2; fi

flavour=${AVX512_EMULATE_BOCHS:-source}
case $flavour in
    source) : "${cpu:=sapphire_rapids}" ;;
    debian) : "${cpu:=corei7_skylake_x}" ;;
    *) die 2 "AVX512_EMULATE_BOCHS must be 'source' or 'debian'" ;;
esac
[[ $cpu =~ ^[a-z0-9_]+$ ]] || die 2 "odd CPU model name $cpu"

cache=${AVX512_EMULATE_CACHE:-target/avx512-emulate}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# ---------------------------------------------------------------- what the run needs

as_root() { if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi; }

apt_refreshed=0
apt_refresh() {
    ((apt_refreshed)) && return
    say "apt-get update"
    as_root apt-get update -qq >&2 || say "apt-get update failed; going on with the lists at hand"
    apt_refreshed=1
}

# need_tools COMMAND:PACKAGE... installs the packages of those commands that are missing.
need_tools() {
    local pair missing=()
    for pair; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    ((${#missing[@]})) || return 0
    apt_refresh
    say "apt-get install ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 ||
        die 125 "could not install ${missing[*]}"
}

# unpack_package PACKAGE DIRECTORY: unpacked and never installed, so that the host's own kernel, boot
# loader and BIOS files are left alone and no privilege is needed.
unpack_package() {
    local tmp
    tmp=$(mktemp -d "$cache/get.XXXXXX")
    say "apt-get download $1"
    if ! (cd "$tmp" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$1" >&2); then
        apt_refresh
        (cd "$tmp" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$1" >&2) ||
            die 125 "could not download the package $1"
    fi
    dpkg-deb -x "$tmp"/*.deb "$2"
    rm -rf "$tmp"
}

# Every piece is made in a scratch directory and renamed when complete, so that an interrupted run
# leaves no half-made cache.
prepare_boot_files() {
    [[ -e $cache/boot/vmlinuz ]] && return
    local tmp image p
    tmp=$(mktemp -d "$cache/boot.XXXXXX")
    # The cloud kernel has the serial console and initramfs built in, is LZ4-compressed (cheap to
    # unpack in an emulator) and probes few devices. The meta-package names the current version.
    image=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/{print $2; exit}') || true
    if [[ -z $image ]]; then
        apt_refresh
        image=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/{print $2; exit}')
    fi
    [[ -n $image ]] || die 125 "apt knows no linux-image-cloud-amd64"
    for p in "$image" busybox-static isolinux syslinux-common bochsbios vgabios; do
        unpack_package "$p" "$tmp/x"
    done
    local busybox=$tmp/x/bin/busybox
    [[ -e $busybox ]] || busybox=$tmp/x/usr/bin/busybox
    mv "$tmp"/x/boot/vmlinuz-* "$tmp/vmlinuz.part"
    mv "$busybox" "$tmp/x/usr/lib/ISOLINUX/isolinux.bin" \
        "$tmp/x/usr/lib/syslinux/modules/bios/ldlinux.c32" \
        "$tmp/x/usr/share/bochs/BIOS-bochs-latest" "$tmp/x/usr/share/vgabios/vgabios.bin" "$tmp/"
    rm -rf "$tmp/x"
    mv "$tmp/vmlinuz.part" "$tmp/vmlinuz"
    chmod 755 "$tmp"
    mv -T "$tmp" "$cache/boot"
}

prepare_bochs_source() {
    [[ -x $cache/bochs-source/bochs ]] && return
    need_tools g++:g++ make:make xz:xz-utils
    local tmp name=bochs_$BOCHS_SOURCE_VERSION.orig.tar.xz try got=0
    tmp=$(mktemp -d "$cache/bochs.XXXXXX")
    say "downloading $name"
    for try in 1 2 3; do
        # apt's own downloader: it follows the machine's proxy settings and checks the hash.
        if /usr/lib/apt/apt-helper -o APT::Sandbox::User="$(id -un)" download-file \
            "$DEBIAN_MIRROR/pool/main/b/bochs/$name" "$tmp/$name" \
            "SHA256:$BOCHS_SOURCE_SHA256" >"$tmp/get.log" 2>&1; then
            got=1
            break
        fi
        sleep $((try * 2))
    done
    if ((! got)); then
        tail -n 5 "$tmp/get.log" >&2
        die 125 "could not download $name (AVX512_EMULATE_BOCHS=debian uses the slower package)"
    fi
    mkdir "$tmp/src"
    tar -xf "$tmp/$name" -C "$tmp/src" --strip-components=1
    say "compiling Bochs (once, about 2 minutes)"
    # No debugger, no instrumentation, no plug-ins: this is where the speed over the package comes
    # from, and the `nogui` display needs no terminal.
    if ! (cd "$tmp/src" && nice ./configure --with-nogui --disable-plugins --disable-docbook \
        --enable-x86-64 --enable-cpu-level=6 --enable-fpu --enable-avx --enable-evex --enable-amx \
        --enable-protection-keys --enable-cet --enable-pci --enable-cdrom \
        --enable-all-optimizations --enable-repeat-speedups --enable-fast-function-calls \
        --enable-handlers-chaining --disable-debugger --disable-instrumentation \
        CFLAGS=-O2 CXXFLAGS=-O2 && nice make -j"$(nproc)" bochs) >"$tmp/build.log" 2>&1; then
        tail -n 20 "$tmp/build.log" >&2
        die 125 "Bochs did not compile; see $tmp/build.log"
    fi
    strip "$tmp/src/bochs" 2>/dev/null || true
    mkdir -p "$cache/bochs-source"
    mv "$tmp/src/bochs" "$cache/bochs-source/bochs"
    rm -rf "$tmp"
}

need_tools flock:util-linux
exec 9>"$cache/lock"
# Two runs at once may share the cache but must not both fill it.
flock 9
need_tools xorriso:xorriso cpio:cpio
prepare_boot_files
case $flavour in
    source) prepare_bochs_source ;;
    debian)
        need_tools bochs-bin:bochs script:bsdutils
        # The terminal display is a plug-in in a package of its own and offers no command to test for.
        if ! dpkg-query -W -f='${Status}' bochs-term 2>/dev/null | grep -q 'ok installed'; then
            need_tools bochs-term-plugin:bochs-term
        fi ;;
esac
flock -u 9
exec 9>&-
if ((prepare_only && ! $# && ! features_asked)); then
    say "ready in $cache"
    exit 0
fi

# ---------------------------------------------------------------- the guest's file tree

work=$(mktemp -d "$cache/run.XXXXXX")
bochs_pid='' tail_pid=''
cleanup() {
    local p
    for p in $bochs_pid $tail_pid; do kill "$p" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,etc,job} "$work/iso/isolinux"
cp "$cache/boot/busybox" "$root/bin/busybox"
# Rust's and C's user look-ups want these to exist.
echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
echo 'root:x:0:' >"$root/etc/group"

# The guest's shell is ash, which does not read bash's $'...' form of quoting.
quote() { local q=\'\\\'\'; printf "'%s'" "${1//\'/$q}"; }

copy_libraries() {
    local lib
    # No dynamic section: static. A static-pie makes ldd say "statically linked" and list nothing.
    while read -r lib; do
        mkdir -p "$root$(dirname "$lib")"
        cp -Lf "$lib" "$root$lib"
    done < <(ldd "$1" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\// {print $1}')
    if ldd "$1" 2>/dev/null | grep -q 'not found'; then
        ldd "$1" | grep 'not found' >&2
        die 2 "$1 lacks shared libraries on this machine"
    fi
}

jobs_script=$root/job/run
: >"$jobs_script"
count=0
add_command() {
    (($#)) || return 0
    local line='' dir exe=''
    count=$((count + 1))
    while (($#)) && [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do
        line+=" $(quote "$1")"
        shift
    done
    (($#)) || die 2 "variables without an executable"
    exe=$1
    shift
    [[ -f $exe ]] || die 2 "no such executable: $exe"
    dir=/job/$count
    mkdir "$root$dir"
    # Debug information would only cost boot time: everything is read through the emulated CD drive.
    if ! strip --strip-debug -o "$root$dir/${exe##*/}" "$exe" 2>/dev/null; then
        cp "$exe" "$root$dir/${exe##*/}"
    fi
    chmod 755 "$root$dir/${exe##*/}"
    copy_libraries "$exe"
    line+=" $(quote "$dir/${exe##*/}")"
    while (($#)); do
        line+=" $(quote "$1")"
        shift
    done
    printf 'run%s\n' "$line" >>"$jobs_script"
}

current=()
for word; do
    if [[ $word == -- ]]; then
        add_command "${current[@]}"
        current=()
    else
        current+=("$word")
    fi
done
add_command "${current[@]}"

for spec in "${adds[@]}"; do
    src=${spec%%=*}
    [[ -e $src ]] || die 2 "--add: no such file: $src"
    dest=$(realpath "$src")
    if [[ $spec == *=* ]]; then dest=${spec#*=}; fi
    [[ $dest == /* ]] || die 2 "--add: the destination must be absolute: $dest"
    mkdir -p "$root$(dirname "$dest")"
    cp -RLT "$src" "$root$dest"
done

# What the guest reports to this script goes through /dev/kmsg to the console (com1): the kernel
# writes such a line in one piece, and the commands' own output (com2) stays unmixed.
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
B=/bin/busybox
report() { echo "<0>AVX512-EMULATE $*" >/dev/kmsg; }
# The last close waits until the serial line has sent everything; powering off would drop the rest.
finish() { exec 3>&-; report "$@"; $B poweroff -f; }
$B mount -t devtmpfs d /dev
$B mount -t proc p /proc
$B mount -t sysfs s /sys
$B mkdir -p /dev/shm
$B ln -s /proc/self/fd /dev/fd
$B mount -t tmpfs t /dev/shm
$B --install -s /bin
# Raw, or the terminal layer would turn each line feed into two characters. The descriptor is held
# open because the settings are forgotten at the last close.
exec 3>/dev/ttyS1
$B stty -F /dev/ttyS1 raw -echo
report booted
flags=" $($B grep -m1 '^flags' /proc/cpuinfo) "
for f in $($B cat /job/features); do
    case $flags in
        *" $f "*) ;;
        *) finish "missing $f" ;;
    esac
done
if [ -e /job/show ]; then
    for f in $flags; do
        case $f in avx*|fma|f16c|amx*|gfni|vaes|vpclmulqdq) echo "$f" >&3 ;; esac
    done
fi
first=0
number=0
run() {
    number=$((number + 1))
    $B env -i PATH=/bin HOME=/ TMPDIR=/tmp "$@" </dev/null >&3 2>&1 3>&-
    rc=$?
    report "command $number status $rc"
    if [ $first -eq 0 ]; then first=$rc; fi
}
cd /
. /job/run
finish "done $first"
INIT
chmod 755 "$root/init"
printf '%s\n' "${features//,/ }" >"$root/job/features"
if ((features_asked)); then : >"$root/job/show"; fi

(cd "$root" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"$work/iso/initrd"
payload=$(($(stat -c %s "$work/iso/initrd") / 1048576))
# The boot loader's copy, the unpacked copy and room to run.
: "${memory:=$((768 + 3 * payload))}"
if ((memory > 3072)); then
    memory=3072
    say "WARNING: the payload is $payload MiB; guest memory is capped at $memory MiB"
fi

# ---------------------------------------------------------------- the boot disc

# What the kernel's command line is for:
#   cryptomgr.notests      the self-tests of its ciphers take most of an emulated boot
#   mitigations=off        no side-channel work in a machine that has no side channels
#   noxsaves, 321, 323     CPUID in Bochs gives a wrong size for the compacted (XSAVEC/XSAVES) state
#                          area; Linux notices and then turns AVX off, so make it use the plain one
#   517, 580, 590, no5lvl  WAITPKG, FSRM, SERIALIZE and 5-level paging: with all of them on, Linux 6.1
#   ibt=off                hangs early in sapphire_rapids; kernel-internal only, as programs still
#                          see the CPU's own CPUID
#   tsc, idle, no_timer    no calibration loops, no MWAIT
ln "$cache/boot/vmlinuz" "$work/iso/vmlinuz" 2>/dev/null || cp "$cache/boot/vmlinuz" "$work/iso/vmlinuz"
cp "$cache/boot/isolinux.bin" "$cache/boot/ldlinux.c32" "$work/iso/isolinux/"
cat >"$work/iso/isolinux/isolinux.cfg" <<'CFG'
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
 KERNEL /vmlinuz
 INITRD /initrd
 APPEND console=ttyS0,115200 mitigations=off nosmp tsc=reliable no_timer_check nokaslr idle=halt cryptomgr.notests noxsaves clearcpuid=321,323,517,580,590 no5lvl ibt=off printk.devkmsg=on
CFG
# Writes to isolinux.bin (its boot table), which is why that file is a copy.
xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$work/iso" >"$work/xorriso.log" 2>&1 ||
    { cat "$work/xorriso.log" >&2; die 125 "could not make the boot disc"; }
rm -rf "$root" "$work/iso"

# ips is how many instructions make one emulated second, not a speed limit: smaller values shorten
# the kernel's waiting loops but raise the share of timer interrupts.
cat >"$work/bochsrc" <<RC
config_interface: textconfig
display_library: $([[ $flavour == source ]] && echo nogui || echo term)
cpu: model=$cpu, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=$memory, host=$memory
romimage: file=$cache/boot/BIOS-bochs-latest
vgaromimage: file=$cache/boot/vgabios.bin
ata0: enabled=1
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/console
com2: enabled=1, mode=file, dev=$work/output
log: $work/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
clock: sync=none
RC

if [[ $flavour == source ]]; then
    emulator=("$cache/bochs-source/bochs" -q -f "$work/bochsrc")
else
    # The package opens the host's sound devices unless told not to, is a debugger build that waits
    # for "continue", and draws on a terminal, which `script` provides.
    echo 'plugin_ctrl: speaker=0, sb16=0, es1370=0, voodoo=0, ne2k=0, e1000=0' >>"$work/bochsrc"
    echo 'sound: driver=dummy' >>"$work/bochsrc"
    echo c >"$work/debugger"
    emulator=(env TERM=xterm script -qefc
        "stty rows 30 cols 100; exec bochs-bin -q -f $(quote "$work/bochsrc") -rc $(quote "$work/debugger")" /dev/null)
fi

# ---------------------------------------------------------------- run

: >"$work/console"
: >"$work/output"
say "booting $cpu, $memory MiB, payload $payload MiB, $count command(s), limit $timeout_s s"
started=$SECONDS
"${emulator[@]}" </dev/null >"$work/emulator.out" 2>&1 &
bochs_pid=$!
tail -c +1 -s 0.3 --pid="$bochs_pid" -f "$work/output" &
tail_pid=$!

# Prints what follows the last report that starts with $1, or fails.
reported() {
    local line
    line=$(tr -d '\r' <"$work/console" | sed -n "s/.*AVX512-EMULATE $1//p" | tail -n 1)
    tr -d '\r' <"$work/console" | grep -q "AVX512-EMULATE $1" && printf '%s\n' "${line# }"
}

why='' booted=''
while kill -0 "$bochs_pid" 2>/dev/null; do
    sleep 0.3
    elapsed=$((SECONDS - started))
    if [[ -z $booted ]] && reported booted >/dev/null; then
        booted=$elapsed
        say "guest is up after $booted s"
    fi
    if ((elapsed >= timeout_s)); then
        why=timeout
    elif [[ -z $booted ]] && ((elapsed >= BOOT_LIMIT)); then
        why="no sign of the guest's init after $BOOT_LIMIT s"
    elif grep -q 'Kernel panic' "$work/console"; then
        why='kernel panic'
    fi
    if [[ -n $why ]]; then
        # The emulator has nothing worth an orderly exit, and may be stuck.
        kill -9 "$bochs_pid" 2>/dev/null || true
        break
    fi
done
wait "$bochs_pid" 2>/dev/null || true
bochs_pid=''
wait "$tail_pid" 2>/dev/null || true
tail_pid=''

if status=$(reported 'done') && [[ $status =~ ^[0-9]+$ ]]; then
    for ((i = 1; i <= count; i++)); do
        rc=$(reported "command $i status") || rc=unknown
        [[ $rc == 0 ]] || say "command $i: exit status $rc"
    done
    say "finished after $((SECONDS - started)) s, status $status"
    exit "$status"
fi
if flag=$(reported missing); then
    die 126 "the guest CPU ($cpu) lacks $flag; nothing was run"
fi
if [[ $why != timeout ]]; then
    {
        echo '--- end of the guest console'; tail -n 30 "$work/console"
        echo '--- end of the emulator log'; grep -v 'ips =' "$work/bochs.log" 2>/dev/null | tail -n 15 || true
        tail -n 5 "$work/emulator.out"
        echo '---'
    } >&2
    die 125 "no result from the guest: ${why:-the emulator stopped}"
fi
if [[ -z $booted ]]; then tail -n 10 "$work/console" >&2; fi
die 124 "timeout after $timeout_s s; the output above is incomplete"
