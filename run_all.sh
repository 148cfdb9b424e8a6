#!/usr/bin/env bash
# Tables 1 and 2: for every method and seed, a SCAR run and the controls from its pretraining.
#
#   bash run_all.sh                               the paper's runs, three seeds, one after the other
#   GPUS="0 1 2 3" bash run_all.sh                the same on several GPUs, one training on each
#   CONTROLS="none confidence eps0" bash run_all.sh          more rows for Table 1
#   SEEDS=0 EPOCHS=50 OUT=runs/short bash run_all.sh --width 1     options go to every script
#   METHODS= bash run_all.sh                      only the tables of the runs that are there
#
# Rerun the command to resume. The tables are printed and written to OUT/tables.md.
# Exit code 0: done; 1: a run or the tables failed, or it was stopped; 2: bad settings.

set -uf # -f: SEEDS='*' must not expand to file names
SEEDS=${SEEDS-0 1 2}
EPOCHS=${EPOCHS-200}
DATA=${DATA-cifar10}
DATA_DIR=${DATA_DIR-data}
OUT=${OUT-runs}
GPUS=${GPUS-}
METHODS=${METHODS-vat mixmatch fixmatch}
CONTROLS=${CONTROLS-none}
PYTHON=${PYTHON-python}
here=$(cd "$(dirname "$0")" && pwd)

refuse() {
    echo "error: $1" >&2
    exit 2
}

[ -n "$SEEDS" ] || refuse "SEEDS is empty; give whole numbers"
for number in "${EPOCHS:-empty}" $SEEDS; do
    [[ $number =~ ^[0-9]+$ ]] || refuse "EPOCHS and SEEDS must be whole numbers, not '$number'"
done
[ "$EPOCHS" -gt 0 ] || refuse "EPOCHS must be at least 1"
for method in $METHODS; do
    [[ $method =~ ^(vat|mixmatch|fixmatch)$ ]] || refuse "METHODS: there is no method '$method'"
done
for control in $CONTROLS; do
    [[ $control =~ ^(none|confidence|eps0)$ ]] || refuse "CONTROLS: there is no '$control'"
done
eps= previous=
for word in "$@"; do
    case ${word%%=*} in
        --data | --data-dir | --epochs | --seed | --out | --select | --pretrained)
            refuse "${word%%=*} is set by DATA, DATA_DIR, EPOCHS, SEEDS, OUT or CONTROLS" ;;
        --eps) [[ $word = *=* ]] && eps=${word#*=} ;;
    esac
    [ "$previous" != --eps ] || eps=$word
    previous=$word
done
mkdir -p "$OUT" || refuse "OUT=$OUT cannot be created; choose another"

run() { # method seed select eps [option ...]: runs one script
    local method=$1 seed=$2 select=$3 eps=$4
    shift 4
    # in the background, because bash does not act on a signal before a foreground command ends
    "$PYTHON" "$here/${method}_scar.py" --data "$DATA" --data-dir "$DATA_DIR" --epochs "$EPOCHS" \
        --seed "$seed" --select "$select" --out "$(folder "$method" "$seed" "$select" "$eps")" \
        "$@" --eps "$eps" &
    wait $!
}

folder() { # method seed select eps: the folder in OUT, named like the script's default
    local name=$DATA
    [ "$DATA" != folder ] || name=$(basename "$(realpath -m "$DATA_DIR")")
    echo "$OUT/$1__${name}__$3-eps$4__seed$2"
}

rows() { # method seed [option ...]: SCAR, then its controls from the same pretraining
    local method=$1 seed=$2 own code=0
    [ "$method" = vat ] && own=${eps:-6} || own=${eps:-1}
    shift 2
    trap 'kill $(jobs -p) 2> /dev/null; wait; exit 1' TERM
    printf "\n== %s, seed %s, SCAR\n" "$method" "$seed"
    run "$method" "$seed" fgsm "$own" "$@" || return 1
    set -- "$@" --table2-eps 1 --pretrained "$(folder "$method" "$seed" fgsm "$own")/pretrain.pt"
    for control in $CONTROLS; do
        printf "\n== %s, seed %s, control: %s\n" "$method" "$seed" "$control"
        [ "$control" = eps0 ] && control="fgsm 0" || control="$control $own"
        run "$method" "$seed" $control "$@" || code=1
    done
    return "$code"
}

stop() {
    trap - INT TERM
    kill $(jobs -p) 2> /dev/null
    wait
    echo "run_all.sh stopped; rerun the command to resume" >&2
    exit 1
}
trap stop INT TERM

gpus=($GPUS)
jobs=()
failed=0
for seed in $SEEDS; do
    for method in $METHODS; do
        if [ ${#gpus[@]} -gt 1 ]; then # in the background, on each GPU in turn
            log=$OUT/${method}__seed$seed.log
            lane=$((${#jobs[@]} % ${#gpus[@]}))
            before= # the job on this GPU now
            [ ${#jobs[@]} -lt ${#gpus[@]} ] || before=${jobs[-${#gpus[@]}]}
            echo "$method, seed $seed: on GPU ${gpus[$lane]}, output in $log"
            (
                while [ -n "$before" ] && kill -0 "$before" 2> /dev/null; do sleep 1; done
                CUDA_VISIBLE_DEVICES=${gpus[$lane]} rows "$method" "$seed" "$@" >> "$log" 2>&1
            ) &
            jobs+=($!)
        else
            ([ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=$GPUS; rows "$method" "$seed" "$@") &
            wait $! || { failed=1; echo "failed: $method, seed $seed" >&2; }
        fi
    done
done
for pid in ${jobs[@]+"${jobs[@]}"}; do
    wait "$pid" || { failed=1; echo "a run failed; see the logs in $OUT" >&2; }
done
echo
"$PYTHON" "$here/results/tables.py" "$OUT" || failed=1
exit "$failed"
