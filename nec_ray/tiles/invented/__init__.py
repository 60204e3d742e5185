"""An invented planet, written as files of MMEarth's: so that all of this package runs without the 600 GB download.

Its modalities depend on one another as nature's do: place and terrain make the climate, climate and terrain the biome,
biome and terrain the land cover, and that, with season, sun and weather, what the satellites see. It shows that code
works; no figure measured on it says anything about the Earth.
"""

from nec_ray.tiles.invented.write import generate

__all__ = ["generate"]
