#!/usr/bin/env bash
# Installs real Apptainer on a fresh Debian 12 (bookworm), as root.  Idempotent.  libc and the apt sources stay as they are.
#
# Debian carries apptainer in sid only, built on glibc >= 2.38.  All it takes from that glibc is __isoc23_strtol and
# __isoc23_strtoul, so the package is repacked with those two redirected to strtol/strtoul, its libc6 need lowered to
# 2.36 and "+bookworm1" added to its version, then installed with apt: every other dependency comes from bookworm.
# sid's Packages list is read into a private folder, never into the machine's apt.
#
#   APPTAINER_DEB     a kept copy of the .deb to use before asking sid (repeatable builds; see APPTAINER_SHA256)
#   APPTAINER_SHA256  refuse a .deb with another sum
#   APPTAINER_VERSION ask sid for this version first (falls back to whatever sid has unless APPTAINER_STRICT=1)
#   APPTAINER_KEEP    folder to leave the downloaded .deb in
set -euo pipefail

version=${APPTAINER_VERSION:-}
say() { echo "install-apptainer: $*" >&2; }
finish() {  # every run: a reboot undoes the first of these
    # a machine without udev leaves /dev/fuse at 0600: ordinary users then cannot mount a SIF
    [ ! -c /dev/fuse ] || chmod 0666 /dev/fuse
    # An ordinary user needs nothing more.  Root does where the machine has taken a capability from it (CapPrm below the
    # kernel's full set, as in many VMs and CI runners): apptainer's default for root asks for all of them and ends with
    # "Requesting capability set ... while permitted capability set is ...".  Give root what it really has instead.
    # (`apptainer build` with %post still fails there as root: build as an ordinary user.)
    local have last names i=0 list=""
    have=$((16#$(awk '/^CapPrm/{print $2}' /proc/self/status))); last=$(cat /proc/sys/kernel/cap_last_cap)
    if [ "$have" -ne $(( (1 << (last + 1)) - 1 )) ] && [ -w /etc/apptainer/apptainer.conf ]; then
        names="CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
            NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
            SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
            MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
        for n in $names; do [ $(( have >> i & 1 )) = 0 ] || list="$list${list:+,}\"CAP_$n\""; i=$((i + 1)); done
        # only where it is not so already: containers that start at this moment read both
        list="{\"users\":{\"root\":[$list]}}"
        if [ "$(cat /etc/apptainer/capability.json 2>/dev/null)" = "$list" ] &&
            grep -qx 'root default capabilities = file' /etc/apptainer/apptainer.conf; then return; fi
        echo "$list" >/etc/apptainer/capability.json
        apptainer config global --set "root default capabilities" file
        say "root here lacks a capability: root's containers get the rest (root default capabilities = file)"
    fi
}
if command -v apptainer >/dev/null && apptainer --version >/dev/null 2>&1 && [ -z "${APPTAINER_FORCE:-}" ]; then
    say "already there: $(command -v apptainer) ($(apptainer --version))"
    [ "$(id -u)" != 0 ] || finish
    exit 0
fi
[ "$(id -u)" = 0 ] || { say "needs root"; exit 1; }
case "$(dpkg --print-architecture)" in
    amd64) base=GLIBC_2.2.5 ;; arm64) base=GLIBC_2.17 ;; *) say "no recipe for $(dpkg --print-architecture)"; exit 1 ;;
esac
export DEBIAN_FRONTEND=noninteractive
work=$(mktemp -d); chmod 755 "$work"; trap 'rm -rf "$work"' EXIT

apt-get -qq update || say "apt-get update failed; going on with the lists that are there"
command -v python3 >/dev/null || apt-get install -qqy --no-install-recommends python3-minimal

# ---- 1. the .deb: a kept one, else sid's through a private apt state ------------------------------------------------
deb=${APPTAINER_DEB:-}
if [ -z "$deb" ] || [ ! -s "$deb" ]; then
    mkdir -p "$work"/{lists/partial,cache/archives/partial,deb}
    # the machine's own mirror, its suite swapped for sid, checked by the same keyring; sid's list is dated for a week only,
    # so a mirror that lags by more would be refused: Check-Valid-Until=false
    # shellcheck disable=SC2016  # apt's own fields
    mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME) $(COMPONENT)' 2>/dev/null |
             awk '$2=="bookworm" && $3=="main" && !n++ {print $1}')
    [ -n "$mirror" ] || { say "no bookworm main source in this machine's apt: cannot tell its mirror"; exit 1; }
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$work/sid.list"
    sid=(-o "Dir::Etc::sourcelist=$work/sid.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists"
         -o "Dir::Cache=$work/cache" -o Dir::State::status=/dev/null -o Acquire::Languages=none -o APT::Sandbox::User=root
         -o Acquire::Retries=3 -o Acquire::Check-Valid-Until=false -o APT::Update::Post-Invoke-Success::= )
    apt-get -qq "${sid[@]}" update || { # bookworm's keyring may be too old for sid's newest signing key
        say "sid's signature did not check against this keyring: taking the list unsigned, the .deb's sum below decides"
        sed -i 's/\[signed-by=[^]]*\]/[trusted=yes]/' "$work/sid.list"; apt-get -qq "${sid[@]}" update; }
    cd "$work/deb"
    if [ -n "$version" ] && apt-get -qq "${sid[@]}" download "apptainer=$version"; then :
    elif [ -n "$version" ] && [ "${APPTAINER_STRICT:-0}" = 1 ]; then say "sid no longer has $version"; exit 1
    else apt-get -qq "${sid[@]}" download apptainer; fi
    deb=$(ls "$work"/deb/apptainer_*.deb); cd - >/dev/null
    [ -z "${APPTAINER_KEEP:-}" ] || { mkdir -p "$APPTAINER_KEEP"; cp "$deb" "$APPTAINER_KEEP/"; }
