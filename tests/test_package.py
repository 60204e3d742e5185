"""What holds for the package as a whole."""

import subprocess
import sys

from nec_ray.contracts import arrow_schema, contract
from nec_ray.errors import NecError

HEAVY = {"ray", "torch", "timm", "compressai", "rasterio", "PIL", "matplotlib"}
ONLY_WHERE_NEEDED = {"numpy", "numba", "pyarrow", "duckdb", "deltalake", "fsspec", "s3fs", "zarr", "pydantic", "typer"}


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh Python has after some code."""
    code = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_nec_ray_loads_neither_ray_nor_torch() -> None:
    assert not loaded_by("import nec_ray; nec_ray.open_archive, nec_ray.load_codec") & HEAVY


def test_importing_nec_ray_alone_loads_nothing_but_python() -> None:
    assert not loaded_by("import nec_ray") & (HEAVY | ONLY_WHERE_NEEDED)


def test_the_command_starts_without_what_only_its_work_needs() -> None:
    assert not loaded_by("import nec_ray.cli") & ((HEAVY | ONLY_WHERE_NEEDED) - {"typer"})


def test_every_column_of_the_contracts_is_described() -> None:
    for name in ("catalog.json", "index.json", "recorded_catalog.json", "scenes.json"):
        assert all(column["doc"] for column in contract(name)["columns"])
        assert arrow_schema(name).names == [column["name"] for column in contract(name)["columns"]]


def test_every_error_stands_in_the_tree() -> None:
    import nec_ray.errors

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(e for child in kind.__subclasses__() for e in below(child))]

    tree = nec_ray.errors.__doc__ or ""
    assert [e.__name__ for e in below(NecError) if e.__module__ == "nec_ray.errors" and e.__name__ not in tree] == []
