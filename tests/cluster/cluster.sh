#!/usr/bin/env bash
# cluster.sh up|down|status|wipe|in NODE CMD...|stop|start|freeze|thaw DAEMON   A real Slurm cluster on one machine.
#
# As root, on Debian 12. The machines laptop, login, dgx01..04 and mig01 are namespaces (network.sh); munge, mariadb,
# slurmdbd, slurmctld, slurmd and sshd are Debian's own (daemons.sh, config.sh); alice and bob are the users (users.sh).
#   cluster.sh in login runuser -u alice -- sinfo           cluster.sh in laptop runuser -u alice -- ssh login hostname
#   cluster.sh stop slurmctld                               cluster.sh freeze slurmd-dgx02
# 'up' and 'down' may be repeated; 'wipe' is 'down' and forgets all jobs too. Only one cluster at a time.
#
#   HPC_CLUSTER_DIR         where all its state lives, default /tmp/hpc-cluster
#   HPC_CLUSTER_ACCOUNTING  slurmdbd (default), or none: no database, sacct answers that it is disabled
#   HPC_CLUSTER_MEMORY      cgroup: over its memory a job ends OUT_OF_MEMORY; poll: Slurm looks and kills. Default: what works
#   HPC_CLUSTER_ROOT        a folder with another Debian and its Slurm, whose daemons are used (give it its own _DIR)
set -euo pipefail                              # so no "| grep -q": that ends early, and the writer then fails
HERE=$(cd "$(dirname "$0")" && pwd)
CL=${HPC_CLUSTER_DIR:-/tmp/hpc-cluster}
ROOT=${HPC_CLUSTER_ROOT:-}
IN_ROOT=()
[ -z "$ROOT" ] || IN_ROOT=(chroot "$ROOT")
ACCOUNTING=${HPC_CLUSTER_ACCOUNTING:-slurmdbd}
say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source-path=SCRIPTDIR
. "$HERE/network.sh"
# shellcheck source-path=SCRIPTDIR
. "$HERE/config.sh"
# shellcheck source-path=SCRIPTDIR
. "$HERE/daemons.sh"

packages() {
    local want=(slurm-wlm slurm-client slurmdbd slurm-wlm-basic-plugins munge mariadb-server openssh-server openssh-client
        iproute2 util-linux python3-venv)
    dpkg-query -W -f='${Status}\n' "${want[@]}" 2>/dev/null | grep -c 'ok installed' | grep -qx "${#want[@]}" && return
    say "installing packages"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qqy install --no-install-recommends "${want[@]}"; } >"$CL/log/apt.log" 2>&1 ||
        { tail "$CL/log/apt.log" >&2; die "apt failed"; }
}

folders() {
    mkdir -p "$CL"/{run,log,ssh,mysql,dev,spool,"state-$ACCOUNTING"}
    chmod 755 "$CL"
    chmod 1777 "$CL/log" "$CL/run"
}

munge_up() {
    install -d -o munge -g munge -m 0755 /run/munge
    install -d -o munge -g munge -m 0700 /var/log/munge /var/lib/munge
    if [ ! -s /etc/munge/munge.key ]; then
        head -c 128 /dev/urandom >/etc/munge/munge.key
        chown munge: /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
    fi
    munge -n </dev/null >/dev/null 2>&1 && return       # one runs: use it, and leave it at 'down'
    setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged 9>&-
    cp /run/munge/munged.pid "$CL/run/munged.pid"
}

