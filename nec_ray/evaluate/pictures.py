"""Pictures of an archive: embeddings beside the scene, bytes and classes on the map, a confusion matrix.

Colours are those of Okabe and Ito, and viridis and cividis: told apart also by colour-blind readers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.errors import InputError

Rgb = npt.NDArray[np.uint8]

# Sky blue comes late: beside it a pale blue could be mistaken.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#56B4E9", "#000000")
"""Okabe and Ito's colours."""
_NATURAL = {"water": "#0072B2", "forest": "#009E73", "cropland": "#E69F00", "built-up": "#D55E00"}
"""Classes whose colours readers expect."""
_OTHER = "#9A9A9A"
_EMPTY = "#E4E4E4"  # where there is no tile
_MAX_CANVAS = 2400  # pixels of the longer side
_CELL_NUMBERS = 16  # a larger confusion matrix gets numbers on its diagonal, and elsewhere only
_CELL_SHARE = 0.05  # from this share of a class upwards
_MANY_TILES = 32
_STRETCH = (2, 98)  # percentiles of a principal component that become 0 and 255
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}


@dataclass(frozen=True)
class Placement:
    """Where each tile lies, in one coordinate system, y upwards."""

    left: npt.NDArray[np.float64]
    bottom: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    top: npt.NDArray[np.float64]
    crs: str
    """`OGC:CRS84` for longitude and latitude, else the tiles' own CRS."""

    def __len__(self) -> int:
        return len(self.left)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of all tiles, in matplotlib's order."""
        return (
            float(self.left.min()),
            float(self.right.max()),
            float(self.bottom.min()),
            float(self.top.max()),
        )


@dataclass(frozen=True)
class Scene:
    """The picture that tiles were cut from, in the placement's coordinates."""

    rgb: Rgb
    """(rows, columns, 3)."""
    extent: tuple[float, float, float, float]
    """Left, right, bottom, top."""


PLACEMENT_ROWS = ("tile_id", "bbox", "crs", "transform", "grid")
"""Columns of the index that `place` needs."""


