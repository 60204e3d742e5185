"""Keeps a catalog's tiles of images: a folder of Dubai's scenes holds their masks, too."""

import sys

import pyarrow.compute as pc
import pyarrow.parquet as pq

table = pq.read_table(sys.argv[1])
pq.write_table(table.filter(pc.invert(pc.match_substring(table["source"], "/masks/"))), sys.argv[2])
