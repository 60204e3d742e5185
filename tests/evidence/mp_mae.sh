#!/bin/sh
# The road of MP-MAE, whole: invented samples, pretraining, adaptation, archives, a linear probe of land cover, optical
# pretraining beside multi-modal over three seeds; then a real chip of Sen1Floods11 and a head for its water.
#     mp_mae.sh SEN1FLOODS11_FOLDER OUT
# It tests the pipeline: the samples are invented, and one chip of 512 pixels tells nothing about floods elsewhere.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
recipe=$here/../../nec_ray/data/mp_mae_recipe.toml
chip=$(cd "$1" && pwd)/Spain_7370579
mkdir -p "$2"
cd "$2"
[ -e invented.parquet ] || {
    nec tiles generate invented --samples 1000 --side 64 --picture invented.png
    nec tiles build invented/data_invented.h5 --out invented.parquet
    python "$here/land_cover.py" invented.parquet land-cover.csv
}
[ -e chip.parquet ] || nec tiles build "${chip}_S2Hand.tif" --tile-size 64 --out chip.parquet
for seed in 0 1 2; do
    for targets in s2 all; do
        run=$targets-$seed
        [ -e "$run/codec/codec.json" ] || nec train "$recipe" --set data.catalog=invented.parquet \
            --set data.size=64 --set model.patch=16 --set model.targets=$targets --set train.seed=$seed \
            --set train.pretrain_epochs=10 --set train.adapt_epochs=3 --set train.batch_size=64 \
            --set train.accumulate=1 --set train.lr=6e-4 --set train.precision=bfloat16 --set train.workers=2 \
            --set train.checkpoint_every=5 --out "$run"
        nec encode invented.parquet "$run.archive" --codec "$run/codec"
    done
done
# Two stages in one payload, the finer one for the shores.
[ -e stages/codec/codec.json ] || nec train "$here/stages_recipe.toml" --out stages
nec encode chip.parquet chip.archive --codec stages/codec
nec head chip.archive --labels "${chip}_LabelHand.tif" --classes "$here/water.json" --task segmentation --out chip-head
nec predict chip.archive --head chip-head --out chip-water.tif
nec evaluate "$here/mp_mae.toml" --out mp-mae-report
python "$here/chip_picture.py" "${chip}_S2Hand.tif" "${chip}_LabelHand.tif" chip-water.tif chip.png