def place(rows: pa.Table) -> Placement:
    """Where tiles lie: in their own CRS where they share one and are north-up, else by bounds in degrees.

    Args:
        rows: `PLACEMENT_ROWS` of the tiles, in the order in which they will be drawn.

    Raises:
        InputError: a tile has neither.
    """
    crs = rows["crs"].unique().to_pylist()
    if len(crs) == 1 and crs[0] and not rows["transform"].null_count and not rows["grid"].null_count:
        a, b, c, d, e, f = np.array(rows["transform"].to_pylist(), np.float64).reshape(-1, 6).T
        if not b.any() and not d.any() and (a > 0).all() and (e < 0).all():
            grid = rows["grid"].combine_chunks()
            n_rows, n_cols = (pc.struct_field(grid, name).to_numpy() for name in ("rows", "cols"))
            return Placement(left=c, bottom=f + e * n_rows, right=c + a * n_cols, top=f, crs=crs[0])
    box = rows["bbox"].combine_chunks()
    if box.null_count or not len(box):
        raise InputError(f"{box.null_count or 'all'} of these tiles have no place on the map; no map can be drawn")
    xmin, ymin, xmax, ymax = (pc.struct_field(box, n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax"))
    return Placement(left=xmin, bottom=ymin, right=xmax, top=ymax, crs="OGC:CRS84")


def pca_false_colour(embeddings: npt.NDArray[np.float32], sample: int = 20_000) -> Rgb:
    """Tokens as colours: their first three principal components, each stretched between two percentiles.

    Args:
        embeddings: float (tiles, tokens, channels).
        sample: at most this many tokens, spread evenly, decide the components and the stretch.

    Returns:
        uint8 (tiles, tokens, 3), the 2nd percentile as 0 and the 98th as 255; a component that does not vary
        is grey. A component's sign makes its largest weight positive: the same colours in every run.
    """
    tiles, tokens, channels = embeddings.shape
    flat = embeddings.reshape(-1, channels)
    chosen = flat[:: max(1, math.ceil(len(flat) / sample))].astype(np.float64)
    mean = chosen.mean(axis=0)
    _, axes = np.linalg.eigh((chosen - mean).T @ (chosen - mean))
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1, 1)
    low, high = np.percentile((chosen - mean) @ axes, _STRETCH, axis=0)
    span = high - low
    flat_axis = span <= 1e-6 * max(float(np.abs(chosen).max()), 1e-12)
    shown = (flat.astype(np.float64) - mean) @ axes
    shown = np.where(flat_axis, 0.5, (shown - low) / np.where(flat_axis, 1, span))
    colour = np.full((len(flat), 3), 128, np.uint8)
    colour[:, : shown.shape[1]] = np.rint(np.clip(shown, 0, 1) * 255)
    return colour.reshape(tiles, tokens, 3)


def scene_and_embeddings(
    scene: Scene | None,
    placement: Placement,
    embeddings: npt.NDArray[np.float32],
    grid: tuple[int, int],
    out: Path,
    *,
    title: str = "Embeddings: first three principal components",
) -> Path:
    """Draw the scene, and beside it every token of every tile in its PCA false colour, in its place.

    A ViT's tokens carry their position in the tile, which would show as one pattern in every tile; where tiles
    are many, the mean over tiles of each position is taken out first.

    Args:
        scene: what the tiles were cut from; left out where it is None.
        placement: where the tiles lie.
        embeddings: float32 (tiles, tokens, channels).
        grid: token rows and columns.
        out: PNG file to write.
        title: of the embeddings' side.
    """
    if len(embeddings) >= _MANY_TILES:
        embeddings = embeddings - embeddings.mean(axis=0)
    colours = pca_false_colour(embeddings).reshape(len(embeddings), *grid, 3)
    with _map(scene, placement, out) as (_, axes):
        _paint(axes, placement, colours)
        axes.set_title(title)
    return out


def bytes_map(placement: Placement, n_bytes: npt.NDArray[np.int64], out: Path, *, scene: Scene | None = None) -> Path:
    """Draw the payload bytes of every tile in its place, beside the scene where it is given.

    Args:
        placement: where the tiles lie.
        n_bytes: (tiles,) bytes.
        out: PNG file to write.
        scene: what the tiles were cut from.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    low, high = float(n_bytes.min()), float(n_bytes.max())
    if low == high:
        low, high = low - 1, high + 1
    scale = ScalarMappable(Normalize(low, high), colormaps["viridis"])
    colours = (scale.to_rgba(n_bytes)[:, None, None, :3] * 255).round().astype(np.uint8)
    with _map(scene, placement, out) as (figure, axes):
        _paint(axes, placement, colours)
        axes.set_title(f"Payload: {n_bytes.mean():,.0f} bytes a tile on average")
        bar = figure.colorbar(
            scale, ax=axes, fraction=0.046, pad=0.02, format="{x:,.0f}", ticks=MaxNLocator(6, integer=True)
        )
        bar.set_label("bytes of a tile's payload")
    return out


def class_map(
    scene: Scene | None,
    placement: Placement,
    labels: Sequence[str],
    out: Path,
    *,
    confidence: npt.NDArray[np.float32] | None = None,
    title: str = "Predicted class",
) -> Path:
    """Draw the class of every tile in its place, beside the scene where it is given.

    The eight most frequent classes have a colour, the rest share grey.

    Args:
        scene: what the tiles were cut from.
        placement: where the tiles lie.
        labels: (tiles,) class names.
        out: PNG file to write.
        confidence: (tiles,) 0 to 1; a tile is paler where it is lower.
        title: of the classes' side.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    names, count = np.unique(np.array(labels, dtype=object).astype(str), return_counts=True)
    # Colours go by name, so that a class keeps its colour from map to map while it is among the shown.
    shown = sorted(names[np.argsort(-count, kind="stable")][: len(PALETTE)].tolist())
    colour_of = {name: _NATURAL[name] for name in shown if name in _NATURAL}
    left = [colour for colour in PALETTE if colour not in colour_of.values()]
    colour_of |= dict(zip([name for name in shown if name not in colour_of], left, strict=False))
    colours = np.array([to_rgb(colour_of.get(label, _OTHER)) for label in labels])
    if confidence is not None:
        strength = 0.5 + 0.5 * np.clip(confidence, 0, 1)[:, None]
        colours = strength * colours + (1 - strength)
    legend = [Patch(color=colour_of[n], label=f"{_short(n)} ({count[names == n][0]:,})") for n in shown]
    if len(names) > len(shown):
        rest = len(labels) - sum(int(count[names == n][0]) for n in shown)
        legend.append(Patch(color=_OTHER, label=f"{len(names) - len(shown)} others ({rest:,})"))
    with _map(scene, placement, out) as (figure, axes):
        _paint(axes, placement, np.rint(colours * 255).astype(np.uint8)[:, None, None])
        axes.set_title(title if confidence is None else f"{title} (paler: less sure)")
        figure.legend(
            handles=legend,
            loc="outside lower center",
            ncols=min(len(legend), 2 if scene is None else 4),
            frameon=False,
        )
    return out


def confusion_matrix(
    confusion: npt.NDArray[np.int64],
    classes: Sequence[str],
    out: Path,
    *,
    title: str | None = None,
    percent: bool = False,
) -> Path:
    """Draw a confusion matrix: colour is the share of a true class, numbers are tiles.

    Args:
        confusion: (classes, classes) tiles by true class (row) and predicted class (column).
        classes: names.
        out: PNG file to write.
        title: the accuracy where it is None.
        percent: whether numbers are percentages of the true class instead.
    """
    total = confusion.sum(axis=1, keepdims=True)
    share = confusion / np.maximum(total, 1)
    count = len(classes)
    names = [_short(name) for name in classes]
    side = 3.2 + 0.3 * max(count, 6) + 0.05 * max(map(len, names))
    with new_figure(out, figsize=(side, side * 0.92)) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(count), names, rotation=90 if count > 4 else 0)
        axes.set_yticks(range(count), names)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        right = confusion.diagonal().sum()
        axes.set_title(
            title or f"{right:,} of {confusion.sum():,} test tiles right ({right / max(confusion.sum(), 1):.1%})"
        )
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format="{x:.0%}", label="share of the true class")
        for row in range(count):
            for column in range(count):
                if confusion[row, column] and (
                    row == column or count <= _CELL_NUMBERS or share[row, column] >= _CELL_SHARE
                ):
                    dark = share[row, column] < 0.5
                    axes.text(
                        column,
                        row,
                        f"{share[row, column]:.0%}" if percent else f"{confusion[row, column]}",
                        ha="center",
                        va="center",
                        fontsize=9 if count <= _CELL_NUMBERS else 7,
                        color="white" if dark else "black",
                    )
    return out


