"""Items of STAC catalogs: what is followed, what may be named, whose terms hold.

STAC 1.0 and 1.1 (stacspec.org): a Catalog or Collection links to Items in files of their own; an ItemCollection, or
stac-geoparquet (a Parquet table with an item a row), holds them itself.

Documents come from outside. Links to children and items are followed only below the folder of the first document, each
once; nothing else is fetched while items are looked for. Assets may lie below that folder, or on any web server or in
any bucket: static catalogs of other people's imagery are made so. Other files of this machine are never named by one,
nor are machines of the local network by a catalog that does not lie on them.
"""

import ipaddress
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.errors import BadSource
from nec_ray.storage import Store

_MOST_JSON = 32 << 20
"""Bytes of a JSON document; what it takes in memory may be twenty times as much."""
_MOST_PARQUET = 1 << 30
_MOST_DOCUMENTS = 100_000
_MOST_TEXT = 300
_READERS = 16
_FOLLOWED = ("child", "item")
_PARQUET = (".parquet", ".geoparquet")
_TABLE_ONLY = {"type", "stac_version", "stac_extensions", "id", "geometry", "bbox", "links", "assets", "collection"}
"""Columns of stac-geoparquet that are no properties."""
_ODD_ADDRESS = re.compile(r"[\d.]*|0x[0-9a-fx.]*")
"""An IPv4 address as one number, in hexadecimal or with parts left out."""
_MOST_TERMS = 20
_UNSTATED = ("proprietary", "other", "various")
"""What STAC writes where no SPDX identifier fits: the terms are behind a link."""


@dataclass(frozen=True)
class Item:
    """A STAC item."""

    id: str
    collection: str | None
    properties: Mapping[str, Any]
    assets: Mapping[str, Mapping[str, Any]]
    url: str
    """Where it is: its own file, else its `self` link, else the file that holds it with `#` and its id."""
    base: str
    """What its relative links start from."""


