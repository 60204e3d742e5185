"""S3 as the user has set it up: for fsspec, and the same for delta-rs."""

from typing import Any

import fsspec
from fsspec.asyn import sync

from nec_ray.errors import InputError

_DEFAULT_REGION = "us-east-1"


def connect(url: str) -> tuple[Any, str]:
    """The s3fs file system of a URL and its path; anonymous where the user has no credentials at all.

    Raises:
        InputError: credentials stand in the URL, where libraries take them for a bucket's name and tell it everywhere.
    """
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise InputError("an s3 URL holds a user or a key; leave them out, and set AWS_ACCESS_KEY_ID or AWS_PROFILE")
    options: dict[str, Any] = {"default_cache_type": "none", "use_listings_cache": False}
    files, path = fsspec.url_to_fs(url, **options)
    if not files.anon and _credentials(files) is None:
        files, path = fsspec.url_to_fs(url, **options, anon=True)
    return files, path


def delta_options(files: Any) -> dict[str, str]:
    """delta-rs's options that reach the same store in the same name; asked for anew, since credentials run out."""
    client = sync(files.loop, _client, files)
    region = client.meta.region_name
    options = {"AWS_REGION": region if region and region != "aws-global" else _DEFAULT_REGION}
    endpoint = str(client.meta.endpoint_url)
    if not endpoint.rstrip("/").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options["AWS_ENDPOINT_URL"] = endpoint
    if endpoint.startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    found = None if files.anon else _credentials(files)
    if found is None:
        return options | {"AWS_SKIP_SIGNATURE": "true"}
    options |= {"AWS_ACCESS_KEY_ID": found.access_key, "AWS_SECRET_ACCESS_KEY": found.secret_key}
    if found.token:
        options["AWS_SESSION_TOKEN"] = found.token
    return options


def _credentials(files: Any) -> Any:
    """Access key, secret key and token as botocore finds them: options, environment, profile, instance."""
    return sync(files.loop, _frozen_credentials, files)


async def _frozen_credentials(files: Any) -> Any:
    client = await _client(files)
    found = client._request_signer._credentials
    return await found.get_frozen_credentials() if found is not None else None


async def _client(files: Any) -> Any:
    return await files.set_session()
