#!/usr/bin/env bash
# Train ResNet with every schedule, several times, and sum the runs up.
#
#   ./run_training.sh                                    # ResNet-50, 2 data sets, 3 x 5 runs each
#   ./run_training.sh --datasets cifar10 --runs 3 --stack_n 1 --epochs 30 --data_dir DIR
#
# --schedulers, --datasets ("a b c" in one argument), --runs, --stack_n and --log_dir are read here;
# all other options go to ResNet.py as they are. Started again with the same options after a stop,
# it goes on where it was: finished runs are left alone, a run that was cut short is resumed.

set -euo pipefail

schedulers="step cos tanh" datasets="cifar10 cifar100" runs=5 stack_n=8 log_dir=runs/htd options=()
while (($#)); do
    case $1 in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --schedulers) schedulers=${2:?"$1 needs a value"} && shift 2 ;;
        --datasets) datasets=${2:?"$1 needs a value"} && shift 2 ;;
        --runs) runs=${2:?"$1 needs a value"} && shift 2 ;;
        -n | --stack_n) stack_n=${2:?"$1 needs a value"} && shift 2 ;;
        --log_dir) log_dir=${2:?"$1 needs a value"} && shift 2 ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        -n?* | -[dsc]* | --dataset | --scheduler | --count | --resume)
            echo "$0: error: not $1 but --stack_n, --datasets, --schedulers or --runs" >&2
            exit 1
            ;;
        *) options+=("$1") && shift ;;
    esac
done
for number in "$runs" "$stack_n"; do
    if [[ ! $number =~ ^[1-9][0-9]*$ ]]; then
        echo "$0: error: $number is not a whole number of at least 1" >&2
        exit 1
    fi
done

log_dir=${log_dir/#\~\//$HOME/} # a shell leaves it alone in --log_dir=~/runs
options+=(--stack_n "$stack_n" --log_dir "$log_dir")

here=$(dirname "$0")
# The count is the outer loop, so that at any moment all schedules have about equally many runs.
for ((count = 1; count <= runs; count++)); do
    for dataset in $datasets; do
        for scheduler in $schedulers; do
            run=$log_dir/ResNet-$((6 * stack_n + 2))_$dataset/${scheduler}_$count
            if [[ -e $run/model.keras ]]; then
                echo "$run is finished and stays as it is, whatever the options are now"
                continue
            fi
            this=(--scheduler "$scheduler" --dataset "$dataset" --count "$count")
            [[ -e $run/args.json ]] && this+=(--resume "$run")
            python "$here/ResNet.py" "${this[@]}" "${options[@]}"
        done
    done
done
python "$here/summary.py" "$log_dir" --picture "$log_dir/summary.png"
