# shellcheck shell=bash
# The network: one network + UTS namespace for each machine of the cluster. Sourced by cluster.sh.
#
#   laptop --veth 10.77.1.0/30-- login --bridge 10.77.0.0/24-- dgx01..04, mig01
#
# Every node so has its own hostname, address and ports, and 'laptop' reaches nothing but the login node. All share the
# kernel, the file system, /etc/passwd and the clock.
NS=/run/netns
UTS=/run/hpc-cluster-uts
NET=10.77
MARK='# hpc-cluster'                           # marks our lines in /etc/hosts

nodes() {  # NAME ADDRESS of each compute node
    local i
    for i in 1 2 3 4; do echo "dgx0$i $NET.0.1$i"; done
    echo "mig01 $NET.0.51"
}
node_names() { nodes | cut -d' ' -f1; }

in_node() {  # NODE CMD...   not 'ip netns exec': that one remounts /sys and so hides /sys/fs/cgroup
    local node=$1; shift
    nsenter --net="$NS/$node" --uts="$UTS/$node" -- "${IN_ROOT[@]}" "$@"
}

namespace() {
    [ -e "$NS/$1" ] || ip netns add "$1"
    if ! mountpoint -q "$UTS/$1"; then touch "$UTS/$1"; unshare --uts="$UTS/$1" hostname "$1"; fi
    ip -n "$1" link set lo up
}

hosts_without_ours() { grep -v "$MARK\$" /etc/hosts || true; }
write_hosts() {  # in place: it may be a bind mount; and only what is new, since others read it
    local text; text=$(cat)
    [ "$text" = "$(cat /etc/hosts)" ] || echo "$text" >/etc/hosts
}

network_up() {
    local node address
    mkdir -p "$UTS"
    namespace login
    namespace laptop
    if ! ip -n login link show br0 >/dev/null 2>&1; then
        ip -n login link add br0 type bridge
        ip -n login addr add "$NET.0.1/24" dev br0
        ip -n login link set br0 up
        ip link add eth0 netns laptop type veth peer name up0 netns login
        ip -n laptop addr add "$NET.1.1/30" dev eth0
        ip -n laptop link set eth0 up
        ip -n login addr add "$NET.1.2/30" dev up0
        ip -n login link set up0 up
    fi
    ip route replace unreachable "$NET.0.0/16"     # the machine itself takes no part: nothing for these may leave it
    while read -r node address; do
        namespace "$node"
        ip -n "$node" link show eth0 >/dev/null 2>&1 && continue
        ip link add eth0 netns "$node" type veth peer name "v-$node" netns login
        ip -n login link set "v-$node" master br0
        ip -n login link set "v-$node" up
        ip -n "$node" addr add "$address/24" dev eth0
        ip -n "$node" link set eth0 up
    done < <(nodes)
    { hosts_without_ours; echo "$NET.0.1 login $MARK"; nodes | while read -r node address; do echo "$address $node $MARK"; done; } |
        write_hosts
    [ -z "$ROOT" ] || cp /etc/hosts "$ROOT/etc/hosts"
}

kill_inside() {  # SIGNAL NODE...   whatever still runs there: job steps, ssh sessions, services
    local signal=$1 node pids=(); shift
    for node in "$@"; do
        [ -e "$NS/$node" ] && mapfile -t -O "${#pids[@]}" pids < <(ip netns pids "$node" | grep -vx "$$")
    done
    [ ${#pids[@]} = 0 ] || kill "-$signal" "${pids[@]}" 2>/dev/null || true
}

network_down() {
    local node
    ip route del unreachable "$NET.0.0/16" 2>/dev/null || true
    for node in laptop login $(node_names); do
        [ ! -e "$NS/$node" ] || ip netns del "$node"
        ! mountpoint -q "$UTS/$node" || umount "$UTS/$node"
        rm -f "$UTS/$node"
    done
    rmdir "$UTS" 2>/dev/null || true
    hosts_without_ours | write_hosts
}
