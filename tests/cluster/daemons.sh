# shellcheck shell=bash
# The daemons: start, stop and freeze one by its name. Sourced by cluster.sh.
#
# Each runs in its foreground mode under our own pid file CL/run/NAME.pid, its output in CL/log/NAME.out.
all_daemons() {  # those that 'up' starts
    [ "$ACCOUNTING" = none ] || printf '%s\n' mariadbd slurmdbd
    printf '%s\n' slurmctld sshd
    node_names | sed 's/^/slurmd-/'
}
known() { all_daemons; node_names | sed 's/^/sshd-/'; }
check_name() {
    known | grep -x -- "$1" >/dev/null || die "no daemon is called $1 (there are: $(all_daemons | xargs))"
}

pid_of() {  # prints the pid of a running daemon: not a zombie's, and not another program's that has the number since
    local pid comm state
    pid=$(cat "$CL/run/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return
    read -r _ comm state _ 2>/dev/null <"/proc/$pid/stat" || return
    [ "$comm" = "(${1%%-*})" ] && [ "$state" != Z ] && echo "$pid"
}

spawn() {  # NAME NODE CMD...
    local name=$1 node=$2 root=(); shift 2
    [[ $name != slurm* ]] || root=("${IN_ROOT[@]}")
    setsid nsenter --net="$NS/$node" --uts="$UTS/$node" -- "${root[@]}" "$@" </dev/null >>"$CL/log/$name.out" 2>&1 9>&- &
    echo $! >"$CL/run/$name.pid"
    disown
}

wait_for() {  # SECONDS CMD...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -le $end ] || die "still not true: $* (logs: $CL/log)"
        sleep 0.1
    done
}

sql() { mariadb --no-defaults --socket="$CL/run/mysqld.sock" -uroot -e "$1"; }
port_open() { in_node login bash -c "exec 3<>/dev/tcp/127.0.0.1/$1"; }

start() {  # NAME   and waits until it answers
    local node
    pid_of "$1" >/dev/null && return
    case $1 in
        mariadbd)
            [ -d "$CL/mysql/mysql" ] || mariadb-install-db --no-defaults --datadir="$CL/mysql" --user=mysql --skip-test-db \
                --auth-root-authentication-method=normal >"$CL/log/mariadb-install.log" 2>&1
            spawn mariadbd login mariadbd --no-defaults --user=mysql --datadir="$CL/mysql" --socket="$CL/run/mysqld.sock" \
                --pid-file="$CL/run/mysqld.own.pid" --bind-address=127.0.0.1 --port=3306 --skip-name-resolve \
                --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-flush-log-at-trx-commit=0 \
                --performance-schema=OFF --innodb-lock-wait-timeout=900
            wait_for 30 sql "SELECT 1"
            sql "CREATE DATABASE IF NOT EXISTS slurm_acct_db; CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
                GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';" ;;
        slurmdbd)
            spawn slurmdbd login setpriv --reuid=slurm --regid=slurm --clear-groups slurmdbd -D
            wait_for 60 port_open 6819 ;;
        slurmctld)
            spawn slurmctld login slurmctld -D
            wait_for 30 in_node login scontrol ping ;;
        slurmd-*)
            node=${1#slurmd-}
            mkdir -p "$CL/spool/$node"
            spawn "$1" "$node" slurmd -D
            wait_for 5 pid_of "$1" ;;
        sshd | sshd-*)  # 'up' starts the login node's only; sshd-dgx01 is for a site that lets its users in there
            node=${1#sshd}; node=${node#-}
            mkdir -p /run/sshd
            spawn "$1" "${node:-login}" /usr/sbin/sshd -D -e -f /dev/null -h "$CL/ssh/host_ed25519" -o PidFile=none -o UsePAM=no \
                -o PasswordAuthentication=no -o AuthorizedKeysFile=.ssh/authorized_keys ;;
    esac
}

stop() {  # NAME [SECONDS]   TERM, then KILL
    local pid i
    if pid=$(pid_of "$1"); then
        kill -TERM "$pid" || true
        kill -CONT "$pid" 2>/dev/null || true  # a frozen one hears nothing before; another is gone already
        for ((i = 0; i < ${2:-10} * 10; i++)); do pid_of "$1" >/dev/null || break; sleep 0.1; done
        ! pid_of "$1" >/dev/null || kill -KILL "$pid" || true
    fi
    rm -f "$CL/run/$1.pid"
}

signal() { local pid; pid=$(pid_of "$2") || die "$2 does not run"; kill "-$1" "$pid"; }
freeze() { signal STOP "$1"; }
thaw() { signal CONT "$1"; }
