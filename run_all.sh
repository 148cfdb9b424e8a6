#!/usr/bin/env bash
# Tables 1 and 2: for every method and seed a SCAR run, and the controls from its pretraining.
#
#   bash run_all.sh                               the paper's runs, three seeds, one after the other
#   GPUS="0 1 2 3" bash run_all.sh                the same on several GPUs, one training on each
#   CONTROLS="none confidence eps0 eps3" bash run_all.sh     more fine-tunings of every pretraining
#   SEEDS=0 EPOCHS=50 OUT=runs/short bash run_all.sh --width 1     options go to every script
#   METHODS= bash run_all.sh                      only the tables of the runs that are there
#
# Rerun the command to resume. The tables are printed and written to OUT/tables.md.

set -ufm # -f: SEEDS='*' must not become file names; -m: a process group for all runs, see stop
export DATA=${DATA-cifar10} DATA_DIR=${DATA_DIR-data} EPOCHS=${EPOCHS-200} OUT=${OUT-runs}
export GPUS=${GPUS-} CONTROLS=${CONTROLS-none} PYTHON=${PYTHON-python}
SEEDS=${SEEDS-0 1 2} METHODS=${METHODS-vat mixmatch fixmatch}

GPUS=${GPUS//,/ }
export SCRIPTS=$(cd "$(dirname "$0")" && pwd)
if [[ " $* " =~ \ (--(data|data-dir|epochs|seed|select|eps|pretrained|out))[\ =] ]]; then
    echo "error: run_all.sh sets ${BASH_REMATCH[1]} itself; use the variables at its top" >&2
    exit 2
fi
mkdir -p "$OUT" && type "$PYTHON" > /dev/null || exit

train() { # "method seed" [option ...]: SCAR, then its controls from the same pretraining
    local method=${1% *} seed=${1#* } eps=1 name=$DATA gpus=($GPUS) failed=0 control
    shift
    [ "$method" != vat ] || eps=6
    [ "$DATA" != folder ] || name=$(basename "$(realpath -m "$DATA_DIR")")
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=${gpus[$SLOT]}
    if [ ${#gpus[@]} -gt 1 ]; then
        local log=$OUT/${method}__${name}__seed$seed.log
        echo "$method, seed $seed: on GPU ${gpus[$SLOT]}, output in $log"
        exec >> "$log" 2>&1
    fi
    folder() { echo "$OUT/${method}__${name}__$1-eps${2}__seed$seed"; } # as the script names it
    run() { # select eps [option ...]
        printf '\n== %s, seed %s, --select %s --eps %s\n' "$method" "$seed" "$1" "$2"
        "$PYTHON" "$SCRIPTS/${method}_scar.py" --data "$DATA" --data-dir "$DATA_DIR" \
            --epochs "$EPOCHS" --seed "$seed" --select "$1" --eps "$2" \
            --out "$(folder "$1" "$2")" "${@:3}"
    }
    run fgsm "$eps" "$@" || return 1
    set -- "$@" --table2-eps 1 --pretrained "$(folder fgsm "$eps")/pretrain.pt"
    for control in $CONTROLS; do
        case $control in
            "eps$eps") ;; # the run above
            eps*) run fgsm "${control#eps}" "$@" || failed=1 ;;
            *) run "$control" "$eps" "$@" || failed=1 ;;
        esac
    done
    return "$failed"
}
export -f train

gpus=(${GPUS:-default})
for seed in $SEEDS; do
    for method in $METHODS; do echo "$method $seed"; done
done | xargs -P "${#gpus[@]}" --process-slot-var=SLOT -I{} \
    bash -c '(train "$@") || { echo "failed: $1" >&2; exit 1; }' train {} "$@" &
stop() {
    { kill -- "-$(jobs -p)"; wait; } 2> /dev/null
    echo "stopped; rerun the command to resume" >&2
    exit 1
}
trap stop INT TERM HUP
wait $!
failed=$?
"$PYTHON" "$SCRIPTS/results/tables.py" "$OUT" || failed=1
exit $((failed > 0))
