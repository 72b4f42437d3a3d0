# shellcheck shell=bash
# The configuration: slurm.conf, gres.conf, cgroup.conf and slurmdbd.conf. Sourced by cluster.sh.
ETC=${ROOT}/etc/slurm
CLUSTER=hpctest                                # ClusterName; also how a slurm.conf is known to be ours

memory_mode() {  # cgroup: a job over its memory ends OUT_OF_MEMORY; poll: it is killed and ends FAILED or CANCELLED
    [ -z "${HPC_CLUSTER_MEMORY:-}" ] || { echo "$HPC_CLUSTER_MEMORY"; return; }
    local probe=/sys/fs/cgroup/memory/hpc-cluster-probe
    if [ -z "$ROOT" ] && mkdir "$probe" 2>/dev/null; then
        if echo 64M 2>/dev/null >"$probe/memory.limit_in_bytes"; then echo cgroup; else echo poll; fi
        rmdir "$probe"
    else echo poll; fi
}

refuse_foreign_config() {
    [ ! -s "$ETC/slurm.conf" ] || grep -q "^ClusterName=$CLUSTER\$" "$ETC/slurm.conf" ||
        die "$ETC/slurm.conf belongs to another cluster: not touching it"
}

slurm_conf() {
    local node address
    cat <<E1
ClusterName=$CLUSTER
SlurmctldHost=login($NET.0.1)
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=cred_expire=10
StateSaveLocation=$CL/state-$ACCOUNTING
SlurmdSpoolDir=$CL/spool/%n
SlurmctldPidFile=$CL/run/slurmctld.own.pid
SlurmdPidFile=$CL/run/slurmd-%n.own.pid
SlurmctldLogFile=$CL/log/slurmctld.log
SlurmdLogFile=$CL/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
DefMemPerCPU=2000
SlurmctldTimeout=10
SlurmdTimeout=30
KillWait=5
MinJobAge=300
JobRequeue=1
MaxArraySize=5001
MaxJobCount=20000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,batch_sched_delay=0,sched_interval=5
PriorityType=priority/multifactor
PriorityWeightAge=1000
PriorityWeightFairshare=1000
PriorityWeightQOS=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
E1
    case $MEMORY in
        cgroup) echo "TaskPlugin=task/cgroup" ;;
        *) printf '%s\n' "TaskPlugin=task/none" "JobAcctGatherParams=OverMemoryKill" ;;
    esac
    case $ACCOUNTING in
        none) echo "AccountingStorageType=accounting_storage/none" ;;
        *) cat <<E2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=login
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu,gres/gpu:a100
E2
    esac
    # 128 CPUs and 1 TB each, as a DGX has: config_overrides lets slurmd believe it
    echo "NodeName=DEFAULT Sockets=2 CoresPerSocket=32 ThreadsPerCore=2 RealMemory=1000000 State=UNKNOWN"
    nodes | while read -r node address; do
        case $node in
            mig*) echo "NodeName=$node NodeAddr=$address Gres=gpu:1g.10gb:56 Feature=a100,mig" ;;
            *) echo "NodeName=$node NodeAddr=$address Gres=gpu:a100:8 Feature=a100,dgx" ;;
        esac
    done
    cat <<E3
PartitionName=DEFAULT State=UP MaxTime=INFINITE DefaultTime=60
PartitionName=batch Nodes=dgx[01-04] Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=7-00:00:00
PartitionName=debug Nodes=dgx01 PriorityTier=10 PreemptMode=OFF MaxTime=30
PartitionName=scavenge Nodes=dgx[01-04] PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=mig Nodes=mig01 PriorityTier=10 PreemptMode=OFF
E3
}

gpus() {  # a gres.conf line needs File= naming character devices: with a count only, the node goes INVAL. /dev/null's serve
    local i
    for i in $(seq 0 55); do [ -e "$CL/dev/nvidia$i" ] || mknod "$CL/dev/nvidia$i" c 1 3; done
    cat <<E1
AutoDetect=off
NodeName=dgx[01-04] Name=gpu Type=a100 File=$CL/dev/nvidia[0-7]
NodeName=mig01 Name=gpu Type=1g.10gb File=$CL/dev/nvidia[0-55]
E1
}

cgroup_conf() {
    if [ -n "$ROOT" ]; then echo "CgroupPlugin=disabled"; return; fi       # 22.05 does not know this word, 23.11 does
    echo "CgroupPlugin=cgroup/v1"
    case $MEMORY in
        cgroup) printf '%s\n' "CgroupMountpoint=/sys/fs/cgroup" "ConstrainRAMSpace=yes" "ConstrainCores=no" "ConstrainDevices=no" ;;
        *) echo "CgroupAutomount=no" ;;
    esac
}

slurmdbd_conf() {
    cat <<E1
AuthType=auth/munge
DbdHost=localhost
SlurmUser=slurm
LogFile=$CL/log/slurmdbd.log
PidFile=$CL/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=3306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
E1
}

become() {  # FILE   its new text comes by stdin; whoever reads it meanwhile sees the old one or the new one
    cat >"$1.part"
    if cmp -s "$1.part" "$1"; then rm "$1.part"; else mv "$1.part" "$1"; fi
}

config_up() {  # also while others are at work: an 'up' of what is up changes nothing
    mkdir -p "$ETC"
    slurm_conf | become "$ETC/slurm.conf"
    gpus | become "$ETC/gres.conf"
    cgroup_conf | become "$ETC/cgroup.conf"
    install -m 600 -o slurm -g slurm /dev/null "$ETC/slurmdbd.conf.part"
    slurmdbd_conf | become "$ETC/slurmdbd.conf"
}

config_down() {  # not just removed: with no slurm.conf at all a stray squeue asks DNS, and with the old one it would
    # look for 10.77.0.1 by the default route. The loopback, where nothing listens, refuses at once.
    rm -f "$ETC"/{gres,cgroup,slurmdbd}.conf
    printf '%s\n' "ClusterName=$CLUSTER" "SlurmctldHost=localhost(127.0.0.1)" SlurmctldTimeout=2 MessageTimeout=2 >"$ETC/slurm.conf"
}