@contextmanager
def new_figure(out: Path, figsize: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written to `out` when the block ends; no window and no global state.

    Args:
        out: PNG file.
        figsize: width and height, inches.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=figsize, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)


@contextmanager
def _map(scene: Scene | None, placement: Placement, out: Path) -> Iterator[tuple[Any, Any]]:
    """A figure with the scene on the left, where there is one, and the axes for the tiles."""
    left, right, bottom, top = placement.extent
    # A degree of longitude is shorter than one of latitude by the cosine of the latitude.
    aspect = 1.0
    if placement.crs == "OGC:CRS84":
        aspect = 1 / max(math.cos(math.radians((bottom + top) / 2)), 0.05)
    panels = 1 if scene is None else 2
    width = 5.6
    height = min(max(width * aspect * (top - bottom) / (right - left), 2.2), 9.0) + 1.1
    with new_figure(out, figsize=(width * panels + 0.8, height)) as figure:
        axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
        if scene is not None:
            axes[0].imshow(scene.rgb, extent=scene.extent, interpolation="antialiased")
            axes[0].set_title("Scene")
        for panel in axes:
            panel.set_facecolor(_EMPTY)
        yield figure, axes[-1]
        degrees = placement.crs == "OGC:CRS84"
        for panel in axes:
            panel.set_xlim(left, right)
            panel.set_ylim(bottom, top)
            panel.set_aspect(aspect)
            panel.set_xlabel("longitude, degrees" if degrees else f"easting ({_short(placement.crs)})")
            panel.ticklabel_format(useOffset=False, style="plain")
            panel.locator_params(nbins=5)
        axes[0].set_ylabel("latitude, degrees" if degrees else f"northing ({_short(placement.crs)})")


def _paint(axes: Any, placement: Placement, images: Rgb) -> None:
    """Paint `images` uint8 (tiles, rows, columns, 3) in their places on one canvas, without interpolation."""
    left, right, bottom, top = placement.extent
    rows, cols = images.shape[1:3]
    # A whole number of pixels a token, where tiles are of one size, so that tokens come out equally large.
    pixel = min((placement.right - placement.left).min() / cols, (placement.top - placement.bottom).min() / rows)
    pixel = max(pixel / 4, (right - left) / _MAX_CANVAS, (top - bottom) / _MAX_CANVAS)
    width, height = max(1, round((right - left) / pixel)), max(1, round((top - bottom) / pixel))
    x0, x1 = (np.rint((side - left) / (right - left) * width).astype(int) for side in (placement.left, placement.right))
    y0, y1 = (np.rint((top - side) / (top - bottom) * height).astype(int) for side in (placement.top, placement.bottom))
    canvas = np.zeros((height, width, 4), np.uint8)
    for image, a, b, c, d in zip(images, x0, np.maximum(x1, x0 + 1), y0, np.maximum(y1, y0 + 1), strict=True):
        column = np.arange(b - a) * cols // (b - a)
        row = np.arange(d - c) * rows // (d - c)
        target = canvas[c:d, a:b]
        target[..., :3] = image[row[: target.shape[0], None], column[: target.shape[1]]]
        target[..., 3] = 255
    axes.imshow(canvas, extent=(left, right, bottom, top), interpolation="antialiased")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
