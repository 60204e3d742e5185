#!/bin/sh
# What stands in this folder, made anew: codecs of six rates and one in layers trained on AID's pixels, archives, reports.
#     run.sh AID_FOLDER DUBAI_FOLDER OUT
# AID_FOLDER holds a folder a class, DUBAI_FOLDER one a scene (tile_1 ... tile_6) with images/ and masks/. Steps whose
# result is there are not done again. It has not been run to its end yet; how long it takes is not known.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
recipe=$here/../../nec_ray/data/rgb_recipe.toml
aid=$(cd "$1" && pwd)
dubai=$(cd "$2" && pwd)
mkdir -p "$3"
cd "$3"
[ -e aid.parquet ] || nec tiles build "$aid" --licence "research use (AID)" --out aid.parquet
[ -e dubai.parquet ] || nec tiles build "$dubai" --tile-size 128 --out dubai.parquet
ln -sfn "$dubai" dubai-masks

[ -e rgb/codec/codec.json ] || nec train "$recipe" --set data.catalog=aid.parquet --out rgb
adapt() { # folder, catalog, then settings
    folder=$1 catalog=$2
    shift 2
    [ -e "$folder/codec/codec.json" ] || nec train "$recipe" --set data.catalog="$catalog.parquet" \
        --set model.init=rgb/weights.safetensors --set train.pretrain_epochs=0 --out "$folder" "$@"
}
archive() { # archive, catalog, codec
    nec encode "$2.parquet" "$1" --codec "$3" --where "width >= 128 AND height >= 128"
}
whole='--set model.layers=[192]'
adapt frozen aid $whole --set train.trainable=entropy
for data in aid dubai; do
    for beta in 0.3 0.1 0.03 0.01 0.003 0.001; do
        adapt "$data-beta-$beta" "$data" $whole --set train.beta="$beta"
        archive "$data-beta-$beta.archive" "$data" "$data-beta-$beta/codec"
    done
    archive "$data-built-in.archive" "$data" rgb/codec
done
# What adaptation trains, at one rate.
for trainable in entropy entropy+patch all; do
    adapt "ablation-$trainable" aid $whole --set train.beta=0.01 --set train.trainable="$trainable"
    archive "ablation-$trainable.archive" aid "ablation-$trainable/codec"
done
for task in aid ablation dubai; do
    nec evaluate "$here/$task.toml" --out "$task-report"
done
