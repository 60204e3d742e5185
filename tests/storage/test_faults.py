"""Which errors pass by themselves."""

from deltalake.exceptions import DeltaError

from nec_ray.storage.faults import is_passing


def test_a_listing_of_delta_rs_that_was_cut_off_passes() -> None:
    said = "Generic S3 error: Error getting list response body: HTTP error: request or response body error"
    assert is_passing(DeltaError(f"Generic DeltaTable error: Error interacting with object store: {said}"))
    assert not is_passing(DeltaError("Generic DeltaTable error: invalid JSON in log record"))
