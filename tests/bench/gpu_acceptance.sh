#!/usr/bin/env bash
# All that the tests cannot know without a GPU, in under ten minutes on one: a table with PASS, FAIL or SKIP per line.
#
#   setup/run.sh tests/bench/gpu_acceptance.sh [UPSTREAM]     UPSTREAM: a checkout of github.com/bit1029public/HRSSM
#
# Exit status: 0 all passed, 1 something failed, 2 no GPU. What the checks print is kept in the folder named at the end.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
upstream=${1:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
checks=$root/tests/bench/gpu_checks.py
bench=$root/tests/bench/bench.py

if ! cards=$(python "$checks" gpus); then exit 2; fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/gpu_acceptance.XXXXXX")
table=$folder/table
failed=0

# check NAME SECONDS COMMAND...: run it; its last line goes into the table
check() {
  local name=$1 seconds=$2 log start verdict=PASS
  shift 2
  log=$folder/${name// /_}.log
  start=$SECONDS
  timeout "$seconds" "$@" >"$log" 2>&1 || verdict=FAIL
  [ "$verdict" = PASS ] || failed=1
  printf '%-4s  %-34s %4d s  %s\n' "$verdict" "$name" $((SECONDS - start)) "$(grep -v '^ *$' "$log" | tail -n 1)" | tee -a "$table"
}

skip() { printf 'SKIP  %-34s         %s\n' "$1" "$2" | tee -a "$table"; }

# show NAME: what a check printed, below its line
show() { sed 's/^/        /' "$folder/${1// /_}.log" | tee -a "$table"; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$table"

short="--configs tiny --task dmc_cartpole_balance --device cuda --envs 2 --overlap False --time_limit 100 --steps 1600"
short+=" --prefill 60 --eval_every 800 --eval_episode_num 2 --log_every 40 --pretrain 10 --actor_start 20"
short+=" --train_ratio 64 --slow_target_update 3 --simple_log True"
# shellcheck disable=SC2086
train() { check "$1" 90 python "$checks" train "$2" $short --logdir "$folder/$3" "${@:4}"; }

train "eager run" resident eager --compile off
train "recorded run, replay on the GPU" resident resident --compile auto
train "recorded run, replay pinned" pinned pinned --compile auto
train "first half of a recorded run" resident halves --compile auto --steps 800
train "second half, resumed" resident halves --compile auto
for logdir in resident pinned halves; do
  check "eager and $logdir rows" 30 python "$checks" rows "$folder/eager" "$folder/$logdir"
done

check "waits for the GPU" 60 python "$checks" syncs --configs dmc_vision
check "launches" 120 python "$bench" launches --device cuda --modes off,auto --rounds 3
show launches
check "update" 120 python "$bench" update --device cuda --rounds 3 ${upstream:+--upstream "$upstream"}
show update

vision="--configs dmc_vision --task dmc_walker_stand --device cuda --steps 20000 --eval_every 10000 --log_every 1000"
# shellcheck disable=SC2086
check "20,000 frames" 300 python "$root/dreamer.py" $vision --eval_episode_num 2 --logdir "$folder/vision"
check "20,000 frames, losses and speed" 30 python "$checks" run "$folder/vision"

if [ "$cards" -ge 2 ]; then
  # shellcheck disable=SC2086
  check "two ranks with NCCL" 120 torchrun --standalone --nproc_per_node 2 "$root/dreamer.py" $short --logdir "$folder/ranks"
  check "two ranks, losses and speed" 30 python "$checks" run "$folder/ranks"
else
  skip "two ranks with NCCL" "needs two GPUs"
fi

echo "$SECONDS s; what was printed is in $folder"
exit "$failed"
