#!/usr/bin/env bash
# The study of figures/results: every run, table and picture of it. Running the same command again skips what is
# finished and resumes what was interrupted.
set -euo pipefail

usage() {
  cat <<'END'
usage: setup/study.sh --out DIR [--clips GLOB] [--seeds 0,1,2] [--tasks A,B] [--methods X,Y] [--jobs N]
                      [--upstream CHECKOUT] [--status] [PART ...]

  data            agents that see vectors play with video behind the robot; their replay is what world models learn from
  representation  world models alone learn from these pictures, with every method
  control         agents learn from pictures alone, with video and without
  upstream        our program and upstream's own one with equal settings (needs --upstream)
  masks           HRSSM with other shares and other kinds of masks
  sparse          sparse rewards, with Plan2Explore and with smoothed rewards
  offline         world models alone learn from logged episodes of an expert: autoencoder regimes and dynamics
  breakout        a small object: its ball, by weights of the image loss and without a decoder (needs ale-py)
  measure         robustness of all world models, on clips that training did not show
  tables          collects all runs into figures/results/study_*.csv and draws them

  All parts in this order by default; seeds are the outermost loop, so that an unfinished study is balanced.
  --clips   background videos (default: those of video_hard, python setup/download.py dmcgs); a fifth is held out
  --tasks, --methods  only these of a part; part data has one method, whatever --methods names
  --upstream  a checkout of github.com/bit1029public/HRSSM; without it this part is left out
  --status  how much of each part is finished, here or in figures/results
END
}

die() {
  echo "error: $*" >&2
  exit 2
}

