#!/bin/sh
# NEC (Gomes and Brunschwiler 2024), Fig. 3, on data that you have: catalog, codecs of four rates, archives, report.
#     reproduce.sh ucmerced UCMerced_LandUse/Images OUT WEIGHTS
#     reproduce.sh potsdam  POTSDAM_FOLDER          OUT WEIGHTS
# POTSDAM_FOLDER holds 2_Ortho_RGB and 5_Labels_all_noBoundary, as ISPRS delivers them. WEIGHTS are a pretrained MAE ViT-B/16
# (the paper's: RVSA's, of MillionAID). What follows is given to every `nec train` and ends up in its recipe, such as
# --set train.workers=8. Steps whose result is there are not done again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
task=$1 data=$2 out=$3 weights=$4
shift 4
mkdir -p "$out"
case $task in
ucmerced) images=$data window=512 only=true ;; # larger than any of its images: each one is a tile
potsdam) images=$data/2_Ortho_RGB window=512 only='width = 512 AND height = 512' ;;
*) echo "reproduce.sh: $task is neither ucmerced nor potsdam" >&2 && exit 2 ;;
esac
case $data in /*) ;; *) data=$PWD/$data images=$PWD/$images ;; esac
case $weights in *://* | /*) ;; *) weights=$PWD/$weights ;; esac
cd "$out"
[ -e tiles.parquet ] || nec tiles build "$images" --tile-size "$window" --out tiles.parquet
train() { # name, then settings
    name=$1
    shift
    [ -e "$name/codec/codec.json" ] || nec train "$here/$task-recipe.toml" --set data.catalog=tiles.parquet \
        --set model.init="$weights" --out "$name" "$@"
}
train uncompressed "$@" --set train.trainable=entropy
for rate in 1e7:0.98 1e8:0.098 1e9:0.0098 1e10:0.00098; do
    name=nec-${rate%%:*}
    train "$name" "$@" --set train.beta="${rate#*:}"
    nec encode tiles.parquet "$name.archive" --codec "$name/codec" --where "$only"
done
cp "$here/$task.toml" "$here/potsdam_classes.json" .
[ "$task" != potsdam ] || ln -sfn "$data/5_Labels_all_noBoundary" labels
nec evaluate "$task.toml" --out report
