#!/usr/bin/env bash
# What was tried for the settings that the paper leaves open, one change at a time (and the two that
# helped SCAR together), at CPU size: CIFAR-10 (JPEG) in data/cifar10-jpeg, WRN-10-1, batch 32, 3 + 3
# epochs of 500 steps, seed 0, scored on 5,000 training images that are held out. Stopped and given
# again, it goes on; it ends at the first run that fails.
#
#   OMP_NUM_THREADS=1 bash results/settings.sh            all of it; METHODS=vat for one method
#   METHODS= OUT=runs/settings bash run_all.sh            the tables

set -eu
cd "$(dirname "$0")/.."
METHODS=${METHODS-mixmatch fixmatch vat} OUT=${OUT-runs/settings} PYTHON=${PYTHON-python}
size="--data folder --data-dir data/cifar10-jpeg --val 5000 --depth 10 --width 1 --batch-size 32 --epochs 3 --steps-per-epoch 500"

pretrain() { # method name [option ...]: both phases
    local method=$1 name=$2
    shift 2
    [ "$method" != fixmatch ] || set -- --mu 3 "$@"
    "$PYTHON" "${method}_scar.py" $size --out "$OUT/${method}__$name" "$@"
}

finetune() { # method name [option ...]: from the theta~ of the method's default settings
    local method=$1 name=$2
    shift 2
    pretrain "$method" "$name" --pretrained "$OUT/${method}__default/pretrain.pt" --table2-eps 1 "$@"
}

for method in $METHODS; do
    pretrain "$method" default
    finetune "$method" control --select none
    if [ "$method" = vat ]; then # its eps is 6
        finetune vat eps1 --eps 1
        pretrain vat radius1.5 --select none --table2-eps 1 --vat-eps 1.5
        pretrain vat radius6 --select none --table2-eps 1 --vat-eps 6
        pretrain vat xi1e-2 --select none --table2-eps 1 --xi 0.01
        pretrain vat entropy --select none --table2-eps 1 --entropy-weight 0.06
        continue
    fi
    finetune "$method" true-share --true-share 0.5
    finetune "$method" eps4 --eps 4
    finetune "$method" eps4-true-share --eps 4 --true-share 0.5
    if [ "$method" = mixmatch ]; then
        finetune mixmatch lr-third --lr 0.00067
        finetune mixmatch control-lr-third --select none --lr 0.00067
        pretrain mixmatch lambda7.5 --select none --table2-eps 1 --lambda-u 7.5
    fi
done
