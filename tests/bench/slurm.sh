#!/usr/bin/env bash
# setup/slurm.sh under a real Slurm on this machine: an array, preemption with requeue, a time limit, and resume.
#
#   apt-get install slurm-wlm munge && tests/bench/slurm.sh [FOLDER]
#
# As root. Starts munged, slurmctld and slurmd with a configuration of its own in FOLDER (default: a new one in /tmp),
# ends them at the end and leaves the logs. Uses the `python` on PATH; not part of the test suite.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd -P)
folder=$(realpath -m -- "${1:-$(mktemp -d /tmp/hrssm-slurm.XXXX)}")
node=$(hostname -s)
mkdir -p "$folder"/{state,spool,run} /run/munge
chown munge: /run/munge
python=$(command -v python)
export SLURM_CONF=$folder/slurm.conf

# setup/run.sh would make an environment; here the present one runs the same command.
mkdir -p "$folder/repo/setup"
cp "$root"/setup/slurm.sh "$folder/repo/setup/"
cp -r "$root"/*.py "$root"/configs.yaml "$root"/envs "$folder/repo/"
cp "$root"/setup/tensor_names.py "$folder/repo/setup/"
printf '#!/bin/sh\nshift\nexec %q "$@"\n' "$python" >"$folder/repo/setup/run.sh"
chmod +x "$folder/repo/setup/run.sh"

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=500000
KillWait=30
MinJobAge=3600
NodeName=$node CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=$node Default=YES PriorityTier=1 GraceTime=60 MaxTime=60 State=UP
PartitionName=high Nodes=$node PriorityTier=2 PreemptMode=OFF MaxTime=60 State=UP
END

stop() {
  scancel --user=root 2>/dev/null || true
  sleep 5
  for daemon in slurmd slurmctld; do
    [ ! -s "$folder/run/$daemon.pid" ] || kill "$(cat "$folder/run/$daemon.pid")" 2>/dev/null || true
  done
  [ -z "${munge:-}" ] || kill "$munge" 2>/dev/null || true
}
trap stop EXIT

say() { echo "$(date +%T) $*"; }
wait_for() { # SECONDS COMMAND...: until it succeeds
  local limit=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$limit" ] || { say "gave up waiting for: $*" && squeue -a && exit 1; }
    sleep 1
  done
}
jobs() { squeue -h -a -r -o '%.8i %.4t %.10M %.4K %r' 2>/dev/null; }
state() { squeue -h -a -r -j "$1" -o %T; }
is() { [ "$(state "$1")" = "$2" ]; }

pgrep -x munged >/dev/null || { setpriv --reuid munge --regid munge --clear-groups munged --foreground 2>"$folder/munged.log" & munge=$!; }
wait_for 20 munge -n
slurmctld && slurmd
wait_for 30 sh -c "sinfo -h -o %T | grep -q idle"
sinfo

# Two array tasks that take turns on one node, small enough to end in minutes; the GPU of the script is left out here.
cd "$folder/repo"
submit=(sbatch --parsable --gpus-per-task=0 --cpus-per-task=1 --mem=900M --output="$folder/job-%A_%a.log")
run=(--configs tiny --size 64,64 --time_limit 200 --envs 1 --parallel False --overlap False --dyn_deter 24
  --dyn_hidden 24 --units 24 --batch_size 4 --prefill 200 --pretrain 20 --eval_every 400 --eval_episode_num 1
  --save_every 0 --train_ratio 4 --simple_log True --device cpu --action_repeat 2)
tasks=dmc_cartpole_balance
log() { cat "$folder/job-$1.log"; }

say "1. array and preemption: two seeds in the low partition, then a job with priority"
low=$("${submit[@]}" --partition=low --array=0-1 --time=30 setup/slurm.sh "$folder/runs" "$tasks" 2 "${run[@]}" --steps "${STEPS:-2400}")
wait_for 60 is "${low}_0" RUNNING
for seed in 0 1; do wait_for 120 grep -q "eval/return" "$folder/runs/$tasks/$seed/metrics.jsonl"; done
jobs
high=$(sbatch --parsable --partition=high --cpus-per-task=2 --mem=100M --output="$folder/high.log" --wrap 'sleep 5')
say "submitted $high to the high partition"
wait_for 90 is "$high" RUNNING
jobs
wait_for 60 grep -q "Stopped by SIGTERM; saved" "$folder/job-${low}_0.log"
wait_for 300 is "${low}_0" RUNNING # Slurm lets two minutes pass before a requeued job starts
say "requeued and running again"
jobs
wait_for 600 sh -c "! squeue -h -a -r -t PD,R,CG -j $low | grep -q ."

say "2. time limit of one minute: SIGTERM 180 s before it is at once, so here 20 s before it"
limit=$("${submit[@]}" --partition=low --array=0 --time=1 --signal=TERM@20 setup/slurm.sh "$folder/limited" "$tasks" 1 "${run[@]}" --steps "${LONG:-100000}")
wait_for 120 grep -q "Stopped by SIGTERM; saved" "$folder/job-${limit}_0.log"
wait_for 400 grep -q "Resumed" "$folder/job-${limit}_0.log"
scancel "$limit"

say "logs"
for name in "${low}_0" "${low}_1" "${limit}_0"; do
  echo "--- job-$name.log" && grep -E "Stopped|Resumed|on cpu|CANCEL|PREEMPT|requeue|error" "$folder/job-$name.log"
done
for seed in 0 1; do
  grep -q Resumed "$folder/job-${low}_$seed.log"
  tail -n 1 "$folder/runs/$tasks/$seed/metrics.jsonl" | cut -c 1-80
done
grep -E "Requeuing|Started|Allocate|_job_complete" "$folder/slurmctld.log" || true
say "done: preempted, requeued, resumed, finished"
