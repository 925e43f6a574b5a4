"""The bundles of the device's tests, for the tests of what else is in them."""

from tests.edge_demo.conftest import sample_bundle, tiny_bundles

__all__ = ["sample_bundle", "tiny_bundles"]
