#!/usr/bin/env bash
# One run per task and seed as a Slurm array. Preempted runs save, are requeued and resume.
#
#   sbatch --array=0-14 setup/slurm.sh ./runs dmc_walker_stand,dmc_cheetah_run,dmc_hopper_hop 5 --configs dmc_vision
#
# Arguments: folder for all runs, comma-separated tasks, number of seeds, options of dreamer.py. Submit it from the
# repository, with one array index per task and seed. Your cluster's options (partition, account, time) go before it.
#SBATCH --job-name=hrssm
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=24G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
#SBATCH --output=slurm-%A_%a.log
# --signal: SIGTERM to the run three minutes before the time limit, so that it can save.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

[ $# -ge 3 ] || die "usage: sbatch --array=0-N setup/slurm.sh FOLDER TASK,TASK SEEDS [OPTIONS of dreamer.py]"
logdir=$1 seeds=$3
IFS=, read -ra tasks <<<"$2"
shift 3
[[ $seeds =~ ^[1-9][0-9]*$ ]] || die "SEEDS is the number of seeds, not '$seeds'"
number=${SLURM_ARRAY_TASK_ID:?submit it with sbatch --array}
[ "$number" -lt $((${#tasks[@]} * seeds)) ] || die "--array goes to $((${#tasks[@]} * seeds - 1)) at most"
task=${tasks[$((number / seeds))]} seed=$((number % seeds))

trap : TERM # sent on preemption too; the run saves, and this script goes on to requeue it
# Slurm runs a copy of this script, in the folder where sbatch was called: the repository.
code=0
srun --kill-on-bad-exit=0 setup/run.sh python -u dreamer.py "$@" --task "$task" --seed "$seed" \
  --logdir "$logdir/${task//[\/:]/_}/$seed" || code=$?
case $code in
129 | 130 | 143) scontrol requeue "${SLURM_ARRAY_JOB_ID}_$number" ;; # stopped by a signal, and saved
*) exit "$code" ;;
esac
