#!/usr/bin/env bash
# bash conf/experiment/gpu.sh
# All that is still to be measured on a GPU, in the order of its worth: down to the ten minutes of CIFAR-10 it takes up
# to 26 minutes. What is done is not done again, and a training whose time was over is resumed by the next call. Figures
# and logs lie in runs/gpu.
# Where there is no network: CIFAR10="dataset=npz dataset.name=cifar10 dataset.path=data/cifar10.npz"; a try without a
# GPU: TRAIN="trainer=cpu trainer.max_steps=2 model.hidden_channels=8 compile=false" BENCH="model_size=tiny".
set -u
out=${OUT:-runs/gpu}
read -ra cifar10 <<<"${CIFAR10:-dataset=cifar10}"
read -ra train <<<"${TRAIN:-trainer=gpu}"
read -ra bench <<<"${BENCH:-}"
mkdir -p "$out"

part() { # NAME MINUTES COMMAND...
    local name=$1 minutes=$2
    shift 2
    [ -e "$out/$name.done" ] && return
    echo "== $name, at most $minutes minutes"
    # SIGTERM lets a training save itself
    timeout --kill-after=60 "${minutes}m" "$@" 2>&1 | tee -a "$out/$name.log"
    [ "${PIPESTATUS[0]}" = 0 ] && touch "$out/$name.done"
}

training() { # NAME MINUTES SETTINGS...
    part "$1" "$2" python -m pixelcnn_lit.train run_dir="$out/runs/$1" skip_completed=true "${@:3}" "${train[@]}"
}

part tests 3 python -m pytest -n 0 -m gpu
for model in pixelcnn gated_pixelcnn pixelcnn_pp pixel_attention row_lstm diagonal_bilstm; do
    part "benchmark_$model" 1 python -m pixelcnn_lit.benchmark model="$model" batch_size=[256,16] rounds=1 \
        run_dir="$out/benchmark_$model" "${bench[@]}"
done
part sampling 3 python -m pixelcnn_lit.benchmark ckpt=cifar10 batch_size=[256,16,1024] rounds=1 run_dir="$out/sampling"
training cifar10_10min 14 experiment=cifar10/10min "${cifar10[@]}" label_dropout=0.1

training cifar10_20min 26 experiment=cifar10/20min "${cifar10[@]}" label_dropout=0.1
training mnist_gpu 120 experiment=mnist/gpu
training baseline 600 experiment=cifar10/baseline "${cifar10[@]}"
training autoregressive 600 experiment=cifar10/autoregressive "${cifar10[@]}"
python -m pixelcnn_lit.summarize "$out/runs"
