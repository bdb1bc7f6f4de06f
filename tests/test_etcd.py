"""The store in etcd: the contract on real members, and what is attacked when members, clients and networks fail."""

from __future__ import annotations

import unittest

import pytest
from members import Cluster, needed

from wmi import etcd_store
from wmi.contract import StorageContract


@pytest.fixture(scope="module")
def single():
    """A cluster of one member."""
    needed()
    with Cluster() as cluster:
        yield cluster


class TestSingle(StorageContract, unittest.TestCase):
    opener = staticmethod(etcd_store.open_storage)
    shared = True

    @pytest.fixture(autouse=True)
    def _located(self, single):
        self.location = single.location()