ssh_up() {  # the users' side: 'ssh login' from the laptop, where /etc/hosts' address of it has no route
    local user home
    [ -s "$CL/ssh/host_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C cluster -f "$CL/ssh/host_ed25519"
    for user in alice bob; do
        home=$(getent passwd "$user" | cut -d: -f6)
        printf 'Host login\n HostName %s.1.2\n HostKeyAlias login\n' "$NET" | become "$home/.ssh/config"
        for node in login $(node_names); do echo "$node $(cut -d' ' -f1,2 "$CL/ssh/host_ed25519.pub")"; done |
            become "$home/.ssh/known_hosts"
        chown "$user:" "$home"/.ssh/{config,known_hosts}
    done
}

chroot_up() {
    local dir user
    for dir in /proc /sys /dev /run /tmp /home; do
        mkdir -p "$ROOT$dir"
        mountpoint -q "$ROOT$dir" || mount --bind "$dir" "$ROOT$dir"
    done
    for user in alice bob; do
        grep -q "^$user:" "$ROOT/etc/passwd" && continue
        grep "^$user:" /etc/passwd >>"$ROOT/etc/passwd"
        grep "^$user:" /etc/group >>"$ROOT/etc/group"
    done
}
chroot_down() { local dir; for dir in /home /tmp /run /dev /sys /proc; do ! mountpoint -q "$ROOT$dir" || umount "$ROOT$dir"; done; }

sacctmgr_do() { in_node login sacctmgr -i -Q "$@" >/dev/null; }
register() {  # before slurmctld: one that does not find its cluster runs on cached, empty associations
    wait_for 30 in_node login sacctmgr -n show cluster
    in_node login sacctmgr -n show cluster format=cluster | grep "$CLUSTER" >/dev/null || sacctmgr_do add cluster "$CLUSTER"
}
gpu_tres() { in_node login sacctmgr -nP show tres format=type,name | grep 'gres|gpu:a100' >/dev/null; }
accounts() {  # after slurmctld: it is what registers gres/gpu, which the QOS limits name
    local user
    [ ! -e "$CL/accounts.done" ] || return 0
    wait_for 30 gpu_tres
    sacctmgr_do add qos small GrpTRES=gres/gpu=4 MaxJobsPerUser=1 MaxSubmitJobsPerUser=3 MaxTRESPerJob=gres/gpu=2 MaxWall=60 \
        Flags=DenyOnLimit
    sacctmgr_do add qos slots GrpTRES=gres/gpu=4 MaxJobsPerUser=1
    sacctmgr_do add qos high Priority=100
    sacctmgr_do add account research Cluster="$CLUSTER" Description=research Organization="$CLUSTER"
    for user in root alice bob; do sacctmgr_do add user "$user" Account=research Cluster="$CLUSTER"; done
    sacctmgr_do modify account research set qos=normal,small,slots,high
    touch "$CL/accounts.done"
}
nodes_ready() { [ "$(in_node login sinfo -h -N -t idle,mixed,alloc,comp -o %N | sort -u | wc -l)" = "$(nodes | wc -l)" ]; }

up() {
    local node
    folders
    packages
    refuse_foreign_config
    if pid_of slurmctld >/dev/null && [ "$(cat "$CL/mode" 2>/dev/null)" != "$MODE" ]; then
        die "it runs in another mode ($(cat "$CL/mode")): 'down' first"
    fi
    echo "$MODE" >"$CL/mode"
    "$HERE/users.sh"
    [ -z "$ROOT" ] || chroot_up
    chown slurm: "$CL"/{"state-$ACCOUNTING",log,run}
    chown mysql: "$CL/mysql"
    network_up
    config_up
    munge_up
    ssh_up
    if [ "$ACCOUNTING" != none ]; then start mariadbd; start slurmdbd; register; fi
    start slurmctld
    [ "$ACCOUNTING" = none ] || accounts
    for node in $(node_names); do start "slurmd-$node"; done
    start sshd
    wait_for 30 nodes_ready
    say "up ($MODE)"
}

down() {
    local node daemon
    if pid_of slurmctld >/dev/null; then
        thaw slurmctld
        in_node login timeout 10 scancel --state=RUNNING -p batch,debug,scavenge,mig 2>/dev/null || true
        sleep 0.3
    fi
    for daemon in "$CL"/run/slurmd-*.pid "$CL"/run/sshd-*.pid; do [ ! -e "$daemon" ] || stop "$(basename "$daemon" .pid)"; done
    # shellcheck disable=SC2046  # one word a node
    kill_inside TERM laptop $(node_names)
    for daemon in slurmctld sshd slurmdbd mariadbd munged; do stop "$daemon" 20; done
    # shellcheck disable=SC2046
    kill_inside KILL laptop login $(node_names)
    for node in $(node_names); do
        find /sys/fs/cgroup/*/slurm_"$node" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
    [ ! -d "$ETC" ] || ! grep -qs "^ClusterName=$CLUSTER\$" "$ETC/slurm.conf" || config_down
    network_down
    [ -z "$ROOT" ] || chroot_down
}

status() {
    local daemon pid
    while read -r daemon; do
        pid=$(pid_of "$daemon") || pid=
        printf '%-14s %s\n' "$daemon" "${pid:+pid $pid, $(awk '/VmRSS/{print $2}' "/proc/$pid/status") KiB}"
    done < <(all_daemons)
    pid_of slurmctld >/dev/null || { echo down; return 3; }
    echo "mode           $(cat "$CL/mode")"
    in_node login timeout 10 sinfo -N -o '%N %T %G %c %m' | uniq
}

wipe() { down; rm -rf "$CL"/{state-*,spool,mysql,run,log,mode,accounts.done}; }

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
verb=${1:-}
[ $# = 0 ] || shift
[[ $verb == in ]] || [ "$(id -u)" = 0 ] || die "needs root"
case $verb in
    in) [ $# -ge 2 ] || usage; in_node "$@" ;;
    status) status ;;
    up | down | wipe | start | stop | freeze | thaw)
        exec 9>/run/hpc-cluster.lock; flock 9  # two test runs at once: the second waits, and finds it done
        MEMORY=$(memory_mode)
        MODE="accounting=$ACCOUNTING memory=$MEMORY root=${ROOT:-/}"
        case $verb in
            up | down | wipe) [ $# = 0 ] || usage ;;
            *) [ $# = 1 ] || usage; check_name "$1" ;;
        esac
        "$verb" "$@" ;;
    *) usage ;;
esac
