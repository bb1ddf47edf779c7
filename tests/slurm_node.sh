#!/usr/bin/env bash
# Start a real SLURM (slurmctld, slurmd, munge) on this machine, with pretend nodes of one pretend GPU each, so that
# job scripts run unmodified. Free ports, so that several can run side by side. Needs root and Debian's packages:
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# usage: eval "$(slurm_node.sh start DIR [NODES])"  (exports SLURM_CONF)   |   slurm_node.sh stop DIR
set -euo pipefail
action=$1 dir=$(realpath -m "$2") nodes=${3:-2} host=$(hostname)
case $action in
start)
  mkdir -p "$dir"/{state,log,dev} /run/munge && chown munge:munge /run/munge
  munge -n >/dev/null 2>&1 || su -s /bin/sh munge -c '/usr/sbin/munged --force' >&2
  read -ra ports < <(python3 - "$((nodes + 1))" <<'P'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for each in sockets:
    each.bind(("", 0))
print(*(each.getsockname()[1] for each in sockets))
P
  )
  cat >"$dir/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until credentials of its first start have expired: 2 minutes by default.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool.%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
C
  for ((i = 1; i <= nodes; i++)); do
    [ -e "$dir/dev/gpu$i" ] || mknod "$dir/dev/gpu$i" c 1 3
    echo "NodeName=node$i Name=gpu File=$dir/dev/gpu$i" >>"$dir/gres.conf"
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$i]} CPUs=$(nproc) RealMemory=4000" \
      "Gres=gpu:1 State=UNKNOWN" >>"$dir/slurm.conf"
  done
  echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
  slurmctld -c -f "$dir/slurm.conf" >&2
  for ((i = 1; i <= nodes; i++)); do slurmd -N "node$i" -f "$dir/slurm.conf" >&2; done
  for _ in $(seq 60); do
    [ "$(SLURM_CONF=$dir/slurm.conf sinfo -h -N -o %T 2>/dev/null | grep -c idle)" = "$nodes" ] && break
    sleep 0.5
  done
  echo "export SLURM_CONF=$dir/slurm.conf"
  ;;
stop)
  for file in "$dir"/slurmd.*.pid "$dir"/slurmctld.pid; do
    [ ! -f "$file" ] || kill "$(cat "$file")" || true
  done
  ;;
esac
