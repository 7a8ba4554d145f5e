#!/usr/bin/env bash
# A language model learns to see: installs, imports easy-VQA, trains, evaluates, answers a question.
# Safe to run again: finished steps are not repeated. RUN=folder changes where it writes (default runs/quickstart);
# arguments are overrides of configs/train/quickstart.yaml, e.g. train.epochs=0.1.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run=${RUN:-runs/quickstart}
questions=${QUESTIONS:-2000}
baseline=${BASELINE:-500}

echo "== 1. data: easy-VQA (4,000 pictures, 38,575 questions to train on)"
data=data/easy-vqa
[ -e $data/train.jsonl ] || mmit data import easy-vqa --split train --out $data/train.jsonl
[ -e $data/captions.jsonl ] || mmit data import easy-vqa-captions --split train --out $data/captions.jsonl

echo "== 2. training: projector + LoRA on SmolLM2-135M-Instruct, EfficientNet-Lite0 as vision encoder"
[ -e "$run/finished.json" ] || mmit train --config configs/train/quickstart.yaml run.dir="$run" run.resume=auto "$@"

echo "== 3. evaluation on $questions of the 9,673 test questions"
mmit eval "$run" --task easy_vqa --limit "$questions" --baseline-n "$baseline"

echo "== 4. one question"
echo "assets/blue-triangle.png: what color is the shape?"
mmit chat "$run" --image assets/blue-triangle.png --prompt "what color is the shape?"

echo "== done"
echo "checkpoint   $(ls -d "$run"/checkpoints/step-* | tail -1)"
echo "metrics      $run/metrics.jsonl"
echo "loss curve   $run/loss.png"
echo "report       $run/eval/report.json, $run/eval/report.md"
