"""The picture of the real chip: `chip_picture.py CHIP_S2Hand.tif CHIP_LabelHand.tif PREDICTED.tif OUT.png`."""

import sys

import matplotlib as mpl
import numpy as np
import rasterio
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

mpl.use("agg")
optical, labels, predicted, out = sys.argv[1:]
with rasterio.open(optical) as source:
    colours = source.read([4, 3, 2]).astype(np.float32)
colours = np.clip(colours / np.percentile(colours, 98), 0, 1).transpose(1, 2, 0)
with rasterio.open(labels) as source:
    truth = source.read(1)
with rasterio.open(predicted) as source:
    found = source.read(1)
water = ListedColormap(["#e8e8e8", "#0072b2"])
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
axes[0].imshow(colours)
axes[1].imshow(np.where(truth < 0, np.nan, truth), cmap=water, vmin=0, vmax=1)
axes[2].imshow(np.where(found > 1, np.nan, found), cmap=water, vmin=0, vmax=1)
for axis, title in zip(axes, ("Sentinel-2", "water, as labelled", "water, of 2.7 KB a tile"), strict=True):
    axis.set_title(title)
    axis.axis("off")
figure.savefig(out, dpi=70)
