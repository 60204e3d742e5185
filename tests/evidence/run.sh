#!/bin/sh
# What stands in this folder, made anew: a pretraining on AID's pixels, codecs of several rates, archives, reports.
#     run.sh AID_FOLDER DUBAI_FOLDER OUT
# AID_FOLDER holds a folder a class, DUBAI_FOLDER one a scene (tile_1 ... tile_6) with images/ and masks/. Steps whose
# result is there are not done again. About eight hours on two cores with AVX-512 BF16, most of it the heads.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
recipe=$here/../../nec_ray/data/rgb_recipe.toml
aid=$(cd "$1" && pwd)
dubai=$(cd "$2" && pwd)
mkdir -p "$3"
cd "$3"
[ -e aid.parquet ] || nec tiles build "$aid" --licence "research use (AID)" --out aid.parquet
[ -e dubai.parquet ] || {
    nec tiles build "$dubai" --tile-size 128 --out dubai-all.parquet
    python "$here/images_only.py" dubai-all.parquet dubai.parquet
}
ln -sfn "$dubai" dubai-masks
cp "$here/dubai_classes.json" . # those of the data set name other colours than its masks have

[ -e pre/weights.safetensors ] || nec train "$recipe" --set data.catalog=aid.parquet --set train.adapt_epochs=0 --out pre
adapt() { # folder, recipe, catalog, then settings
    folder=$1 recipe=$2 catalog=$3
    shift 3
    [ -e "$folder/codec/codec.json" ] || nec train "$recipe" --set data.catalog="$catalog.parquet" \
        --set model.init=pre/weights.safetensors --set train.pretrain_epochs=0 --out "$folder" "$@"
}
archive() { # archive, catalog, codec
    nec encode "$2.parquet" "$1" --codec "$3" --where "width >= 128 AND height >= 128"
}
adapt rgb "$recipe" aid
for data in aid dubai; do archive "$data-built-in.archive" "$data" rgb/codec; done
for step in 0.7 2.0 3.0; do
    adapt "aid-step-$step" "$recipe" aid --set 'model.layers=[192]' --set model.step=$step
    archive "aid-step-$step.archive" aid "aid-step-$step/codec"
done
for step in 1.5 3.0; do
    adapt "dubai-step-$step" "$recipe" dubai --set 'model.layers=[192]' --set model.step=$step
    archive "dubai-step-$step.archive" dubai "dubai-step-$step/codec"
done
# As the paper has it: the encoder's own channels, rounded to integers, and what it trains.
for beta in 0.1 0.01 0.003; do
    adapt "aid-beta-$beta" "$here/paper_recipe.toml" aid --set train.beta=$beta
    archive "aid-beta-$beta.archive" aid "aid-beta-$beta/codec"
done
# What adaptation trains, at one beta.
for trainable in entropy entropy+patch all; do
    adapt "ablation-$trainable" "$here/paper_recipe.toml" aid --set train.trainable="$trainable"
    archive "ablation-$trainable.archive" aid "ablation-$trainable/codec"
done
# The sizes of ViT by one recipe, pretrained briefly.
for size in tiny:176 small:368 base:752; do
    run=size-${size%:*}
    [ -e "$run/codec/codec.json" ] || nec train "$recipe" --set data.catalog=aid.parquet --set data.max_tiles=4000 \
        --set model.size="${size%:*}" --set "model.layers=[4,12,${size#*:}]" --set train.pretrain_epochs=4 --out "$run"
    archive "$run.archive" aid "$run/codec"
done
for task in aid ablation sizes labels dubai; do
    nec evaluate "$here/$task.toml" --out "$task-report"
done