{
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)
out='' seeds=0,1,2 tasks='' methods='' jobs=1 upstream='' status='' failed=0 parts=()
clips=${HRSSM_ASSETS:-$HOME/.cache/hrssm}/dmcgs/video_hard/*.mp4
all=(data representation control upstream masks sparse offline breakout measure tables)
while [ $# -gt 0 ]; do
  case $1 in
  -h | --help) usage && exit ;;
  --status) status=1 && shift && continue ;;
  --out | --clips | --seeds | --tasks | --methods | --jobs | --upstream)
    [ $# -gt 1 ] || die "$1 needs a value"
    printf -v "${1#--}" %s "$2" && shift 2
    ;;
  data | representation | control | upstream | masks | sparse | offline | breakout | measure | tables) parts+=("$1") && shift ;;
  *) die "unknown argument $1: see setup/study.sh --help" ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
[ -n "$out" ] || [ -n "$status" ] || die "--out is missing: name the folder for all runs"
[[ $seeds =~ ^(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*$ ]] || die "--seeds takes numbers such as 0,1,2, not '$seeds'"
video=(--resource_files "$clips" --holdout_clips 0.2)
repo=repo+beta_init=0.1+beta_lr=0.01
discrete=(--actor_dist=onehot --imag_gradient=reinforce)

# The tasks and methods of a part, one per line.
only() { if [ -n "$1" ]; then grep -Fx "${1//,/$'\n'}" || true; else cat; fi; }
tasks_of() { all_tasks_of "$1" | tr , '\n' | only "$tasks"; }
methods_of() { all_methods_of "$1" | tr , '\n' | if [ "$1" = data ]; then cat; else only "$methods"; fi; }
all_tasks_of() {
  case $1 in
  data | representation) echo dmc_cartpole_balance_video,dmc_walker_stand_video,dmc_cheetah_run_video ;;
  control)
    echo dmc_walker_stand_video,dmc_walker_stand,dmc_cartpole_balance_video,dmc_cartpole_balance,dmc_finger_spin_video,dmc_finger_spin
    ;;
  upstream) echo dmc_cartpole_balance ;;
  masks) echo dmc_walker_stand_video ;;
  sparse) echo dmc_ball_in_cup_catch ;;
  offline) echo gym_HalfCheetah-v5 ;;
  breakout) echo gym_BreakoutBall-v0 ;;
  esac
}
all_methods_of() {
  case $1 in
  data) echo full ;;
  representation) echo "hrssm,dreamer,rssm,neither,nomlr,nosimsr,$repo,r2dreamer,mask_by=motion,mask_by=reward" ;;
  control) echo hrssm,dreamer,rssm,neither ;;
  upstream) echo hrssm,upstream ;;
  masks) echo mask_ratio=0.3,mask_ratio=0.7,mask_by=motion,mask_by=reward,mask_by=value ;;
  sparse) echo hrssm,reward_smoothing=gaussian,expl_behavior=plan2explore+expl_extr_scale=1.0 ;;
  offline)
    local internal=autoencoder=internal
    echo "$internal,autoencoder=external,autoencoder=frozen,$internal+dynamics=tssm,$internal+dyn_temp_post=False"
    ;;
  breakout)
    printf '%s,' decoder_scale={1,10,100}{,+motion_weight=50} decoder_scale=100+motion_weight=50+dynamics=tssm
    echo "$(printf 'autoencoder=none%s,' '' +hrssm{,+nomlr,+nosimsr})autoencoder=none+hrssm+neither"
    ;;
  esac
}
seeds_of() { if [ "$1" = data ]; then echo 0; else echo "$seeds"; fi; }

# The options of a part's runs on a task.
options_of() {
  case $1 in
  data) printf '%s\n' --configs=tiny --steps=24000 "${video[@]}" ;;
  representation)
    printf '%s\n' --configs=small --action_repeat=4 --steps=1500 --eval_every=500 --log_every=100 \
      "--offline_traindir=$out/data/$2/full/0/replay" "${video[@]}"
    ;;
  control | masks)
    printf '%s\n' --configs small
    [[ $2 != dmc_cartpole_* ]] || echo cartpole
    echo --final_episodes=20
    [[ $2 != *_video ]] || printf '%s\n' "${video[@]}"
    ;;
  upstream) # without what upstream's program does not have
    printf '%s\n' --configs=tiny --steps=24000 --eval_every=4000 --actor_start=0 --overlap=False --shared_env_seed=True \
      --shadow_size=2048
    ;;
  sparse) printf '%s\n' --configs=small --final_episodes=20 --steps=80000 ;;
  offline)
    printf '%s\n' --configs=offline_tiny --steps=2500 --eval_every=500 "--offline_traindir=$out/data/$2/train" \
      "--offline_evaldir=$out/data/$2/held_out" --offline_state=state '--offline_object=r-b>40'
    ;;
  breakout)
    printf '%s\n' --configs=offline_tiny --steps=2500 --eval_every=1250 --size=64,64 --autoencoder=internal \
      "${discrete[@]}" "--offline_traindir=$out/data/$2/train" "--offline_evaldir=$out/data/$2/held_out" \
      --offline_state=ball --offline_object=ball:5
    ;;
  esac
}

# Logged episodes of a task, for training and held-out ones; interrupted recordings go on.
record() {
  local folder=$out/data/$1 played options name episodes seed found
  mkdir -p "$folder"
  case $1 in
  gym_HalfCheetah-v5) # by a linear expert
    [ -e "$folder/expert.npz" ] ||
      python "$root/setup/expert.py" --task gym_HalfCheetah-v5 --minutes 5 --out "$folder/expert.npz"
    options=(--task 'gym_HalfCheetah-v5?camera_name=track' --time_limit 100 --record_policy "$folder/expert.npz")
    played=$'train 50 0\nheld_out 10 1'
    ;;
  gym_BreakoutBall-v0)
    options=(--task gym_setup.breakout:BreakoutBall-v0 --time_limit 200 --record_policy setup.breakout:player)
    options+=(--size 64,64 "${discrete[@]}")
    played=$'train 30 0\nheld_out 6 1'
    ;;
  esac
  while read -r name episodes seed; do
    found=$(find "$folder" -path "*/$name/*.npz" | wc -l)
    [ "$found" -ge "$episodes" ] ||
      python "$root/dreamer.py" --configs offline_tiny --seed "$seed" --action_repeat 1 "${options[@]}" \
        --record "$folder/$name" --record_episodes $((episodes - found)) </dev/null
  done <<<"$played"
}

# Runs one seed of upstream's own program.
sweep_upstream() {
  local task options run
  [ -n "$(methods_of upstream | grep -x upstream)" ] || return 0
  for task in $(tasks_of upstream); do
    mapfile -t options <<<"$(options_of upstream "$task")"
    run=$out/upstream/$task/upstream/$1
    [ ! -e "$run/sweep.done" ] || continue
    mkdir -p "$run"
    python "$root/tests/upstream/train.py" "$upstream" "${options[@]}" --task "$task" --seed "$1" --logdir "$run"
    touch "$run/sweep.done"
  done
}

# Pictures and errors of the runs of a part that draw: PART OBJECT METHODS.
compare() {
  local task runs
  for task in $(tasks_of "$1"); do
    runs=("$out/$1/$task"/$3/*/sweep.done)
    [ ! -e "${runs[0]}" ] || python "$root/figures/openloop.py" --data "$out/data/$task/held_out" --object "$2" \
      --runs "${runs[@]%/sweep.done}" --out "$root/figures/results/study_${task#gym_}.png"
  done
}

