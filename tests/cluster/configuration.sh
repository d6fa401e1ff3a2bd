# What the daemons of the test cluster read: ports, slurm.conf, gres.conf, slurmdbd.conf. Sourced by up.
# shellcheck shell=bash
# shellcheck source=tests/cluster/daemons.sh
source "${BASH_SOURCE[0]%/*}/daemons.sh"

# Once chosen, it stays.
accounting=${BATON_CLUSTER_ACCOUNTING:-$(cat "$cluster/accounting" 2>/dev/null || echo 1)}
num_gpus_per_node=2

# Ports are chosen once. They lie below the range that the system hands out itself, and the search starts at a place
# that depends on the folder, so that clusters brought up at the same time do not choose the same ones.
choose_ports() {
  [[ ! -s $cluster/first_port ]] || return 0
  local first_block block port
  first_block=$(cksum <<<"$cluster")
  first_block=$((${first_block%% *} % 1000))
  for ((block = first_block; block < first_block + 1000; block++)); do
    port=$((20000 + block % 1000 * 10))
    if are_free "$port"; then
      echo "$port" >"$cluster/first_port"
      return
    fi
  done
  die "no free ports in a row between 20000 and 30000"
}

are_free() {
  local port
  for ((port = $1; port < $1 + ${#daemons[@]}; port++)); do
    ! is_listening "$port" 2>/dev/null || return 1
  done
}

write_configuration() {
  echo "$accounting" >"$cluster/accounting"
  slurm_conf >"$cluster/slurm.conf"
  gres_conf >"$cluster/gres.conf"
  : >"$cluster/cgroup.conf"
  (umask 077 && slurmdbd_conf >"$cluster/slurmdbd.conf")
}

slurm_conf() {
  local host user
  host=$(hostname -s)
  user=$(id -un)
  cat <<CONF
ClusterName=baton
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port_of controller)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the delay before a requeued job may start again: 5 s is the least, 120 s the default.
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool/%n
SlurmctldPidFile=$cluster/pid/controller
SlurmdPidFile=$cluster/pid/%n
SlurmctldLogFile=$cluster/log/controller
SlurmdLogFile=$cluster/log/%n
SlurmctldDebug=verbose
SlurmdDebug=verbose
DebugFlags=NO_CONF_HASH
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobCompType=jobcomp/filetxt
JobCompLoc=$cluster/completed_jobs
$(accounting_conf)

# Nodes may claim more cores and memory than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=2000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
GresTypes=gpu

# Short times, so that tests do not wait.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
KillWait=3
# Not short: a job step that could not reach the controller tries again after 60 s, until then its node must not drain.
UnkillableStepTimeout=180
MinJobAge=3600
ReturnToService=2
JobRequeue=1

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A preempted job gets the signal of its own --signal first.
$(user_signal_conf)

NodeName=DEFAULT CPUs=4 CoresPerSocket=4 RealMemory=8000 Gres=gpu:$num_gpus_per_node
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port_of node1)
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port_of node2)
PartitionName=gpucluster Default=YES Nodes=node1,node2 MaxTime=04:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=node1,node2 PriorityTier=10 PreemptMode=OFF
CONF
}

# Slurm 23.02 renamed the option, and older ones stop at the new name.
user_signal_conf() {
  local version
  version=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  if ((${version/./} < 2302)); then
    echo SlurmctldParameters=preempt_send_user_signal
  else
    echo PreemptParameters=send_user_signal
  fi
}

accounting_conf() {
  if [[ $accounting == 0 ]]; then
    echo AccountingStorageType=accounting_storage/none
    return
  fi
  cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$(port_of accounting)
AccountingStoragePass=$cluster/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=limits
CONF
}

# Slurm asks of a GPU only that it is a character device whose name ends in a number, and it follows links.
gres_conf() {
  local gpu
  for ((gpu = 0; gpu < num_gpus_per_node; gpu++)); do
    ln -sfn /dev/null "$cluster/devices/nvidia$gpu"
  done
  echo "NodeName=node[1-2] Name=gpu Flags=nvidia_gpu_env File=$cluster/devices/nvidia[0-$((num_gpus_per_node - 1))]"
}

slurmdbd_conf() {
  cat <<CONF
AuthType=auth/munge
AuthInfo=socket=$cluster/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$(port_of accounting)
SlurmUser=$(id -un)
PidFile=$cluster/pid/accounting
LogFile=$cluster/log/accounting
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$(port_of database)
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
}
