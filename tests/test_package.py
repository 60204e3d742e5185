"""What holds for the package as a whole."""

import subprocess
import sys

from nec_ray.contracts import arrow_schema, contract
from nec_ray.errors import NecError


def test_importing_nec_ray_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, nec_ray; nec_ray.open_archive, nec_ray.load_codec;"
        "print(sorted({'ray', 'torch', 'timm', 'compressai', 'rasterio', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_column_of_the_contracts_is_described() -> None:
    for name in ("catalog.json", "index.json", "scenes.json"):
        assert all(column["doc"] for column in contract(name)["columns"])
        assert arrow_schema(name).names == [column["name"] for column in contract(name)["columns"]]


def test_every_error_stands_in_the_tree() -> None:
    import nec_ray.errors

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(e for child in kind.__subclasses__() for e in below(child))]

    tree = nec_ray.errors.__doc__ or ""
    assert [e.__name__ for e in below(NecError) if e.__module__ == "nec_ray.errors" and e.__name__ not in tree] == []