class Items:
    """The items of a source, and whose terms hold for them.

    Args:
        url: of a Catalog, Collection, Item, ItemCollection or stac-geoparquet.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = url.rpartition("/")[0]
        self._licences: dict[str, None] = {}
        self._names: dict[str, None] = {}

    def __iter__(self) -> Iterator[Item]:
        """All items.

        Raises:
            NotFound: a document is not there.
            BadSource: a document is none of STAC's, names others outside its folder, or there are too many.
        """
        yield from self._of_table() if self.url.lower().endswith(_PARQUET) else self._of_documents()

    @property
    def licence(self) -> str | None:
        """Of all that was read so far."""
        return "; ".join(self._licences) or None

    @property
    def attribution(self) -> str | None:
        """Providers other than mere hosts of all that was read so far."""
        return ", ".join(self._names) or None

    def asset_url(self, item: Item, href: str) -> str:
        """Absolute path or URL of an asset.

        Raises:
            BadSource: it is none that a catalog may name.
        """
        where = f"{item.url}: its asset {_short(href)}"
        url = _resolve(item.base, href)
        if "://" not in url:
            if not _inside(self._root, url):
                raise BadSource(f"{where} lies outside the catalog's folder {self._root}; give a catalog beside it")
            return url
        scheme, _, rest = url.partition("://")
        if scheme not in {"http", "https", "s3"}:
            raise BadSource(f"{where} is neither on a web server nor on S3; copy it to one, or below the catalog")
        if scheme != "s3" and ("?" in url or "#" in url or "@" in rest.partition("/")[0]):
            raise BadSource(f"{where} is signed: it would stand in the catalog and run out; name it without")
        if scheme != "s3" and _is_private(_host(url)) and _host(url) != _host(self.url):
            raise BadSource(f"{where} is on a machine of the local network, and the catalog is not; serve both there")
        return url

    def _of_documents(self) -> Iterator[Item]:
        seen, level = {self.url}, [self.url]
        with ThreadPoolExecutor(_READERS) as pool:
            while level:
                waiting, level = iter(level), []
                while some := list(islice(waiting, 4 * _READERS)):
                    for url, document in zip(some, pool.map(_load, some), strict=True):
                        if document.get("type") == "Feature":
                            yield self._item(document, url, url)
                        elif document.get("type") == "FeatureCollection":
                            yield from self._features(document, url)
                        else:
                            for link in self._links(document, url):
                                if link not in seen:
                                    seen.add(link)
                                    level.append(link)
                            if len(seen) > _MOST_DOCUMENTS:
                                raise BadSource(
                                    f"{self.url}: links to more than {_MOST_DOCUMENTS:,} documents; "
                                    "give a part of it, or stac-geoparquet"
                                )

    def _features(self, document: dict[str, Any], url: str) -> Iterator[Item]:
        features = document.get("features")
        if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
            raise BadSource(f"{url}: its features are no list of items; give a STAC ItemCollection")
        if any(link.get("rel") == "next" for link in _records(document.get("links"))):
            raise BadSource(f"{url}: is one page of several; save all items of the search in one file")
        for feature in features:
            yield self._item(feature, url, None)

    def _links(self, document: dict[str, Any], url: str) -> Iterator[str]:
        """URLs of the documents below a Catalog or Collection."""
        if document.get("type") not in ("Catalog", "Collection", None) or "stac_version" not in document:
            raise BadSource(f"{url}: no STAC Catalog, Collection, Item or ItemCollection; give one")
        self._terms(document)
        links = _records(document.get("links"))
        followed = [link for link in links if link.get("rel") in _FOLLOWED]
        if not followed and any(link.get("rel") == "items" for link in links):
            raise BadSource(f"{url}: its items are behind an API; save a search of them as an ItemCollection")
        for link in followed:
            target = _resolve(url, str(link.get("href")))
            if not _inside(self._root, target):
                raise BadSource(f"{url}: links to {_short(target)}, outside {self._root}; give the catalog there")
            yield target

    def _item(self, document: dict[str, Any], container: str, own: str | None) -> Item:
        """The item of a document.

        Args:
            document: what may be one.
            container: the file that holds it.
            own: its own file.
        """
        name, properties = document.get("id"), document.get("properties")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MOST_TEXT:
            raise BadSource(f"{container}: an item whose id is no short text; give valid STAC")
        if not isinstance(properties, dict):
            raise BadSource(f"{container}: its item {name} has no properties; give valid STAC")
        assets = document.get("assets")
        links = (link.get("href") for link in _records(document.get("links")) if link.get("rel") == "self")
        itself = own or next(
            (str(href) for href in links if str(href).startswith(("https://", "http://", "s3://"))), None
        )
        collection = document.get("collection")
        self._terms(properties)
        return Item(
            id=name,
            collection=collection if isinstance(collection, str) else None,
            properties=properties,
            assets={key: one for key, one in assets.items() if isinstance(one, dict)}
            if isinstance(assets, dict)
            else {},
            url=_short(itself or f"{container}#{name}"),
            base=itself or container,
        )

    def _terms(self, document: Mapping[str, Any]) -> None:
        """Remember the licence and the providers that a collection or an item's properties state."""
        licence = _text(document.get("license"))
        if licence in _UNSTATED:
            links = (link.get("href") for link in _records(document.get("links")) if link.get("rel") == "license")
            licence = ", ".join(filter(None, [licence, next(map(_text, links), None)]))
        if licence and len(self._licences) < _MOST_TERMS:
            self._licences[licence] = None
        for provider in _records(document.get("providers")):
            name = _text(provider.get("name"))
            if name and provider.get("roles") != ["host"] and len(self._names) < _MOST_TERMS:
                self._names[name] = None

    def _of_table(self) -> Iterator[Item]:
        data = _read(self.url, _MOST_PARQUET)
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            names = file.schema_arrow.names
            if missing := [name for name in ("id", "assets") if name not in names]:
                raise BadSource(f"{self.url}: no stac-geoparquet, it lacks {', '.join(missing)}; give STAC, or pixels")
            self._collections(file.schema_arrow.metadata or {})
            wanted = [name for name in names if name not in {"geometry", "bbox"}]
            for batch in file.iter_batches(256, columns=wanted):
                for row in batch.to_pylist():
                    yield self._item(_from_row(row), self.url, None)
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            raise BadSource(f"{self.url}: no Parquet file that reads ({_line(error)})") from None

    def _collections(self, metadata: Mapping[bytes, bytes]) -> None:
        """Terms of the collections that stac-geoparquet keeps in the file's metadata."""
        try:
            held = json.loads(metadata.get(b"stac-geoparquet", b"{}"))
            older = json.loads(metadata.get(b"stac:collection", b"{}"))
        except (ValueError, RecursionError):
            raise BadSource(f"{self.url}: its metadata on collections is no JSON; write it again") from None
        held = held if isinstance(held, dict) else {}
        several = held.get("collections")
        for one in (held.get("collection"), older, *(several.values() if isinstance(several, dict) else ())):
            if isinstance(one, dict):
                self._terms(one)


