"""`nec tiles`: what makes, samples and matches tile catalogs; `nec tiles build` stands in `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from nec_ray.errors import InputError
from nec_ray.printing import print_facts, progress_bar

tiles_app = typer.Typer(no_args_is_help=True, help="Tile catalogs: where each tile's pixels are.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Seed = Annotated[int, typer.Option(help="The same seed makes the same choice.", min=0)]
_SHOWN = 12


@tiles_app.command("generate", epilog="Example: nec tiles generate invented --samples 20 --picture samples.png")
def tiles_generate(
    folder: Annotated[str, typer.Argument(help="Folder for the files, a path or URL.")],
    samples: Annotated[int, typer.Option(help="Samples, one a tile.", min=1)] = 100,
    side: Annotated[int, typer.Option(help="Pixels a side; the published files have 128 or 64.")] = 128,
    seed: Seed = 0,
    name: Annotated[str, typer.Option(help="Of the files.")] = "data_invented",
    picture: Annotated[Path | None, typer.Option(help="PNG file for a picture of the first samples.")] = None,
    as_json: Json = False,
) -> None:
    """Write invented samples in MMEarth's format: twelve modalities that depend on one another as nature's do.

    They show that code works, and nothing about the Earth.
    """
    from nec_ray.tiles.invented import generate

    if not name or "/" in name:
        raise InputError(f"{name!r} is no name of a file")
    with progress_bar("making samples", as_json) as advance:
        url = generate(folder, samples=samples, side=side, seed=seed, name=name, progress=advance)
    if picture is not None:
        _draw(url, min(samples, _SHOWN), picture)
    print_facts({"file": url, "tiles": samples, **({"picture": str(picture)} if picture else {})}, as_json)


@tiles_app.command(
    "balance", epilog="Example: nec tiles balance catalog.parquet --samples 10000 --out balanced.parquet"
)
def tiles_balance(
    catalog: Annotated[str, typer.Argument(help="A tile catalog with the columns biome and eco_region.")],
    samples: Annotated[int, typer.Option(help="Tiles wanted, a 14th of them in each biome.", min=1)],
    out: Annotated[str, typer.Option(help="Catalog of the chosen tiles, a Parquet file: a path or URL.")],
    seed: Seed = 0,
    area: Annotated[
        str | None,
        typer.Option(
            help="Area that one tile stands for, SQL over the catalog's columns, in any unit; where not given, that of "
            "its bounds. It is summed over the tiles of an ecoregion to A_e."
        ),
    ] = None,
    biomes: Annotated[int, typer.Option(help="Biomes among which the tiles are divided.", min=1)] = 14,
    as_json: Json = False,
) -> None:
    """Choose tiles at random so that all biomes weigh the same, and ecoregions as their area (MMEarth, Eq. 2).

    The area A_e of an ecoregion is that of the catalog's tiles in it, A_B that of its biome's. Where the catalog does
    not cover the land, the quotas are therefore not the paper's, which took the ecoregions' own areas.
    """
    from nec_ray.tiles import read_catalog, write_catalog
    from nec_ray.tiles.balance import AREA, balanced_sample

    sample = balanced_sample(read_catalog(catalog), samples, seed=seed, area=area or AREA, biomes=biomes)
    write_catalog(sample.catalog, out)
    facts = {"catalog": out, "tiles": len(sample.catalog), "eco_regions": len(sample.account)}
    print_facts(facts | ({"too_few_tiles_by": sample.short} if sample.short else {}), as_json)


@tiles_app.command("scenes", epilog="Example: nec tiles scenes catalog.parquet scenes.parquet --out choice.parquet")
def tiles_scenes(
    catalog: Annotated[str, typer.Argument(help="A tile catalog.")],
    scenes: Annotated[str, typer.Argument(help="A scene catalog, a Parquet file as schemas/scenes.json says.")],
    out: Annotated[str, typer.Option(help="Parquet file to write, a row a tile: a path or URL.")],
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose the Sentinel-2, Sentinel-1 and Dynamic World scenes of every tile by MMEarth's rules.

    The scenes are named, not fetched: downloading from Earth Engine or elsewhere is out of scope.
    """
    from nec_ray.tiles import read_catalog
    from nec_ray.tiles.selection import choose_scenes, read_scenes, write_choice

    choice = choose_scenes(read_catalog(catalog).table, read_scenes(scenes), seed=seed)
    write_choice(choice, out)
    print_facts({"out": out, "tiles": len(choice), "without_scene": choice["sentinel2"].null_count}, as_json)


def _draw(url: str, count: int, out: Path) -> None:
    from nec_ray.evaluate.modality_pictures import modality_samples
    from nec_ray.storage import Store
    from nec_ray.tiles.mmearth_reader import open_mmearth

    folder, _, name = url.rpartition("/")
    with open_mmearth(Store(folder), name) as file:
        about = [file.tile_info[tile_id] for tile_id in file.tile_ids[:count]]
        titles = [f"{one['S2_DATE']} {one['S2_type']}" for one in about]
        modality_samples(file.read(range(count)), out, titles=titles)
