#!/usr/bin/env bash
# Trains tasks x methods x seeds, a few at a time, in LOGDIR/TASK/METHOD/SEED. Running the same command again skips
# finished runs and resumes interrupted ones. Several copies of it, on other GPUs or machines that share the folder too,
# divide the runs among themselves.
set -euo pipefail

usage() {
  cat <<'END'
usage: setup/sweep.sh --logdir DIR --tasks A,B [--seeds 0,1,2] [--methods hrssm,nomlr] [--jobs N] [--status] [-- OPTIONS]

  --methods  comma-separated (default full), each of
               hrssm, dreamer, rssm, repo, r2dreamer, infonce   a value of dreamer.py's --method
               full, nomlr, nosimsr, neither                    HRSSM, and HRSSM without latent reconstruction, without
                                                                bisimulation, or without both
             or options of dreamer.py as key=value; parts are joined by +:
               mask_ratio=0.3, nomlr+patch_size=8, dreamer+batch_size=8
  --jobs     runs at a time (default 1); limit the cores of each with -- --threads N
  --status   print the table and exit
  OPTIONS    passed to every run, for example --configs dmc_vision

  CUDA_VISIBLE_DEVICES=0 setup/sweep.sh --logdir ./sweep --tasks dmc_walker_stand --seeds 0,1,2 \
    --methods hrssm,neither,dreamer,mask_ratio=0.3,mask_ratio=0.7 -- --configs dmc_vision
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

{ # bash reads a script while running it; the braces make it read all of it first, in case the checkout changes
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
logdir='' tasks='' seeds=0 methods=full jobs=1 status=''
while [ $# -gt 0 ]; do
  case $1 in
  -h | --help) usage && exit ;;
  --) shift && break ;;
  --status) status=1 && shift && continue ;;
  --logdir | --tasks | --seeds | --methods | --jobs)
    [ $# -gt 1 ] || die "$1 needs a value"
    printf -v "${1#--}" %s "$2" && shift 2
    ;;
  *) die "unknown option $1: options of dreamer.py go after --, see setup/sweep.sh --help" ;;
  esac
done
options=("$@")
[ -n "$logdir" ] || die "--logdir is missing: name the folder for all runs"
[ -n "$tasks" ] || die "--tasks is missing: for example --tasks dmc_walker_stand,dmc_cheetah_run"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die "--jobs takes a number of runs, not '$jobs'"
[[ $seeds =~ ^(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*$ ]] || die "--seeds takes numbers such as 0,1,2, not '$seeds'"
name='[a-zA-Z0-9][^,]*'
[[ $tasks =~ ^$name(,$name)*$ ]] || die "--tasks takes names such as dmc_walker_stand, separated by commas, not '$tasks'"

unknown_method() {
  die "unknown method '$1': there is full, nomlr, nosimsr, neither, hrssm, dreamer, rssm, repo, r2dreamer, infonce," \
    "and key=value such as mask_ratio=0.3, joined by +"
}

# The flags of a method, one per line.
flags() {
  local part parts
  [[ $1 =~ ^[^+]+(\+[^+]+)*$ ]] || unknown_method "$1"
  IFS=+ read -ra parts <<<"$1"
  for part in "${parts[@]}"; do
    case $part in
    full) ;;
    hrssm | dreamer | rssm | repo | r2dreamer | infonce) echo "--method=$part" ;;
    nomlr | nosimsr) echo "--$part=True" ;;
    neither) printf '%s\n' --nomlr=True --nosimsr=True ;;
    [a-zA-Z_]*=?*) echo "--$part" ;;
    *) unknown_method "$1" ;;
    esac
  done
}