def _from_row(row: dict[str, Any]) -> dict[str, Any]:
    """The item of a row of stac-geoparquet: properties are columns, what an item lacks is null."""
    item = {name: _without_nulls(row.get(name)) for name in ("id", "collection", "links", "assets")}
    if isinstance(item["assets"], str):
        item["assets"] = json.loads(item["assets"])
    return item | {
        "properties": {k: _without_nulls(v) for k, v in row.items() if k not in _TABLE_ONLY and v is not None}
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _load(url: str) -> dict[str, Any]:
    try:
        document = json.loads(_read(url, _MOST_JSON))
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{url}: no JSON that reads ({_line(error)}); give a STAC document") from None
    if not isinstance(document, dict):
        raise BadSource(f"{url}: no STAC document; give a Catalog, Collection, Item or ItemCollection")
    return document


def _read(url: str, most: int) -> bytes:
    folder, _, name = url.rpartition("/")
    data = Store(folder or "/").read_start(name, most + 1)
    if len(data) > most:
        raise BadSource(f"{url}: longer than {most >> 20} MiB; give stac-geoparquet in several files, or a part of it")
    return data


def _resolve(base: str, href: str) -> str:
    """Absolute path or URL of what a document at `base` names."""
    if not href or not href.isprintable() or "\\" in href:
        raise BadSource(f"{base}: {_short(href)!r} is no link; give valid STAC")
    href = href.removeprefix("file://")
    if "://" in href:
        scheme, _, path = href.partition("://")
    elif "://" in base:
        scheme, _, path = base.partition("://")
        host, _, path = path.partition("/")
        path = host + (href if href.startswith("/") else f"/{posixpath.dirname(path)}/{href}")
    else:
        return posixpath.normpath(href if href.startswith("/") else f"{posixpath.dirname(base)}/{href}")
    host, _, path = path.partition("/")
    return f"{scheme.lower()}://{host}{posixpath.normpath('/' + path.lstrip('/'))}"


def _inside(root: str, url: str) -> bool:
    return url.startswith(f"{root}/")


def _host(url: str) -> str:
    """The host of a URL without its port; empty for a path."""
    host = url.partition("://")[2].partition("/")[0].lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].rstrip(".")


def _is_private(host: str) -> bool:
    """Whether a host is named as one that only this machine or its network reaches, such as a cloud's metadata.

    Names are not resolved: this keeps a catalog from naming such addresses, it is no firewall.
    """
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name, or an address written so that it does not look like one
        return host == "localhost" or host.endswith(".localhost") or _ODD_ADDRESS.fullmatch(host) is not None


def _records(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    """A short line of what should be one."""
    return _short(" ".join(value.split())) or None if isinstance(value, str) else None


def _short(text: str) -> str:
    return "".join(c for c in text[:_MOST_TEXT] if c.isprintable())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
