"""Which errors pass by themselves."""

import logging

import pytest
from deltalake.exceptions import DeltaError

from nec_ray.errors import StorageError
from nec_ray.storage import Store, faults
from nec_ray.storage.faults import is_passing


def test_a_listing_of_delta_rs_that_was_cut_off_passes() -> None:
    said = "Generic S3 error: Error getting list response body: HTTP error: request or response body error"
    assert is_passing(DeltaError(f"Generic DeltaTable error: Error interacting with object store: {said}"))
    assert not is_passing(DeltaError("Generic DeltaTable error: invalid JSON in log record"))


def test_a_wait_for_a_store_is_said_once_and_without_secrets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faults, "PATIENCE_S", 2.0)
    monkeypatch.setattr(faults, "_SILENT_S", 0.2)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        Store("http://user:hunter2@127.0.0.1:1/a").read("x")
    [said] = caplog.messages
    assert "the store is away or busy" in said
    assert "trying again" in said
    assert "hunter2" not in said
