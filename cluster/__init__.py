"""Headwater as a whole: its configuration, its life, its command line."""

import os

# Before Ray is imported: a process here starts or joins Ray when it means to. Otherwise a late callback of Serve, after
# the cluster has been stopped, would have Ray start or join whatever it finds.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
