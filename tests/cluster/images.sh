#!/usr/bin/env bash
# images.sh base|train [DEST_DIR]   Builds DEST_DIR/NAME.sif as alice, and only when what it is made of has changed.
#
# NAME.key beside the image holds the hash of its recipe; the same key means: done, nothing is built.
#   DEST_DIR           default /var/cache/hpc-test; wheels are kept in DEST_DIR/wheels
#   HPC_TEST_SCRATCH   where the unpacked tree lives for the time of the build, default /var/tmp
set -euo pipefail
shopt -s inherit_errexit                       # a failure in $(...) is a failure
here=$(cd "$(dirname "$0")" && pwd)
containers=$(cd "$here/../../containers" && pwd)
name=${1:-}
dest=${2:-/var/cache/hpc-test}
scratch_root=${HPC_TEST_SCRATCH:-/var/tmp}
python=/usr/bin/python3                        # the image's minor version: its wheels are chosen by this one
begin=$SECONDS
say() { echo "images: $*" >&2; }
die() { say "$*"; exit 1; }

need_for() { case $1 in base) echo 2 ;; train) echo 8 ;; esac; }        # GiB of scratch
free_gib() { df --output=avail -BG "$1" | tail -1 | tr -dc 0-9; }

key_of() {  # everything an image is made of, its base included
    { cat "$containers/$1.def"
      [ "$1" = base ] || { cat "$containers/$1.requirements.txt"; key_of base; "$python" --version; }
    } | sha256sum | cut -d' ' -f1
}

mirror() {  # the one this machine's apt uses
    # shellcheck disable=SC2016  # apt's own fields
    apt-get indextargets --format '$(SITE) $(CODENAME) $(COMPONENT)' |
        awk '$2 == "bookworm" && $3 == "main" && !seen++ { print $1 }'
}

wheels() {  # prints the folder of wheels for a requirements file, pip's own among them: %post then needs no network
    local requirements=$containers/$1.requirements.txt folder
    folder=$dest/wheels/$1-$(sha256sum "$requirements" | cut -c1-16)
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.part" "$dest"/wheels/"$1"-*
        "$python" -m venv "$scratch/venv" || die "python3-venv is missing"
        say "wheels for $1"
        "$scratch/venv/bin/pip" wheel -q --use-pep517 --wheel-dir "$folder.part" pip -r "$requirements" >&2
        chmod -R a+rX "$folder.part"
        mv "$folder.part" "$folder"
    fi
    echo "$folder"
}

as_alice() {  # root may lack a capability that %post needs; an ordinary user needs nothing
    env HOME=/home/alice USER=alice LOGNAME=alice \
        APPTAINER_TMPDIR="$scratch/tmp" APPTAINER_CACHEDIR="$scratch/cache" \
        setpriv --reuid=alice --regid=alice --init-groups -- "$@"
}

build() {
    local args=()
    case $name in
        base)
            args=(--build-arg "mirror=$(mirror)")
            [ "${args[1]}" != mirror= ] || die "no bookworm main source in this machine's apt: cannot tell its mirror" ;;
        train)
            local base wheels
            base=$("$0" base "$dest")
            wheels=$(wheels "$name")
            cp "$containers/$name.requirements.txt" "$scratch/requirements.txt"
            args=(--build-arg "base=$base" --build-arg "wheels=$wheels") ;;
    esac
    cp "$containers/$name.def" "$scratch/"
    chmod -R a+rX "$scratch"
    # zstd at level 3: 5 times faster than the default gzip, and hardly larger. --force: our labels replace the base's
    (cd "$scratch" && as_alice apptainer build --force "${args[@]}" --mksquashfs-args "-comp zstd -Xcompression-level 3" \
        "tmp/$name.sif" "$name.def") >"$dest/$name.log" 2>&1 ||
        { tail -40 "$dest/$name.log" >&2; die "$name: see $dest/$name.log"; }
}

done_already() { [ -s "$dest/$name.sif" ] && [ "$(cat "$dest/$name.key" 2>/dev/null)" = "$key" ]; }

[[ $name = base || $name = train ]] || { echo "usage: $0 base|train [DEST_DIR]" >&2; exit 2; }
key=$(key_of "$name")
! done_already || { echo "$dest/$name.sif"; exit 0; }
[ "$(id -u)" = 0 ] || die "$dest/$name.sif is not built from this recipe; building it needs root (to become alice)"

mkdir -p "$dest/wheels"; chmod 755 "$dest" "$dest/wheels"
dest=$(cd "$dest" && pwd)
exec 9>"$dest/$name.lock"; flock 9             # two test runs at once: one builds, the other waits and finds it
! done_already || { echo "$dest/$name.sif"; exit 0; }
need=$(need_for "$name")
[ "$(free_gib "$scratch_root")" -ge "$need" ] || die "$scratch_root has less than $need GiB free (HPC_TEST_SCRATCH names another folder)"
[ "$(free_gib "$dest")" -ge "$need" ] || die "$dest has less than $need GiB free"
"$here/users.sh"
"$here/install-apptainer.sh"
command -v debootstrap >/dev/null || apt-get -qqy install --no-install-recommends debootstrap >&2
scratch=$(mktemp -d "$scratch_root/hpc-images.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"; install -d -o alice -g alice "$scratch"/{tmp,cache}
build
mv "$scratch/tmp/$name.sif" "$dest/$name.sif.part"; chown root: "$dest/$name.sif.part"; chmod 644 "$dest/$name.sif.part"
mv "$dest/$name.sif.part" "$dest/$name.sif"; echo "$key" >"$dest/$name.key"
say "$name.sif: $(du -h "$dest/$name.sif" | cut -f1) in $((SECONDS - begin)) s"
echo "$dest/$name.sif"