# Runs one seed of a part, task by task.
sweep() {
  local task options chosen
  chosen=$(methods_of "$1" | sed '/^upstream$/d' | paste -sd,)
  [ -n "$chosen" ] || return 0
  for task in $(tasks_of "$1"); do
    mapfile -t options <<<"$(options_of "$1" "$task")"
    "$root/setup/sweep.sh" --logdir "$out/$1" --tasks "$task" --methods "$chosen" --seeds "$2" --jobs "$jobs" \
      -- "${options[@]}" || { [ $? = 1 ] && failed=1; } # a run that fails does not hold up the others
  done
}

# Every name that --tasks or --methods lists is one of some part.
known() {
  local name names part
  names=$(for part in "${all[@]:0:8}"; do "all_${1}s_of" "$part" | tr , '\n'; done | sort -u)
  for name in ${2//,/ }; do
    grep -qFx -- "$name" <<<"$names" || die "no part has the $1 $name: there is" ${names//$'\n'/, }
  done
}
known task "$tasks"
known method "$methods"

if [ -n "$status" ]; then
  results=$root/figures/results/study_runs.csv
  printf '%-16s %10s %10s\n' part finished runs
  for part in "${all[@]:0:8}"; do
    finished=0 total=0
    for task in $(tasks_of "$part"); do
      for method in $(methods_of "$part"); do
        for seed in $(seeds_of "$part" | tr , ' '); do
          total=$((total + 1))
          if [ -e "$out/$part/$task/$method/$seed/sweep.done" ] || grep -qs "^$part,$task,$method,$seed,"  "$results"; then
            finished=$((finished + 1))
          fi
        done
      done
    done
    printf '%-16s %10s %10s\n' "$part" "$finished" "$total"
  done
  exit
fi

python -c '' 2>/dev/null || die "no python: put setup/run.sh before this command"
IFS=, read -ra all_seeds <<<"$seeds"
for seed in "${all_seeds[@]}"; do
  for part in "${parts[@]}"; do
    case $part in
    measure | tables) ;;
    data) sweep data 0 ;;
    upstream)
      if [ -n "$upstream" ]; then
        sweep upstream "$seed"
        sweep_upstream "$seed"
      else
        echo "upstream: left out, --upstream names no checkout" >&2
      fi
      ;;
    offline | breakout)
      for task in $(tasks_of "$part"); do record "$task"; done
      sweep "$part" "$seed"
      ;;
    *) sweep "$part" "$seed" ;;
    esac
  done
done
for part in "${parts[@]}"; do
  case $part in
  measure)
    for task in $(tasks_of representation); do
      runs=("$out/representation/$task"/*/*/sweep.done)
      [ ! -e "${runs[0]}" ] || python "$root/figures/robustness.py" "${runs[@]%/sweep.done}" \
        --player "$out/data/$task/full/0" --episodes 0 --out "$out/robustness_$task.png"
    done
    ;;
  tables)
    python "$root/figures/study.py" "$out"
    compare offline 'r-b>40' '*'
    compare breakout ball:5 'decoder_scale*'
    ;;
  esac
done
exit "$failed"
}
