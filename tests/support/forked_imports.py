"""What the programs of `forking` import. They are forked before anything else runs."""

import gc

from server import library_env

gc.disable()
library_env.disable_telemetry_and_warnings()
library_env.set_pytorch_variables()

import server.cli.serve  # noqa: E402, F401

# Forked processes then leave the memory of these objects shared.
gc.freeze()
