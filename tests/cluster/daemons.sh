# The daemons of the test cluster: where they live, how each one starts and stops. Sourced by up, down and daemon.
#
# Everything is in the folder BATON_CLUSTER and listens on 127.0.0.1 only. No system service is started, stopped or
# configured. The daemons are
#   munge        authentication, with a key of its own
#   database     MariaDB, not with BATON_CLUSTER_ACCOUNTING=0
#   accounting   slurmdbd, not with BATON_CLUSTER_ACCOUNTING=0
#   controller   slurmctld
#   node1 node2  slurmd, two of them on this one machine
# shellcheck shell=bash

BATON_CLUSTER=$(realpath -m "${BATON_CLUSTER:-${TMPDIR:-/tmp}/baton-cluster}")
# Exported, because a daemon is recognised as ours by this variable in its environment.
export BATON_CLUSTER
export SLURM_CONF=$BATON_CLUSTER/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
cluster=$BATON_CLUSTER
nodes=(node1 node2)
# In the order in which they start. They stop in the opposite order.
daemons=(munge database accounting controller "${nodes[@]}")

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# wait_until SECONDS COMMAND...: true as soon as the command succeeds, false if it never does.
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" &>/dev/null; do
    ((SECONDS <= deadline)) || return 1
    sleep 0.1
  done
}

# Prints the port of a daemon. The cluster has one for each, starting at the one that choose_ports chose.
port_of() {
  local i
  for i in "${!daemons[@]}"; do
    [[ ${daemons[i]} != "$1" ]] || echo $(($(<"$cluster/first_port") + i))
  done
}

program_of() {
  case $1 in
    munge) echo munged ;;
    database) echo mariadbd ;;
    accounting) echo slurmdbd ;;
    controller) echo slurmctld ;;
    node*) echo slurmd ;;
    *) die "no daemon is called '$1'; there are: ${daemons[*]}" ;;
  esac
}

# Prints the process id of a running daemon. Process ids are used again by the system, so the pid file alone proves
# nothing: the process must be that program, started for this cluster.
pid_of() {
  local pid
  pid=$(cat "$cluster/pid/$1" 2>/dev/null) && [[ -n $pid ]] || return 1
  [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$(program_of "$1")" ]] || return 1
  grep --quiet --null-data --line-regexp --fixed-strings "BATON_CLUSTER=$cluster" "/proc/$pid/environ" || return 1
  printf '%s\n' "$pid"
}

is_gone() { ! kill -0 "$1" 2>/dev/null || grep --quiet '^State:.*Z' "/proc/$1/status" 2>/dev/null; }

# Prints the end of a daemon's log and gives up.
failed() {
  say "$2"
  tail -n 5 "$cluster/log/$1" >&2 || true
  exit 1
}

in_background() {
  local name=$1
  shift
  setsid --fork "$@" >>"$cluster/log/$name" 2>&1 </dev/null
}

start() {
  program_of "$1" >/dev/null
  ! pid_of "$1" >/dev/null || return 0
  case $1 in
    node*) start_node "$1" ;;
    *) "start_$1" ;;
  esac
}

start_munge() {
  local folder=$cluster/munge
  mkdir -p "$folder"
  chmod 755 "$folder"
  [[ -s $folder/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/key")
  munged --force --socket="$folder/socket" --key-file="$folder/key" --seed-file="$folder/seed" \
    --pid-file="$cluster/pid/munge" --log-file="$cluster/log/munge" || failed munge "munged does not start"
  wait_until 5 munge --socket="$folder/socket" --no-input || failed munge "munged does not answer"
}

start_database() {
  local folder=$cluster/database
  mkdir -p "$folder"
  if ((EUID == 0)); then chown mysql "$folder" "$cluster/pid"; fi
  local as_user=()
  ((EUID != 0)) || as_user=(--user=mysql)
  if [[ ! -d $folder/mysql ]]; then
    mariadb-install-db --no-defaults "${as_user[@]}" --datadir="$folder" --skip-test-db \
      --auth-root-authentication-method=normal >>"$cluster/log/database" 2>&1 \
      || failed database "mariadb-install-db failed"
  fi
  # Nothing in it must outlive the machine, so it never waits for the disk.
  in_background database mariadbd --no-defaults "${as_user[@]}" --datadir="$folder" --socket="$folder/socket" \
    --pid-file="$cluster/pid/database" --bind-address=127.0.0.1 --port="$(port_of database)" --skip-name-resolve \
    --innodb-buffer-pool-size=32M --innodb-log-file-size=8M --innodb-flush-log-at-trx-commit=0 \
    --innodb-flush-method=nosync --skip-log-bin --performance-schema=OFF
  # A query and not mariadb-admin ping, which is content with "access denied".
  wait_until 20 database_query "SELECT 1" || failed database "MariaDB does not answer"
  database_query "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
    CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
    GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1'"
}

database_query() { mariadb --no-defaults --user=root --socket="$cluster/database/socket" --execute="$1"; }

start_accounting() {
  in_background accounting slurmdbd -D
  wait_until 20 is_listening "$(port_of accounting)" || failed accounting "slurmdbd does not listen"
}

start_controller() {
  slurmctld -f "$SLURM_CONF" &>>"$cluster/log/controller" || failed controller "slurmctld does not start"
  wait_until 15 controller_answers || failed controller "slurmctld does not answer"
}

controller_answers() { scontrol ping | grep --quiet 'is UP'; }

start_node() {
  mkdir -p "$cluster/spool/$1"
  slurmd -N "$1" -f "$SLURM_CONF" &>>"$cluster/log/$1" || failed "$1" "slurmd does not start"
}

is_listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }

# stop NAME [SIGNAL]: ends a daemon and waits until it is gone. Jobs of a node that is stopped run on.
stop() {
  local pid
  if pid=$(pid_of "$1"); then
    # A frozen process cannot die of SIGTERM.
    kill -CONT "$pid"
    kill "-${2:-TERM}" "$pid"
    wait_until 15 is_gone "$pid" || { say "$1 does not stop, killing it"; kill -KILL "$pid"; }
  fi
  rm -f "$cluster/pid/$1"
}
