#!/usr/bin/env bash
# images.sh NAME [DEST_DIR [VENV]]   Builds DEST_DIR/NAME.sif by `hpc images build` as alice, and only when what it is
#                                    made of has changed; prints its path.
#   DEST_DIR           default /var/cache/hpc-test
#   VENV               hpc of this checkout with its extra `images`; without one it is made in DEST_DIR/hpc
#   HPC_TEST_SCRATCH   where the unpacked tree lives for the time of the build, default /var/tmp
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name=${1:?usage: $0 NAME [DEST_DIR [VENV]]}
dest=${2:-/var/cache/hpc-test}
venv=${3:-}
die() { echo "images: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "needs root, to become alice"
{
    "$here/users.sh"
    "$here/install-apptainer.sh"
    command -v debootstrap >/dev/null || apt-get -qqy -o DPkg::Lock::Timeout=600 install --no-install-recommends debootstrap
    install -d -m 755 -o alice -g alice "$dest"
    if [ -z "$venv" ]; then
        venv=$dest/hpc
        umask 022
        exec 9>"$venv.lock"; flock 9
        [ -e "$venv/bin/pip" ] || /usr/bin/python3 -m venv "$venv" || die "python3-venv is missing"
        "$venv/bin/pip" install -q "$here/../.."
        "$venv/bin/pip" install -q --no-deps --force-reinstall "$here/../.."      # the code may change, and the version not
        exec 9>&-
    fi
} >&2
# root may lack a capability that %post needs; an ordinary user needs nothing
cd "$dest"
exec env HOME=/home/alice USER=alice LOGNAME=alice setpriv --reuid=alice --regid=alice --init-groups -- \
    "$venv/bin/hpc" images build "$name" --to "$dest" --tmp "${HPC_TEST_SCRATCH:-/var/tmp}"