fi
sum=$(sha256sum "$deb" | cut -d' ' -f1); say "$(dpkg-deb -f "$deb" Package Version | paste -sd' ') sha256 $sum"
[ -z "${APPTAINER_SHA256:-}" ] || [ "$sum" = "$APPTAINER_SHA256" ] || { say "expected sha256 $APPTAINER_SHA256"; exit 1; }

# ---- 2. repack for bookworm -----------------------------------------------------------------------------------------
dpkg-deb -R "$deb" "$work/pkg"
mapfile -t elves < <(find "$work/pkg/usr" -type f -exec sh -c 'head -c4 "$1" | grep -q ELF && echo "$1"' _ {} \;)
if ! python3 - "$base" "${elves[@]}" <<'PY'
import struct, sys
MAX, base = (2, 36), sys.argv[1]

def patch(path):
    d = bytearray(open(path, "rb").read())
    shoff, = struct.unpack_from("<Q", d, 0x28)
    size, num = struct.unpack_from("<HH", d, 0x3A)
    secs = [struct.unpack_from("<IIQQQQIIQQ", d, shoff + i * size) for i in range(num)]
    pick = lambda t: next((s for s in secs if s[1] == t), None)
    dynsym, versym, need = pick(11), pick(0x6FFFFFFF), pick(0x6FFFFFFE)
    if not need:
        return []
    start = secs[dynsym[6]][4]
    text = lambda off: d[start + off:d.index(0, start + off)].decode()
    vers, pos = {}, need[4]
    for _ in range(need[7]):
        _, count, _, aux, nxt = struct.unpack_from("<HHIII", d, pos)
        a = pos + aux
        for _ in range(count):
            _, _, other, name, anext = struct.unpack_from("<IHHII", d, a)
            vers[other & 0x7FFF] = (text(name), a)
            a += anext
        pos += nxt
    new = {i for i, (n, _) in vers.items()
           if n.startswith("GLIBC_") and n[6].isdigit() and tuple(map(int, n[6:].split("."))) > MAX}
    left, to = [], next(i for i, (n, _) in vers.items() if n == base)
    for i in range(dynsym[5] // 24):
        o, v = dynsym[4] + 24 * i, versym[4] + 2 * i
        name, _, _, shndx = struct.unpack_from("<IBBH", d, o)
        idx = struct.unpack_from("<H", d, v)[0] & 0x7FFF
        if shndx or idx not in new:
            continue
        if text(name).startswith("__isoc23_strto"):      # same function but for 0b... literals
            struct.pack_into("<I", d, o, name + len("__isoc23_"))
            struct.pack_into("<H", d, v, to)
        else:
            left.append(f"{text(name)}@{vers[idx][0]}")
    for i in new:                                        # Elf64_Vernaux: hash, flags, other, name, next
        a, b = vers[i][1], vers[to][1]
        d[a:a + 4], d[a + 8:a + 12] = d[b:b + 4], d[b + 8:b + 12]
    if not left and new:
        open(path, "r+b").write(d)
    return left

bad = {p: l for p in sys.argv[2:] if (l := patch(p))}
for p, l in bad.items():
    print(f"install-apptainer: {p} also needs {' '.join(l)}", file=sys.stderr)
sys.exit(3 if bad else 0)
PY
then
    say "this build of apptainer needs more of a newer glibc than strtol: keep an older .deb (1.4.5-2 works) in APPTAINER_DEB"
    exit 3
fi
sed -i -e '/^Version:/s/$/+bookworm1/' -e '/^Depends:/s/libc6 (>= [^)]*)/libc6 (>= 2.36)/' \
       -e '/^Depends:/s/libsqlite3-0t64/libsqlite3-0/' "$work/pkg/DEBIAN/control"
(cd "$work/pkg" && find . -path ./DEBIAN -prune -o -type f -print0 | sort -z | xargs -0 md5sum | sed 's# \./# #' >DEBIAN/md5sums)
dpkg-deb --root-owner-group -Zgzip -z1 -b "$work/pkg" "$work/apptainer-bookworm.deb" >/dev/null

# ---- 3. install; squashfuse and fuse-overlayfs are what an ordinary user's mounts need -----------------------------
apt-get install -qqy --no-install-recommends --reinstall "$work/apptainer-bookworm.deb" squashfuse fuse-overlayfs fuse2fs fuse3 \
    e2fsprogs debootstrap >/dev/null
finish
say "installed: $(apptainer --version)"
