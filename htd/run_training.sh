#!/usr/bin/env bash
# Train ResNet with every schedule, several times, and sum the runs up.
#
#   ./run_training.sh                                    # ResNet-50, 2 data sets, 3 x 5 runs each
#   ./run_training.sh --datasets cifar10 --runs 3 --stack_n 1 --epochs 30
#   ./run_training.sh --data_dir my_pictures --runs 3 --stack_n 3
#
# --schedulers, --datasets ("a b c" in one argument), --data_dir, --runs, --seed, --stack_n and
# --log_dir are read here; all other options go to ResNet.py as they are. Started again with the same
# options after a stop, it goes on where it was: finished runs are left alone, a run that was cut
# short is resumed.

set -eo pipefail

schedulers="step cos tanh" datasets="cifar10 cifar100" runs=5 seed=0 stack_n=8 log_dir=runs/htd
data_dir="" options=()
while (($#)); do
    case $1 in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --schedulers) schedulers=${2:?"$1 needs a value"} && shift 2 ;;
        --datasets) datasets=${2:?"$1 needs a value"} && shift 2 ;;
        --data_dir) data_dir=${2:?"$1 needs a value"} && shift 2 ;;
        --runs) runs=${2:?"$1 needs a value"} && shift 2 ;;
        --seed) seed=${2:?"$1 needs a value"} && shift 2 ;;
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

# A shell leaves ~ alone in --log_dir=~/runs.
log_dir=${log_dir/#\~\//$HOME/} data_dir=${data_dir/#\~\//$HOME/}
read -ra names <<<"$datasets"
if [[ -n $data_dir ]]; then # whose name the folders of its runs have
    data_dir=$(cd "$data_dir" && pwd)
    names=("$(basename "$data_dir")")
    options+=(--data_dir "$data_dir")
fi

here=$(dirname "$0")
# The count is the outer loop, so that at any moment all schedules have about equally many runs.
for ((count = 1; count <= runs; count++)); do
    for dataset in "${names[@]}"; do
        for scheduler in $schedulers; do
            this=(--log_dir "$log_dir/${scheduler}_$count" --stack_n "$stack_n")
            this+=(--scheduler "$scheduler" --count "$count")
            [[ -z $data_dir ]] && this+=(--dataset "$dataset")
            # The newest of the runs that ResNet.py has begun in this folder: names are times.
            run=""
            for found in "$log_dir/${scheduler}_$count/ResNet-$((6 * stack_n + 2))_$dataset"/*/; do
                [[ -e ${found}args.json ]] && run=$found
            done
            if [[ -n $run && -e ${run}model.keras ]]; then
                echo "$run is finished and stays as it is, whatever the options are now"
            elif [[ -n $run ]]; then
                python "$here/ResNet.py" "${this[@]}" --resume "$run" "${options[@]}"
            else
                python "$here/ResNet.py" "${this[@]}" --seed "$seed" "${options[@]}"
            fi
        done
    done
done
python "$here/summary.py" "$log_dir" --picture "$log_dir/summary.png"