# Every run of the sweep: its folder and, in `commands`, its command, quoted for the shell.
runs=() commands=()
declare -A listed=()
IFS=, read -ra all_tasks <<<"$tasks"
IFS=, read -ra all_methods <<<"$methods"
IFS=, read -ra all_seeds <<<"$seeds"
for task in "${all_tasks[@]}"; do
  for method in "${all_methods[@]}"; do
    lines=$(flags "$method")
    mapfile -t own <<<"$lines"
    [ -n "$lines" ] || own=()
    for seed in "${all_seeds[@]}"; do
      run=$logdir/${task//[\/:]/_}/${method//\//_}/$seed
      [ -z "${listed[$run]:-}" ] || die "$task, $method, seed $seed is listed twice: it would train in $run twice"
      listed[$run]=1
      command=(python -u "$root/dreamer.py" "${options[@]}" --task "$task" --seed "$seed" "${own[@]}" --logdir "$run")
      runs+=("$run") commands+=("${command[*]@Q}")
    done
  done
done

# sweep.done holds the command that finished: with another --steps a run counts as unfinished.
finished() { [ "$(cat "${runs[$1]}/sweep.done" 2>/dev/null)" = "${commands[$1]}" ]; }

state() {
  local run=${runs[$1]}
  if finished "$1"; then
    echo finished
  elif [ ! -e "$run/sweep.lock" ]; then
    echo waiting
  elif ! flock --nonblock "$run/sweep.lock" true; then
    echo running
  elif [ -e "$run/sweep.failed" ]; then
    echo failed
  else
    echo interrupted
  fi
}

table() {
  local i run step return
  printf '%-12s %10s %10s  %s\n' state step return run
  for i in "${!runs[@]}"; do
    run=${runs[$i]} step=- return=-
    if [ -s "$run/metrics.jsonl" ]; then
      step=$(tail -n 1 "$run/metrics.jsonl" | sed -nE 's/^\{"step": ([0-9]+).*/\1/p')
      return=$(sed -nE 's/.*"eval\/return": (-?[0-9]+\.?[0-9]?).*/\1/p' "$run/metrics.jsonl" | tail -n 1)
    fi
    printf '%-12s %10s %10s  %s\n' "$(state "$i")" "${step:--}" "${return:--}" "$run"
    [ ! -e "$run/sweep.failed" ] || finished "$i" || tail -n 1 "$run/sweep.log" | sed 's/^/  /'
  done
}

# Process id -> run. A process holds the lock of its run until it exits, even if this script is killed.
declare -A running=()
busy=75

start() {
  local command
  eval "command=(${commands[$1]})"
  mkdir -p "${runs[$1]}"
  (
    exec 9>>"${runs[$1]}/sweep.lock"
    flock --timeout 0.2 9 || exit "$busy" # wait a little: --status holds it for a moment
    ! finished "$1" || exit 0
    rm -f "${runs[$1]}/sweep.failed"
    exec "${command[@]}" >>"${runs[$1]}/sweep.log" 2>&1
  ) &
  running[$!]=$1
  [ -z "$stopped" ] || stop "$stopped" # the signal arrived just before
}

# Once a minute the last line of every running log: a sign of life.
every=${SWEEP_SECONDS:-60} clock=''
report() {
  local i
  for i in "${running[@]}"; do
    echo "${runs[$i]}: $(tail -n 1 "${runs[$i]}/sweep.log" 2>/dev/null | tr -d '\r')"
  done
}

# Waits for one process to end and records the outcome.
reap() {
  local pid='' code=0 run
  [ -n "$clock" ] || { sleep "$every" >/dev/null 2>&1 & clock=$!; }
  wait -n -p pid || code=$?
  [ -n "${pid:-}" ] || return 0 # interrupted by a signal, which was passed on to the processes
  if [ "$pid" = "$clock" ]; then
    clock=''
    report
    return
  fi
  run=${runs[${running[$pid]}]}
  case $code in
  0) echo "${commands[${running[$pid]}]}" >"$run/sweep.done" ;;
  "$busy" | 129 | 130 | 143) ;;
  *) echo "$code" >"$run/sweep.failed" ;;
  esac
  unset "running[$pid]"
}

if [ -n "$status" ]; then
  table
  exit
fi
python -c '' 2>/dev/null || die "no python: put setup/run.sh before this command"
stopped=''
stop() {
  stopped=$1
  kill -TERM "${!running[@]}" 2>/dev/null || true # each run saves and exits
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
for i in "${!runs[@]}"; do
  ! finished "$i" || continue
  while [ ${#running[@]} -ge "$jobs" ]; do reap; done
  [ -z "$stopped" ] || break
  start "$i"
done
while [ ${#running[@]} -gt 0 ]; do reap; done
[ -z "$clock" ] || kill "$clock" 2>/dev/null || true
table
[ -z "$stopped" ] || exit "$stopped"
for i in "${!runs[@]}"; do
  [ "$(state "$i")" != failed ] || exit 1
done
exit
}
